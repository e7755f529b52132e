// AMX: 16 rows by up to 16 tokens by 32 columns an instruction, of bfloat16 by bfloat16. Rows are expanded into a small
// buffer that stays in the first-level cache, 64 columns of 16 rows at a time, and loaded as tiles from there a step
// later, when they have left the store buffer. The tiles read and write subnormal numbers as zeros.
#include <immintrin.h>

#include <cstring>

#include "amx.h"
#include "avx512_transpose.h"
#include "linear.h"

namespace gossamer {
namespace {

#define GOSSAMER_INLINE [[gnu::always_inline]] inline
#define GOSSAMER_UNROLL _Pragma("GCC unroll 16")

constexpr int tile_cols = 32;
constexpr int64_t far_bytes = 16384;  // how far ahead of their use values are fetched towards the second-level cache

using Tile = uint16_t[side][tile_cols];
using Sums = float[side][side];

// Tiles 0 and 1 are sums [rows][tokens], 2 and 3 are x [pairs of columns][tokens][2], 4 and 5 weights [rows][columns].
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  explicit Config(int64_t tokens) {
    for (int i = 0; i < 6; ++i) rows[i] = side, bytes[i] = static_cast<uint16_t>(i < 4 ? 4 * tokens : 64);
  }
};

inline uint32_t first(int64_t n) { return n <= 0 ? 0 : ~uint32_t{0} >> (n >= 32 ? 0 : 32 - n); }

// 16 rows of the matrix, being expanded from left to right.
struct Rows {
  const uint8_t* mask[side];
  const uint16_t* values[side];
  const uint16_t* end;  // of all values

  // Rows past the last stand for the last: their sums are not used.
  Rows(const LinearJob& job, int64_t row, int64_t count) : end(at(job, job.rows)) {
    for (int r = 0; r < side; ++r) {
      const int64_t here = row + (r < count ? r : count - 1);
      mask[r] = job.mask + here * ((job.cols + 7) / 8);
      values[r] = at(job, here);
    }
  }

  static const uint16_t* at(const LinearJob& job, int64_t row) {
    return static_cast<const uint16_t*>(job.values) + job.offsets[row];
  }
};

// What is fetched ahead is asked for line after line, at the pace at which it is used: rows are read side by side, which
// the hardware's own prefetcher does not follow.
struct Ahead {
  const char *values, *mask;
  int64_t pace, mask_pace;  // bytes in the rows and steps of a tile

  Ahead(const LinearJob& job, int64_t row) {
    const double nnz = static_cast<double>(job.offsets[job.rows] + 1);
    const double density = nnz / (static_cast<double>(job.rows) * static_cast<double>(job.cols));
    pace = static_cast<int64_t>(2 * step_cols * density) + 1;
    mask_pace = side * step_cols / 8;
    values = reinterpret_cast<const char*>(Rows::at(job, row)) + far_bytes;
    mask = reinterpret_cast<const char*>(job.mask) + row * ((job.cols + 7) / 8) + far_bytes * 8 / pace;
  }

  GOSSAMER_INLINE void step() {
    __builtin_prefetch(mask, 0, 2);
    __builtin_prefetch(mask + 64, 0, 2);
    mask += mask_pace;
  }

