// AVX-VNNI: vpdpbusd without AVX-512. Two rows by four vectors at a time, because there are only 16 registers.
#include "ymm_quantise.h"

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
  static INLINE V dot(V sum, V in, V w) { return _mm_dpbusd_avx_epi32(sum, in, w); }
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
  static INLINE V dot(V sum, V in, V w) { return _mm256_dpbusd_avx_epi32(sum, in, w); }
  static INLINE void store(int32_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<V*>(p), v); }
};

// Sums of rows 2 p and 2 p + 1 of a block row and of 16 * lanes tokens of a block that is `width` wide: rows `to` and
// `to` + 1 of a tile for each 16 tokens.
template <class T, bool Quads, class Off>
INLINE void pair(const Groups& a, int64_t row, int p, const uint8_t* x, int64_t width, Tile* tiles, int to) {
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
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[r][i] = T::dot(sums[r][i], in[i], T::weight(w[r]));
  }
  // In lane l of vector i: tokens 16 l + 4 i .. + 3, or for quads as they come.
  for (int r = 0; r < 2; ++r)
    for (int i = 0; i < 4; ++i) {
      int32_t lanes[4 * T::lanes];
      T::store(lanes, sums[r][i]);
      for (int l = 0; l < T::lanes; ++l) {
        const int token = Quads ? 4 * (T::lanes * i + l) : 16 * l + 4 * i;
        std::memcpy(tiles[token / tile_tokens].sums[to + r] + token % tile_tokens, lanes + 4 * l, 16);
      }
    }
}

template <class T, bool Quads, class Off>
void part(const Weights& a, const Input& x, const Output& out, const Range& range, int64_t token, int64_t width,
          const uint8_t* data) {
  Finish first(a, x, out, token), second(a, x, out, std::min(token + tile_tokens, x.tokens));
  for (int64_t row = range.row_begin; row < range.row_end; row += 2) {
    Tile tiles[T::lanes];
    const int64_t many = std::min<int64_t>(2, range.row_end - row);
    for (int i = 0; i < 2 * many; ++i) pair<T, Quads, Off>(a.groups, row + i / 2, i % 2, data, width, tiles, 2 * i);
    first(row, many == 2, tiles[0]);
    if (T::lanes == 2 && token + tile_tokens < x.tokens) second(row, many == 2, tiles[T::lanes - 1]);
  }
}

template <bool Quads, class Off>
void all_blocks(const Weights& a, const Input& x, const Output& out, const Range& range) {
  for (int64_t b = range.token_begin; b < range.token_end; ++b) {
    const int64_t width = width_of(x.tokens, b), token = b * block_tokens;
    const uint8_t* data = x.data + block_start(x.layout, a.cols, b);
    if (width == 16) part<Half, Quads, Off>(a, x, out, range, token, width, data);
    else
      for (int64_t t = 0; t < width && token + t < x.tokens; t += 32)
        part<Full, Quads, Off>(a, x, out, range, token + t, width, data + (Quads ? 4 : 1) * t);
  }
}

void blocks(const Weights& a, const Input& x, const Output& out, const Range& range) {
  const bool wide = a.groups.wide;
  const auto run = a.block == 4 ? (wide ? all_blocks<true, uint32_t> : all_blocks<true, uint16_t>)
                                : (wide ? all_blocks<false, uint32_t> : all_blocks<false, uint16_t>);
  run(a, x, out, range);
}

INLINE __m256i multiply_lanes(__m256i sum, __m256i in, __m256i w) { return _mm256_dpbusd_avx_epi32(sum, in, w); }

}  // namespace
}  // namespace gossamer::bsr

#include "ymm_windows.h"

namespace gossamer::bsr {
const Kernels avxvnni_kernels{blocks, windows, quantise};
}  // namespace gossamer::bsr
