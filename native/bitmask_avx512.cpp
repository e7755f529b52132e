// AVX-512 with VBMI2: one register a step, compressed and expanded by the hardware.
// Compress targets a register first: with a memory destination it is microcode on Zen 4.
#include <immintrin.h>

#include <cstdint>

namespace gossamer {
namespace {

uint64_t nonzero(__m512i x, uint8_t keep) { return _mm512_test_epi8_mask(x, _mm512_set1_epi8(keep)); }
uint64_t nonzero(__m512i x, uint16_t keep) { return _mm512_test_epi16_mask(x, _mm512_set1_epi16(keep)); }
uint64_t nonzero(__m512i x, uint32_t keep) { return _mm512_test_epi32_mask(x, _mm512_set1_epi32(keep)); }
uint64_t nonzero(__m512i x, uint64_t keep) { return _mm512_test_epi64_mask(x, _mm512_set1_epi64(keep)); }

// The last argument only names the element type.
__m512i compressed(__m512i x, uint64_t bits, uint8_t) { return _mm512_maskz_compress_epi8(bits, x); }
__m512i compressed(__m512i x, uint64_t bits, uint16_t) { return _mm512_maskz_compress_epi16(bits, x); }
__m512i compressed(__m512i x, uint64_t bits, uint32_t) { return _mm512_maskz_compress_epi32(bits, x); }
__m512i compressed(__m512i x, uint64_t bits, uint64_t) { return _mm512_maskz_compress_epi64(bits, x); }

__m512i expanded(__m512i x, uint64_t bits, uint8_t) { return _mm512_maskz_expand_epi8(bits, x); }
__m512i expanded(__m512i x, uint64_t bits, uint16_t) { return _mm512_maskz_expand_epi16(bits, x); }
__m512i expanded(__m512i x, uint64_t bits, uint32_t) { return _mm512_maskz_expand_epi32(bits, x); }
__m512i expanded(__m512i x, uint64_t bits, uint64_t) { return _mm512_maskz_expand_epi64(bits, x); }

template <class T>
struct Block {
  static constexpr int lanes = 64 / sizeof(T);

  static uint64_t nonzero(const T* src, T significant) {
    return gossamer::nonzero(_mm512_loadu_si512(src), significant);
  }

  static void compress(const T* src, uint64_t bits, T* dst) {
    _mm512_storeu_si512(dst, compressed(_mm512_loadu_si512(src), bits, T{}));
  }

  static void expand(const T* values, uint64_t bits, T* dst) {
    _mm512_storeu_si512(dst, expanded(_mm512_loadu_si512(values), bits, T{}));
  }
};

}  // namespace
}  // namespace gossamer

#include "bitmask_rows.h"

const gossamer::BitmaskRow gossamer::bitmask_avx512 = gossamer::bitmask_rows;
