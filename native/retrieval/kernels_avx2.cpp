#include <immintrin.h>

#include <algorithm>
#include <cstdlib>

#include "kernels.h"

namespace gossamer::retrieval {
namespace {

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

int16_t share(int16_t impact, int16_t weight) { return static_cast<int16_t>((impact * weight + (1 << 14)) >> 15); }

uint32_t scatter(int16_t* acc, const uint32_t* postings, uint32_t count, int16_t weight, int least,
                 const uint32_t* next, const uint32_t* next_end) {
  for (; next < next_end; next += 16) __builtin_prefetch(next);
  const __m256i w = _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(static_cast<uint16_t>(weight)) << 16));
  uint32_t i = 0;
  for (; i + 8 <= count; i += 8) {
    if (i % 16 == 0 && std::abs(static_cast<int>(postings[i]) >> 16) < least) return i;
    alignas(32) int16_t tile[16];
    store(tile, _mm256_mulhrs_epi16(load(postings + i), w));
    const uint16_t* places = reinterpret_cast<const uint16_t*>(postings + i);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) acc[places[2 * j]] = static_cast<int16_t>(acc[places[2 * j]] + tile[2 * j + 1]);
  }
  for (; i < count; ++i) {
    const int16_t impact = static_cast<int16_t>(postings[i] >> 16);
    if (i % 16 == 0 && std::abs(int{impact}) < least) return i;
    int16_t& sum = acc[postings[i] & 0xffff];
    sum = static_cast<int16_t>(sum + share(impact, weight));
  }
  return count;
}

void dense(int16_t* acc, const int16_t* row, uint32_t docs, int16_t weight) {
  const __m256i w = _mm256_set1_epi16(weight);
  for (uint32_t i = 0; i < docs; i += 16)
    store(acc + i, _mm256_add_epi16(load(acc + i), _mm256_mulhrs_epi16(load(row + i), w)));
}

uint32_t collect(const int16_t* acc, uint32_t docs, int16_t least, uint16_t* places) {
  // There is no >=: acc > least - 1, and everything where least is the smallest number.
  const __m256i bar = _mm256_set1_epi16(static_cast<int16_t>(least - (least != -32768)));
  uint32_t n = 0;
  for (uint32_t i = 0; i < docs; i += 16) {
    const __m256i above = _mm256_cmpgt_epi16(load(acc + i), bar);
    if (least != -32768 && _mm256_testz_si256(above, above)) continue;
    for (uint32_t j = i; j < i + 16; ++j)
      if (acc[j] >= least) places[n++] = static_cast<uint16_t>(j);
  }
  return n;
}

void maxima(const int16_t* acc, uint32_t docs, int16_t* out) {
  const __m256i least = _mm256_set1_epi16(-32768);
  for (uint32_t g = 0; g < groups; g += 16) {
    __m256i best = least;
    for (uint32_t i = g; i < docs; i += groups) best = _mm256_max_epi16(best, load(acc + i));
    store(out + g, best);
  }
}

void mask(int16_t* acc, uint32_t docs, const uint32_t* bits) {
  for (uint32_t i = 0; i < docs; i += 32) {
    if (bits[i / 32] == ~0u) continue;
    for (uint32_t j = 0; j < 32; ++j)
      if ((bits[i / 32] >> j & 1) == 0) acc[i + j] = -32768;
  }
}

void score(const float* weights, const uint32_t* rows, const uint32_t* data, uint32_t docs, float* out) {
  for (uint32_t doc = 0; doc < docs; ++doc) {
    const uint32_t length = (rows[doc + 1] - rows[doc]) * 2 / 3;
    const auto* columns = reinterpret_cast<const uint16_t*>(data + rows[doc]);
    const auto* values = reinterpret_cast<const float*>(data + rows[doc + 1] - length);
    __m256 sums = _mm256_setzero_ps();
    uint32_t i = 0;
    for (; i + 8 <= length; i += 8) {
      const __m256i at = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + i)));
      sums = _mm256_add_ps(sums, _mm256_mul_ps(_mm256_i32gather_ps(weights, at, 4), _mm256_loadu_ps(values + i)));
    }
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, sums);
    float sum = 0;
    for (float lane : lanes) sum += lane;
    for (; i < length; ++i) sum += weights[columns[i]] * values[i];
    out[doc] = sum;
  }
}

}  // namespace

const Kernels kernels_avx2 = {scatter, dense, collect, maxima, mask, score};

}  // namespace gossamer::retrieval
