// The kernels for CPUs without AVX-512, included by one file per instruction set that defines multiply_bytes().
// Two rows by four vectors at a time, because there are only 16 registers. Sums are exact everywhere.
#pragma once

#include <immintrin.h>

#include "common.h"

#define INLINE inline __attribute__((always_inline))

namespace gossamer::bsr {
namespace {

struct Half {  // 16 tokens in four vectors
  using V = __m128i;
  static constexpr int lanes = 1;
  static INLINE V load(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const V*>(p)); }
  static INLINE V zero() { return _mm_setzero_si128(); }
  static INLINE V weight(int32_t w) { return _mm_set1_epi32(w); }
  static INLINE V lo8(V a, V b) { return _mm_unpacklo_epi8(a, b); }
  static INLINE V hi8(V a, V b) { return _mm_unpackhi_epi8(a, b); }
  static INLINE V lo16(V a, V b) { return _mm_unpacklo_epi16(a, b); }
  static INLINE V hi16(V a, V b) { return _mm_unpackhi_epi16(a, b); }
  static INLINE void store(int32_t* p, V v) { _mm_storeu_si128(reinterpret_cast<V*>(p), v); }
};

struct Full {  // 32 tokens in four vectors
  using V = __m256i;
  static constexpr int lanes = 2;
  static INLINE V load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const V*>(p)); }
  static INLINE V zero() { return _mm256_setzero_si256(); }
  static INLINE V weight(int32_t w) { return _mm256_set1_epi32(w); }
  static INLINE V lo8(V a, V b) { return _mm256_unpacklo_epi8(a, b); }
  static INLINE V hi8(V a, V b) { return _mm256_unpackhi_epi8(a, b); }
  static INLINE V lo16(V a, V b) { return _mm256_unpacklo_epi16(a, b); }
  static INLINE V hi16(V a, V b) { return _mm256_unpackhi_epi16(a, b); }
  static INLINE void store(int32_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<V*>(p), v); }
};

// Sums of rows 2 p and 2 p + 1 of a block row and of 16 * lanes tokens of a block that is `width` wide, to [2][width].
template <class T, bool Quads, class Off>
INLINE void pair(const Groups& a, int64_t row, int p, const uint8_t* x, int64_t width, int32_t* out) {
  using V = typename T::V;
  const Off* offsets = static_cast<const Off*>(a.offsets);
  V sums[2][4] = {{T::zero(), T::zero(), T::zero(), T::zero()}, {T::zero(), T::zero(), T::zero(), T::zero()}};
  for (int64_t g = a.starts[row]; g < a.starts[row + 1]; ++g) {
    V in[4];
    if constexpr (Quads) {
      const uint8_t* quad = x + int64_t{offsets[g]} / 8 * width;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) in[i] = T::load(quad + 16 * T::lanes * i);
    } else {
      V c[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) c[j] = T::load(x + int64_t{offsets[4 * g + j]} / 8 * width);
      const V ab0 = T::lo8(c[0], c[1]), ab1 = T::hi8(c[0], c[1]), cd0 = T::lo8(c[2], c[3]), cd1 = T::hi8(c[2], c[3]);
      in[0] = T::lo16(ab0, cd0);
      in[1] = T::hi16(ab0, cd0);
      in[2] = T::lo16(ab1, cd1);
      in[3] = T::hi16(ab1, cd1);
    }
    int32_t w[2];
    std::memcpy(w, a.data + 16 * g + 8 * p, 8);
    multiply_bytes(sums, in, T::weight(w[0]), T::weight(w[1]));
  }
  // In lane l of vector i: tokens 16 l + 4 i .. + 3, or for quads as they come.
  for (int r = 0; r < 2; ++r)
    for (int i = 0; i < 4; ++i) {
      int32_t lanes[4 * T::lanes];
      T::store(lanes, sums[r][i]);
      for (int l = 0; l < T::lanes; ++l)
        std::memcpy(out + r * width + (Quads ? 4 * (T::lanes * i + l) : 16 * l + 4 * i), lanes + 4 * l, 16);
    }
}

template <bool Quads, class Off>
void all_blocks(const Weights& a, const Input& x, const Output& out, const Range& range) {
  constexpr int64_t token_bytes = Quads ? 4 : 1;
  for (int64_t b = range.token_begin; b < range.token_end; ++b) {
    const int64_t width = width_of(x.tokens, b);
    const uint8_t* data = x.data + block_start(x.layout, a.cols, b);
    for (int64_t row = range.row_begin; row < range.row_end; ++row) {
      int32_t sums[4 * block_tokens];
      for (int p = 0; p < 2; ++p) {
        int32_t* to = sums + 2 * p * width;
        if (width == 16)
          pair<Half, Quads, Off>(a.groups, row, p, data, width, to);
        else
          for (int64_t t = 0; t < width; t += 32)
            pair<Full, Quads, Off>(a.groups, row, p, data + token_bytes * t, width, to + t);
      }
      finish_tile(a, x, out, row, b * block_tokens, width, sums);
    }
  }
}

void blocks(const Weights& a, const Input& x, const Output& out, const Range& range) {
  const bool wide = a.groups.wide;
  const auto run = a.block == 4 ? (wide ? all_blocks<true, uint32_t> : all_blocks<true, uint16_t>)
                                : (wide ? all_blocks<false, uint32_t> : all_blocks<false, uint16_t>);
  run(a, x, out, range);
}

// Rows 2 p and 2 p + 1 of a block row in the two lanes; the 16 channels of a group are fetched one by one.
void windows(const Weights& a, const Input& x, const Output& out, const Range& range) {
  const Windows& w = a.windows;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(w.data);
  for (int64_t token = range.token_begin; token < range.token_end; ++token)
    for (int64_t row = range.row_begin; row < range.row_end; ++row) {
      __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      for (int64_t g = w.starts[row]; g < w.starts[row + 1]; ++g) {
        uint8_t channels[16];
        const uint8_t* from = x.data + token * x.stride + w.base[g];
        for (int j = 0; j < 16; ++j) channels[j] = from[w.index[16 * g + j]];
        const __m256i in = _mm256_broadcastsi128_si256(Half::load(channels));
        for (int p = 0; p < 2; ++p)
          sums[p] = multiply_lanes(sums[p], in, Full::load(bytes + 64 * g + 32 * p));
      }
      int32_t parts[16], total[4] = {};
      Full::store(parts, sums[0]);
      Full::store(parts + 8, sums[1]);
      for (int i = 0; i < 16; ++i) total[i / 4] += parts[i];
      finish_tile(a, x, out, row, token, 1, total);
    }
}

}  // namespace
}  // namespace gossamer::bsr
