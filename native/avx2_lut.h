// AVX2 can neither compress nor expand: eight elements a step, moved by a shuffle with the indices of a mask byte.
// Anonymous: one copy for each translation unit, none of them for a CPU without AVX2.
#include <cstdint>

namespace gossamer {
namespace {

struct Lut {
  alignas(64) uint8_t compress[256][8];  // where the i-th kept lane comes from
  alignas(64) uint8_t expand[256][8];    // which value lane i takes; 0x80 = zero, as pshufb has it
};

constexpr Lut make_lut() {
  Lut lut{};
  for (int m = 0; m < 256; ++m)
    for (int i = 0, n = 0; i < 8; ++i) {
      lut.expand[m][i] = 0x80;
      if ((m >> i & 1) == 0) continue;
      lut.compress[m][n] = static_cast<uint8_t>(i);
      lut.expand[m][i] = static_cast<uint8_t>(n++);
    }
  return lut;
}

constexpr Lut lut = make_lut();

inline __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// shuffled: lane i = src[index[i]], or 0 where index[i] has its top bit set, for eight elements of each width.
inline __m128i shuffled16(__m128i src, __m128i i) {
  const __m128i twice = _mm_adds_epu8(_mm_unpacklo_epi8(i, i), _mm_unpacklo_epi8(i, i));  // saturates: 0x80 stays high
  return _mm_shuffle_epi8(src, _mm_adds_epu8(twice, _mm_set1_epi16(0x0100)));
}

inline __m256i shuffled32(__m256i src, __m128i index) {
  const __m256i i = _mm256_cvtepi8_epi32(index);
  return _mm256_andnot_si256(_mm256_srai_epi32(i, 31), _mm256_permutevar8x32_epi32(src, i));
}

}  // namespace
}  // namespace gossamer
