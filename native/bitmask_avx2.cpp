// AVX2 has no compress: eight elements a step, moved by a byte shuffle whose indices come from a table per mask byte.
#include <immintrin.h>

#include <cstdint>

#include "avx2_lut.h"

namespace gossamer {
namespace {

void store8(void* p, __m128i x) { _mm_storel_epi64(static_cast<__m128i*>(p), x); }
void store16(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
void store32(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

void shuffle(const uint8_t* src, const uint8_t* index, uint8_t* dst) {
  store8(dst, _mm_shuffle_epi8(load8(src), load8(index)));
}

void shuffle(const uint16_t* src, const uint8_t* index, uint16_t* dst) {
  store16(dst, shuffled16(load16(src), load8(index)));
}

void shuffle(const uint32_t* src, const uint8_t* index, uint32_t* dst) {
  store32(dst, shuffled32(load32(src), load8(index)));
}

// Four 64-bit elements are eight 32-bit halves: each mask bit twice.
constexpr uint8_t doubled[16] = {0x00, 0x03, 0x0c, 0x0f, 0x30, 0x33, 0x3c, 0x3f,
                                 0xc0, 0xc3, 0xcc, 0xcf, 0xf0, 0xf3, 0xfc, 0xff};

template <class T>
struct Block {
  static constexpr int lanes = 8;
  static uint64_t nonzero(const T* src, T significant);

  static void compress(const T* src, uint64_t bits, T* dst) { shuffle(src, lut.compress[bits], dst); }
  static void expand(const T* values, uint64_t bits, T* dst) { shuffle(values, lut.expand[bits], dst); }
};

template <>
uint64_t Block<uint8_t>::nonzero(const uint8_t* src, uint8_t significant) {
  const __m128i x = _mm_and_si128(load8(src), _mm_set1_epi8(static_cast<char>(significant)));
  return ~_mm_movemask_epi8(_mm_cmpeq_epi8(x, _mm_setzero_si128())) & 0xff;
}

template <>
uint64_t Block<uint16_t>::nonzero(const uint16_t* src, uint16_t significant) {
  const __m128i x = _mm_and_si128(load16(src), _mm_set1_epi16(static_cast<short>(significant)));
  const __m128i zero = _mm_cmpeq_epi16(x, _mm_setzero_si128());
  return ~_mm_movemask_epi8(_mm_packs_epi16(zero, zero)) & 0xff;
}

template <>
uint64_t Block<uint32_t>::nonzero(const uint32_t* src, uint32_t significant) {
  const __m256i x = _mm256_and_si256(load32(src), _mm256_set1_epi32(static_cast<int>(significant)));
  return ~_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(x, _mm256_setzero_si256()))) & 0xff;
}

template <>
struct Block<uint64_t> {
  static constexpr int lanes = 8;

  static uint64_t half(const uint64_t* src, __m256i keep) {
    const __m256i zero = _mm256_cmpeq_epi64(_mm256_and_si256(load32(src), keep), _mm256_setzero_si256());
    return ~_mm256_movemask_pd(_mm256_castsi256_pd(zero)) & 0xf;
  }

  static uint64_t nonzero(const uint64_t* src, uint64_t significant) {
    const __m256i keep = _mm256_set1_epi64x(static_cast<long long>(significant));
    return half(src, keep) | half(src + 4, keep) << 4;
  }

  static void move(const uint64_t* src, const uint8_t* index, uint64_t* dst) {
    shuffle(reinterpret_cast<const uint32_t*>(src), index, reinterpret_cast<uint32_t*>(dst));
  }

  // The second half lands on the rubbish that the first left behind its last value.
  static void compress(const uint64_t* src, uint64_t bits, uint64_t* dst) {
    move(src, lut.compress[doubled[bits & 0xf]], dst);
    move(src + 4, lut.compress[doubled[bits >> 4]], dst + __builtin_popcountll(bits & 0xf));
  }

  static void expand(const uint64_t* values, uint64_t bits, uint64_t* dst) {
    move(values, lut.expand[doubled[bits & 0xf]], dst);
    move(values + __builtin_popcountll(bits & 0xf), lut.expand[doubled[bits >> 4]], dst + 4);
  }
};

}  // namespace
}  // namespace gossamer

#include "bitmask_rows.h"

const gossamer::BitmaskRow gossamer::bitmask_avx2 = gossamer::bitmask_rows;