  GOSSAMER_INLINE void row() {
    __builtin_prefetch(values, 0, 2);
    values += pace;
  }
};

template <bool careful>
GOSSAMER_INLINE __m512i read(const uint16_t* from, const uint16_t* end) {
  return careful ? _mm512_maskz_loadu_epi16(first(end - from), from) : _mm512_loadu_si512(from);
}

// The next `cols` <= 64 columns of all rows; only the last ones of a row may be fewer, and their padding is dropped.
template <bool careful>
GOSSAMER_INLINE void expand(Rows& rows, int64_t cols, Ahead& ahead, Tile* to) {
  ahead.step();
  GOSSAMER_UNROLL
  for (int r = 0; r < side; ++r) {
    uint64_t bits = 0;
    if (cols == step_cols) {
      std::memcpy(&bits, rows.mask[r], 8);
    } else {
      std::memcpy(&bits, rows.mask[r], static_cast<size_t>((cols + 7) / 8));
      bits &= (uint64_t{1} << cols) - 1;
    }
    const uint16_t* values = rows.values[r];
    const uint16_t* second = values + __builtin_popcount(static_cast<uint32_t>(bits));
    rows.mask[r] += step_cols / 8;
    rows.values[r] = values + __builtin_popcountll(bits);
    ahead.row();
    const __m512i low = read<careful>(values, rows.end), high = read<careful>(second, rows.end);
    _mm512_store_si512(to[0][r], _mm512_maskz_expand_epi16(static_cast<uint32_t>(bits), low));
    _mm512_store_si512(to[1][r], _mm512_maskz_expand_epi16(static_cast<uint32_t>(bits >> 32), high));
  }
}

GOSSAMER_INLINE void multiply(const Tile* weights, const char* x, int64_t tokens) {
  _tile_loadd(2, x, 4 * tokens);
  _tile_loadd(4, weights[0], 64);
  _tile_dpbf16ps(0, 4, 2);
  _tile_loadd(3, x + 64 * tokens, 4 * tokens);
  _tile_loadd(5, weights[1], 64);
  _tile_dpbf16ps(1, 5, 3);
}

GOSSAMER_INLINE __m512 bias_of(const LinearJob& job, int64_t row, __mmask16 rows) {
  if (!job.bias) return _mm512_setzero_ps();
  if (job.bias_type == Float::f32) return _mm512_maskz_loadu_ps(rows, static_cast<const float*>(job.bias) + row);
  const __m256i bf16 = _mm256_maskz_loadu_epi16(rows, static_cast<const uint16_t*>(job.bias) + row);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

// The sums are [rows][tokens], y is [tokens][rows].
void finish(const LinearJob& job, int64_t row, int64_t count, const Sums* sums) {
  const __mmask16 rows = static_cast<__mmask16>(first(count));
  const __m512 bias = bias_of(job, row, rows);
  __m512i of_token[side];
  GOSSAMER_UNROLL
  for (int r = 0; r < side; ++r)
    of_token[r] = _mm512_castps_si512(_mm512_add_ps(_mm512_load_ps(sums[0][r]), _mm512_load_ps(sums[1][r])));
  transpose(of_token);
  uint16_t* y = static_cast<uint16_t*>(job.y) + row;
  GOSSAMER_UNROLL
  for (int t = 0; t < side; ++t)
    if (t < job.tokens) {
      const __m512 value = _mm512_add_ps(_mm512_castsi512_ps(of_token[t]), bias);
      _mm256_mask_storeu_epi16(y + t * job.rows, rows, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
    }
}

template <bool careful>
void tile(const LinearJob& job, int64_t row, int64_t count) {
  alignas(64) Tile weights[2][2];
  alignas(64) Sums sums[2];
  Rows rows(job, row, count);
  Ahead ahead(job, row);
  const int64_t tokens = job.tokens;
  const char* x = reinterpret_cast<const char*>(job.x);
  _tile_zero(0);
  _tile_zero(1);
  int step = 0;
  for (int64_t left = job.cols; left > 0; left -= step_cols, ++step) {
    expand<careful>(rows, left < step_cols ? left : step_cols, ahead, weights[step & 1]);
    if (step == 0) continue;
    multiply(weights[~step & 1], x, tokens);
    x += 128 * tokens;
  }
  if (step > 0) multiply(weights[~step & 1], x, tokens);
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  finish(job, row, count, sums);
}

bool ask() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned amx_bf16 = 1u << 22, avx512_bf16 = 1u << 5;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & avx512_bf16) && amx_granted(amx_bf16);
}

}  // namespace

bool amx_usable() {
  static const bool usable = ask();
  return usable;
}

void amx_prepare(const void* x, int64_t row_stride_bytes, int64_t cols, int64_t tokens, void* out) {
  const __mmask16 kept = static_cast<__mmask16>(first(tokens));
  uint32_t* to = static_cast<uint32_t*>(out);
  for (int64_t k = 0; k < (cols + step_cols - 1) / step_cols * step_cols; k += tile_cols) {
    __m512i pairs[side];
    GOSSAMER_UNROLL
    for (int t = 0; t < side; ++t) {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(static_cast<const char*>(x) + t * row_stride_bytes) + k;
      pairs[t] = t < tokens ? _mm512_maskz_loadu_epi16(first(cols - k), from) : _mm512_setzero_si512();
    }
    transpose(pairs);
    GOSSAMER_UNROLL
    for (int p = 0; p < side; ++p, to += tokens) _mm512_mask_storeu_epi32(to, kept, pairs[p]);
  }
}

void amx_bitmask(const LinearJob& job, int64_t begin, int64_t end) {
  const Config config(job.tokens);
  const int64_t safe = job.offsets[job.rows] - tile_cols;
  _tile_loadconfig(&config);
  for (; begin < end; begin += side) {
    const int64_t count = end - begin < side ? end - begin : side;
    (job.offsets[begin + count] <= safe ? tile<false> : tile<true>)(job, begin, count);
  }
  _tile_release();
}

#undef GOSSAMER_UNROLL
#undef GOSSAMER_INLINE

}  // namespace gossamer
