// AVX2 with FMA: eight columns a register, expanded by a shuffle.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "avx2_lut.h"

namespace gossamer {
namespace {

using Vec = __m256;
constexpr int lanes = 8, group = 4, most_rows = 1;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec broadcast(const float* p) { return _mm256_set1_ps(*p); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

inline float sum(Vec a) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

template <class T>
void copy_first(const T* p, int64_t n, T* out) {
  if (n > 0) std::memcpy(out, p, static_cast<size_t>(n < 8 ? n : 8) * sizeof(T));
}

template <class T>
struct Block;

template <>
struct Block<uint32_t> {
  using Raw = __m256i;
  static constexpr int cols = 8, vecs = 1;
  static Raw read(const uint32_t* p) { return load32(p); }

  static Raw read(const uint32_t* p, int64_t n) {
    uint32_t copy[cols] = {};
    copy_first(p, n, copy);
    return load32(copy);
  }

  static Raw expand(Raw x, uint64_t bits) { return shuffled32(x, load8(lut.expand[bits])); }
  static void widen(Raw x, Vec* w) { w[0] = _mm256_castsi256_ps(x); }
  static constexpr int column(int i) { return i; }
};

// Where the bytes of eight bfloat16 weights go that a mask byte spreads, as float32: 0x80 = zero, as pshufb has it.
struct Spread {
  alignas(64) uint8_t from[256][32];
};

constexpr Spread make_spread() {
  Spread spread{};
  for (int m = 0; m < 256; ++m)
    for (int i = 0; i < 8; ++i)
      for (int b = 0; b < 4; ++b) {
        const uint8_t n = lut.expand[m][i];
        spread.from[m][4 * i + b] = static_cast<uint8_t>(b < 2 || n == 0x80 ? 0x80 : 2 * n + b - 2);
      }
  return spread;
}

constexpr Spread spread = make_spread();

template <>
struct Block<uint16_t> {
  using Raw = __m128i;
  static constexpr int cols = 8, vecs = 1;
  static Raw read(const uint16_t* p) { return load16(p); }

  static Raw read(const uint16_t* p, int64_t n) {
    uint16_t copy[cols] = {};
    copy_first(p, n, copy);
    return load16(copy);
  }

  // Float32 already: both lanes take their four out of all eight.
  static Vec expand(Raw x, uint64_t bits) {
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(x), load32(spread.from[bits])));
  }

  static void widen(Vec x, Vec* w) { w[0] = x; }
  static void widen(Raw x, Vec* w) { w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  static constexpr int column(int i) { return i; }
};

}  // namespace
}  // namespace gossamer

#include "many_plain.h"
#include "linear_rows.h"

const gossamer::LinearRows gossamer::linear_avx2 = gossamer::linear_rows;
