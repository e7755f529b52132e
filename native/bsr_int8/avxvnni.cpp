// AVX-VNNI: vpdpbusd without AVX-512.
#include <immintrin.h>

namespace gossamer::bsr {
namespace {

inline __m128i dot(__m128i sum, __m128i in, __m128i w) { return _mm_dpbusd_avx_epi32(sum, in, w); }
inline __m256i dot(__m256i sum, __m256i in, __m256i w) { return _mm256_dpbusd_avx_epi32(sum, in, w); }

template <class V>
inline __attribute__((always_inline)) void multiply_bytes(V (&sums)[2][4], const V (&in)[4], V w0, V w1) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    sums[0][i] = dot(sums[0][i], in[i], w0);
    sums[1][i] = dot(sums[1][i], in[i], w1);
  }
}

inline __m256i multiply_lanes(__m256i sum, __m256i in, __m256i w) { return dot(sum, in, w); }

}  // namespace
}  // namespace gossamer::bsr

#include "ymm.h"

namespace gossamer::bsr {
const Kernels avxvnni_kernels{blocks, windows, quantise_plain};
}  // namespace gossamer::bsr
