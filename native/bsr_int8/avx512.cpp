// AVX-512 with VNNI: one vpdpbusd multiplies 16 tokens by 4 weights that are one broadcast.
#include "avx512.h"

namespace gossamer::bsr {
namespace {

INLINE __m512i weight(const int8_t* data, int row) {
  int32_t four;
  std::memcpy(&four, data + 4 * row, 4);
  return _mm512_set1_epi32(four);
}

template <int NB>
INLINE void multiply(Sums<NB>& s, const int8_t* data, const __m512i* x) {
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const __m512i w = weight(data, r);
#pragma GCC unroll 4
    for (int i = 0; i < NB / 16; ++i) s.v[r][i] = _mm512_dpbusd_epi32(s.v[r][i], x[i], w);
  }
}

// What is fetched into the second-level cache, a little with every group, so that no fetch waits for another.
struct Ahead {
  const char* at;
  int64_t step;
};

// Few tokens leave few independent sums: then two groups at a time, so that they do not wait for one another. Pointers
// run, instead of an index, as what counts them takes ports from the products.
template <int NB, bool Quads, bool Fetch, class Off>
INLINE void product(const Groups& a, int64_t row, const uint8_t* x, Ahead& ahead, Sums<NB>& s) {
  constexpr int many = Quads ? 1 : 4;  // offsets of a group
  const Off* offsets = static_cast<const Off*>(a.offsets) + many * a.starts[row];
  const int8_t* data = a.data + 16 * a.starts[row];
  const int8_t* const end = a.data + 16 * a.starts[row + 1];
  __m512i in[NB / 16];
  const auto group = [&](Sums<NB>& sums) __attribute__((always_inline)) {
    if constexpr (Fetch) {
      _mm_prefetch(ahead.at, _MM_HINT_T1);
      ahead.at += ahead.step;
    }
    fetch<NB, Quads>(x, offsets, in);
    multiply<NB>(sums, data, in);
    offsets += many;
    data += 16;
  };
  if constexpr (NB == 16) {
    Sums<NB> odd;
    for (auto& r : odd.v) r[0] = _mm512_setzero_si512();
    while (data + 16 < end) {
      group(s);
      group(odd);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) s.v[r][0] = _mm512_add_epi32(s.v[r][0], odd.v[r][0]);
  }
  while (data < end) group(s);
}

template <int NB, bool Quads, bool Fetch, class Off, End E>
void block_with(const Weights& a, const Input& x, const Output& out, int64_t b, int64_t begin, int64_t end) {
  Finish<NB, Quads, E> finish(a, x, out, b, end);
  const uint8_t* data = x.data + block_start(x.layout, a.cols, b);
  Ahead ahead{x.ahead, x.ahead_bytes / (a.groups.starts[end] - a.groups.starts[begin] + 1)};
  for (int64_t row = begin; row < end; ++row) {
    Sums<NB> s;
    finish.expect(row);
    finish.start(row, s);
    product<NB, Quads, Fetch, Off>(a.groups, row, data, ahead, s);
    finish.tile(row, s);
    finish.flush(row);
  }
}

template <int NB, bool Quads, bool Fetch, class Off>
void block(const Weights& a, const Input& x, const Output& out, int64_t b, int64_t begin, int64_t end) {
  const End how = end_of(x, out);
  const auto run = how == End::bytes    ? block_with<NB, Quads, Fetch, Off, End::bytes>
                   : how == End::floats ? block_with<NB, Quads, Fetch, Off, End::floats>
                                        : block_with<NB, Quads, Fetch, Off, End::any>;
  run(a, x, out, b, begin, end);
}

template <bool Quads, class Off>
void all_blocks(const Weights& a, const Input& x, const Output& out, const Range& range) {
  for (int64_t b = range.token_begin; b < range.token_end; ++b) {
    const int64_t width = width_of(x.tokens, b);
    const auto run = width == 16   ? block<16, Quads, false, Off>
                     : width == 32 ? block<32, Quads, false, Off>
                     : x.ahead     ? block<64, Quads, true, Off>
                                   : block<64, Quads, false, Off>;
    run(a, x, out, b, range.row_begin, range.row_end);
  }
}

void blocks(const Weights& a, const Input& x, const Output& out, const Range& range) {
  const bool wide = a.groups.wide;
  const auto run = a.block == 4 ? (wide ? all_blocks<true, uint32_t> : all_blocks<true, uint16_t>)
                                : (wide ? all_blocks<false, uint32_t> : all_blocks<false, uint16_t>);
  run(a, x, out, range);
}

// ---- few tokens -----------------------------------------------------------------------------------------------------

// In lane r the four parts of row r's sum, of one block row and one token.
INLINE __m512i window_sums(const Windows& w, int64_t row, const uint8_t* x) {
  __m512i even = _mm512_setzero_si512(), odd = even;
  const auto step = [&](int64_t g, __m512i sum) __attribute__((always_inline)) {
    const __m512i index = _mm512_broadcast_i32x4(load16(w.index + 16 * g));
    const uint8_t* from = x + w.base[g];
    return _mm512_dpbusd_epi32(sum, _mm512_permutex2var_epi8(load(from), index, load(from + 64)),
                               _mm512_loadu_si512(w.data + 64 * g));
  };
  int64_t g = w.starts[row];
  const int64_t end = w.starts[row + 1];
  for (; g + 2 <= end; g += 2) {
    even = step(g, even);
    odd = step(g + 1, odd);
  }
  return _mm512_add_epi32(even, g < end ? step(g, odd) : odd);
}

// Rows 0 .. 15 of four block rows.
INLINE __m512i rows_of(const __m512i (&s)[4]) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(turn, all);
}

void windows(const Weights& a, const Input& x, const Output& out, const Range& range) {
  for (int64_t row = range.row_begin; row < range.row_end; row += 4) {
    const int64_t first = 4 * row, count = std::min<int64_t>(16, a.rows - first);
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    const __m512i zero = _mm512_mullo_epi32(_mm512_loadu_si512(a.sums + first), _mm512_set1_epi32(x.zero));
    const __m512 bias = out.bias ? _mm512_maskz_loadu_ps(mask, out.bias + first) : _mm512_setzero_ps();
    for (int64_t token = range.token_begin; token < range.token_end; ++token) {
      __m512i sums[4];
      for (int64_t r = 0; r < 4; ++r)
        sums[r] = row + r < range.row_end ? window_sums(a.windows, row + r, x.data + token * x.stride)
                                          : _mm512_setzero_si512();
      __m512 v = _mm512_cvtepi32_ps(_mm512_sub_epi32(rows_of(sums), zero));
      __m512 scale = _mm512_loadu_ps(a.scale + first);
      if (x.token_scale) v = _mm512_mul_ps(v, set(x.token_scale[token]));
      else scale = _mm512_mul_ps(scale, set(x.scale));
      v = _mm512_fmadd_ps(v, scale, bias);
      if (!out.residual && out.type != Type::u8 && out.type != Type::s8) {
        __m512 one[1] = {v};
        apply_to(out.function, one);
        v = one[0];
      }
      Finish<16, false>::write_row(out, token, first, mask, v);
    }
  }
}

}  // namespace
}  // namespace gossamer::bsr

#include "avx512_quantise.h"

namespace gossamer::bsr {
const Kernels avx512_kernels{blocks, windows, quantise};
}  // namespace gossamer::bsr
