// AVX-VNNI's products in plain code, for CPUs that have none: what avxvnni.cpp does with them can be checked on any.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

template <class V>
inline V emulated_dpbusd(V sum, V in, V weights) {
  int32_t s[sizeof(V) / 4];
  uint8_t x[sizeof(V)];
  int8_t w[sizeof(V)];
  std::memcpy(s, &sum, sizeof(V));
  std::memcpy(x, &in, sizeof(V));
  std::memcpy(w, &weights, sizeof(V));
  for (size_t i = 0; i < sizeof(V); ++i) s[i / 4] += x[i] * w[i];
  std::memcpy(&sum, s, sizeof(V));
  return sum;
}

#define _mm_dpbusd_avx_epi32(sum, in, weights) emulated_dpbusd<__m128i>(sum, in, weights)
#define _mm256_dpbusd_avx_epi32(sum, in, weights) emulated_dpbusd<__m256i>(sum, in, weights)
