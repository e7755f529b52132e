// AVX-512 with VBMI2: a step of 64 columns is four registers of float32.
// bfloat16 is widened by a shift (even columns) and a mask (odd ones), so x comes with even and odd columns apart.
#include <immintrin.h>

#include <cstdint>

#include "avx512_transpose.h"

namespace gossamer {
namespace {

using Vec = __m512;
constexpr int lanes = 16, group = 8, most_rows = 4;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }

// Halves of two registers are folded at once, in the order of _mm512_reduce_add_ps.
inline void sum(Vec a, Vec b, Vec c, Vec d, float* to) {
  const auto fold = [](Vec x, Vec y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  };
  const Vec ab = fold(a, b), cd = fold(c, d);
  const Vec abcd = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const Vec pairs = _mm512_add_ps(abcd, _mm512_permute_ps(abcd, 0x4e));
  const Vec all = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xb1));
  _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, all)));
}

inline uint32_t first(int64_t n) { return n <= 0 ? 0 : ~uint32_t{0} >> (n >= 32 ? 0 : 32 - n); }

template <class T>
struct Block;

template <>
struct Block<uint32_t> {
  using Raw = __m512i;
  static constexpr int cols = 16, vecs = 1;
  static Raw read(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static Raw read(const uint32_t* p, int64_t n) { return _mm512_maskz_loadu_epi32(first(n), p); }
  static Raw expand(Raw x, uint64_t bits) { return _mm512_maskz_expand_epi32(bits, x); }
  static void widen(Raw x, Vec* w) { w[0] = _mm512_castsi512_ps(x); }
  static constexpr int column(int i) { return i; }
};

template <>
struct Block<uint16_t> {
  using Raw = __m512i;
  static constexpr int cols = 32, vecs = 2;
  static Raw read(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static Raw read(const uint16_t* p, int64_t n) { return _mm512_maskz_loadu_epi16(first(n), p); }
  static Raw expand(Raw x, uint64_t bits) { return _mm512_maskz_expand_epi16(bits, x); }

  static void widen(Raw x, Vec* w) {
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    w[1] = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }

  static constexpr int column(int i) { return i % 16 * 2 + i / 16; }
};

inline void turn(const float (*square)[side], int cols, float* to, int64_t stride) {
  __m512i v[side];
  _Pragma("GCC unroll 16")
  for (int i = 0; i < side; ++i) v[i] = _mm512_load_si512(square[i]);
  transpose(v);
  _Pragma("GCC unroll 16")
  for (int i = 0; i < side; ++i)
    if (i < cols) _mm512_storeu_si512(to + i * stride, v[i]);
}

inline __m512i all16(int value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }

inline int64_t places(uint64_t bits, uint16_t first, uint16_t each, uint16_t* out) {
  alignas(64) uint16_t lane[32];
  for (uint16_t i = 0; i < 32; ++i) lane[i] = i;
  const uint32_t low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
  const __m512i here = _mm512_add_epi16(all16(first), _mm512_mullo_epi16(_mm512_load_si512(lane), all16(each)));
  const __m512i next = _mm512_add_epi16(here, all16(32 * each));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(low, here));
  _mm512_storeu_si512(out + __builtin_popcount(low), _mm512_maskz_compress_epi16(high, next));
  return __builtin_popcountll(bits);
}

}  // namespace
}  // namespace gossamer

#include "linear_rows.h"

const gossamer::LinearRows gossamer::linear_avx512 = gossamer::linear_rows;
