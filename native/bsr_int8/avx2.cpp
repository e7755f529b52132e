// AVX2: bytes are widened to 16 bits, because vpmaddubsw would saturate. Even and odd bytes apart, so no shuffle.
#include <immintrin.h>

namespace gossamer::bsr {
namespace {

inline __m128i madd(__m128i a, __m128i b) { return _mm_madd_epi16(a, b); }
inline __m256i madd(__m256i a, __m256i b) { return _mm256_madd_epi16(a, b); }
inline __m128i add(__m128i a, __m128i b) { return _mm_add_epi32(a, b); }
inline __m256i add(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
inline __m128i odd_bytes(__m128i a) { return _mm_srli_epi16(a, 8); }
inline __m256i odd_bytes(__m256i a) { return _mm256_srli_epi16(a, 8); }
inline __m128i even_bytes(__m128i a) { return _mm_and_si128(a, _mm_set1_epi16(255)); }
inline __m256i even_bytes(__m256i a) { return _mm256_and_si256(a, _mm256_set1_epi16(255)); }
inline __m128i odd_weights(__m128i a) { return _mm_srai_epi16(a, 8); }
inline __m256i odd_weights(__m256i a) { return _mm256_srai_epi16(a, 8); }
inline __m128i even_weights(__m128i a) { return _mm_srai_epi16(_mm_slli_epi16(a, 8), 8); }
inline __m256i even_weights(__m256i a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }

template <class V>
inline __attribute__((always_inline)) void multiply_bytes(V (&sums)[2][4], const V (&in)[4], V w0, V w1) {
  const V even0 = even_weights(w0), odd0 = odd_weights(w0), even1 = even_weights(w1), odd1 = odd_weights(w1);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const V even = even_bytes(in[i]), odd = odd_bytes(in[i]);
    sums[0][i] = add(sums[0][i], add(madd(even, even0), madd(odd, odd0)));
    sums[1][i] = add(sums[1][i], add(madd(even, even1), madd(odd, odd1)));
  }
}

inline __m256i multiply_lanes(__m256i sum, __m256i in, __m256i w) {
  return add(sum, add(madd(even_bytes(in), even_weights(w)), madd(odd_bytes(in), odd_weights(w))));
}

}  // namespace
}  // namespace gossamer::bsr

#include "ymm.h"

namespace gossamer::bsr {
const Kernels avx2_kernels{blocks, windows, quantise_plain};
}  // namespace gossamer::bsr
