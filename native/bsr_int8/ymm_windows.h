// A few tokens where there is no AVX-512, included by one file per instruction set that defines multiply_lanes().
#pragma once

#include "ymm_quantise.h"

namespace gossamer::bsr {
namespace {

// The 16 channels of a group out of the 128 from `from` on, in both lanes. A byte shuffle looks up 16 of them: it gives
// zero for an index whose highest bit is set, as `index` (made by look_up) has it for all other channels.
INLINE __m256i channels_of(const uint8_t* from, const __m256i (&index)[4]) {
  __m256i found[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    found[i] = _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * i)), index[i]);
  const __m256i all = _mm256_or_si256(_mm256_or_si256(found[0], found[1]), _mm256_or_si256(found[2], found[3]));
  return _mm256_or_si256(all, _mm256_permute2x128_si256(all, all, 1));
}

// Lane l of vector i looks into channels 32 i + 16 l .. + 15.
INLINE void look_up(const uint8_t* index, __m256i (&out)[4]) {
  const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i from = _mm256_set_m128i(_mm_set1_epi8(static_cast<char>(32 * i + 16)),
                                          _mm_set1_epi8(static_cast<char>(32 * i)));
    out[i] = _mm256_adds_epu8(_mm256_xor_si256(all, from), _mm256_set1_epi8(0x70));
  }
}

// Sums of a block row and N tokens from x on, to rows `at` .. + 3 of eight; rows 2 p and 2 p + 1 in the two lanes.
template <int N>
INLINE void window_sums(const Windows& w, int64_t row, const uint8_t* x, int64_t stride, int32_t (*out)[8], int at) {
  __m256i sums[N][2];
  for (auto& s : sums) s[0] = s[1] = _mm256_setzero_si256();
  for (int64_t g = w.starts[row]; g < w.starts[row + 1]; ++g) {
    __m256i index[4], in[N];
    look_up(w.index + 16 * g, index);
#pragma GCC unroll 2
    for (int t = 0; t < N; ++t) in[t] = channels_of(x + t * stride + w.base[g], index);
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.data + 64 * g + 32 * p));
#pragma GCC unroll 2
      for (int t = 0; t < N; ++t) sums[t][p] = multiply_lanes(sums[t][p], in[t], weights);
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < N; ++t) {
    const __m256i twos = _mm256_hadd_epi32(sums[t][0], sums[t][1]), all = _mm256_hadd_epi32(twos, twos);
    const __m128i even = _mm256_castsi256_si128(all), odd = _mm256_extracti128_si256(all, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out[t] + at), _mm_unpacklo_epi32(even, odd));
  }
}

template <int N>
INLINE void window_rows(const Weights& a, const Input& x, const Range& range, int64_t token, const Finish& finish) {
  const uint8_t* from = x.data + token * x.stride;
  for (int64_t row = range.row_begin; row < range.row_end; row += 2) {
    alignas(32) int32_t sums[N][8] = {};
    const bool both = row + 1 < range.row_end;
    window_sums<N>(a.windows, row, from, x.stride, sums, 0);
    if (both) window_sums<N>(a.windows, row + 1, from, x.stride, sums, 4);
    for (int t = 0; t < N; ++t) finish.row_of(token + t, row, both, sums[t]);
  }
}

void windows(const Weights& a, const Input& x, const Output& out, const Range& range) {
  for (int64_t token = range.token_begin; token < range.token_end; token += 2) {
    const Finish finish(a, x, out, token);
    if (token + 1 < range.token_end) window_rows<2>(a, x, range, token, finish);
    else window_rows<1>(a, x, range, token, finish);
  }
}

}  // namespace
}  // namespace gossamer::bsr
