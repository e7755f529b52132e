#include <immintrin.h>

#include <algorithm>
#include <cstdlib>

#include "kernels.h"

namespace gossamer::retrieval {
namespace {

__m512i load(const void* p) { return _mm512_loadu_si512(p); }

int magnitude(uint32_t posting) { return std::abs(static_cast<int16_t>(posting >> 16)); }

void add(int16_t* acc, uint16_t place, int share) { acc[place] = static_cast<int16_t>(acc[place] + share); }

// Four postings whose shares are the odd lanes.
void add_four(int16_t* acc, const uint32_t* postings, __m128i shares) {
  add(acc, static_cast<uint16_t>(postings[0]), _mm_extract_epi16(shares, 1));
  add(acc, static_cast<uint16_t>(postings[1]), _mm_extract_epi16(shares, 3));
  add(acc, static_cast<uint16_t>(postings[2]), _mm_extract_epi16(shares, 5));
  add(acc, static_cast<uint16_t>(postings[3]), _mm_extract_epi16(shares, 7));
}

// Impacts are the odd 16-bit lanes: the even ones are multiplied by zero. Places are unique within a list, but the adds
// stay scalar: they beat gather and scatter instructions, and shares taken out of 256-bit registers beat those read
// back from memory.
void add_eight(int16_t* acc, const uint32_t* postings, __m256i loaded, __m256i w) {
  const __m256i shares = _mm256_mulhrs_epi16(loaded, w);
  add_four(acc, postings, _mm256_castsi256_si128(shares));
  add_four(acc, postings + 4, _mm256_extracti128_si256(shares, 1));
}

__m256i load_eight(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

template <bool cut>
uint32_t scatter_until(int16_t* acc, const uint32_t* postings, uint32_t count, __m256i w, int least,
                       const uint32_t*& next, const uint32_t* next_end) {
  uint32_t i = 0;
  for (; i + 16 <= count; i += 16, postings += 16) {
    if (cut && magnitude(*postings) < least) return i;
    if (next < next_end) __builtin_prefetch(next);
    next += 16;
    add_eight(acc, postings, load_eight(postings), w);
    add_eight(acc, postings + 8, load_eight(postings + 8), w);
  }
  uint32_t left = count - i;
  if (left == 0 || (cut && magnitude(*postings) < least)) return i;
  if (left >= 8) {
    add_eight(acc, postings, load_eight(postings), w);
    left -= 8, postings += 8;
  }
  const __m256i some = _mm256_maskz_loadu_epi32(static_cast<__mmask8>((1u << left) - 1), postings);
  alignas(32) int16_t shares[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(shares), _mm256_mulhrs_epi16(some, w));
  for (uint32_t j = 0; j < left; ++j) add(acc, static_cast<uint16_t>(postings[j]), shares[2 * j + 1]);
  return count;
}

uint32_t scatter(int16_t* acc, const uint32_t* postings, uint32_t count, int16_t weight, int least,
                 const uint32_t* next, const uint32_t* next_end) {
  const __m256i w = _mm256_set1_epi32(static_cast<int>(static_cast<uint32_t>(static_cast<uint16_t>(weight)) << 16));
  const uint32_t read = least > 0 ? scatter_until<true>(acc, postings, count, w, least, next, next_end)
                                  : scatter_until<false>(acc, postings, count, w, 0, next, next_end);
  for (; next < next_end; next += 16) __builtin_prefetch(next);
  return read;
}

void dense(int16_t* acc, const int16_t* row, uint32_t docs, int16_t weight) {
  const __m512i w = _mm512_set1_epi16(weight);
  for (uint32_t i = 0; i < docs; i += 32)
    _mm512_storeu_si512(acc + i, _mm512_add_epi16(load(acc + i), _mm512_mulhrs_epi16(load(row + i), w)));
}

uint32_t collect(const int16_t* acc, uint32_t docs, int16_t least, uint16_t* places) {
  const __m512i bar = _mm512_set1_epi16(least);
  uint32_t n = 0, i = 0;
  const auto some = [&](uint32_t end) {
    for (; i < end; i += 32)
      for (uint32_t hits = _mm512_cmpge_epi16_mask(load(acc + i), bar); hits; hits &= hits - 1)
        places[n++] = static_cast<uint16_t>(i + static_cast<uint32_t>(__builtin_ctz(hits)));
  };
  while (i + 256 <= docs) {
    __m512i best = _mm512_max_epi16(load(acc + i), load(acc + i + 32));
    for (uint32_t j = 64; j < 256; j += 64)
      best = _mm512_max_epi16(best, _mm512_max_epi16(load(acc + i + j), load(acc + i + j + 32)));
    if (_mm512_cmpge_epi16_mask(best, bar) == 0)
      i += 256;
    else
      some(i + 256);
  }
  some(docs);
  return n;
}

void maxima(const int16_t* acc, uint32_t docs, int16_t* out) {
  for (uint32_t g = 0; g < groups; g += 32) {
    __m512i best = _mm512_set1_epi16(-32768);
    for (uint32_t i = g; i < docs; i += groups) best = _mm512_max_epi16(best, load(acc + i));
    _mm512_storeu_si512(out + g, best);
  }
}

void mask(int16_t* acc, uint32_t docs, const uint32_t* bits) {
  const __m512i out = _mm512_set1_epi16(-32768);
  for (uint32_t i = 0; i < docs; i += 32) _mm512_mask_storeu_epi16(acc + i, ~bits[i / 32], out);
}

void score(const float* weights, const uint32_t* rows, const uint32_t* data, uint32_t docs, float* out) {
  for (uint32_t doc = 0; doc < docs; ++doc) {
    const uint32_t length = (rows[doc + 1] - rows[doc]) * 2 / 3;
    const auto* columns = reinterpret_cast<const uint16_t*>(data + rows[doc]);
    const uint32_t* values = data + rows[doc + 1] - length;
    __m512 sum = _mm512_setzero_ps();
    for (uint32_t i = 0; i < length; i += 16) {
      const uint32_t left = length - i;
      const auto some = static_cast<__mmask16>(left < 16 ? (1u << left) - 1 : 0xffffu);
      const __m512i at = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, columns + i));
      const __m512 weight = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, at, weights, 4);
      sum = _mm512_fmadd_ps(weight, _mm512_maskz_loadu_ps(some, values + i), sum);
    }
    out[doc] = _mm512_reduce_add_ps(sum);
  }
}

}  // namespace

const Kernels kernels_avx512 = {scatter, dense, collect, maxima, mask, score};

}  // namespace gossamer::retrieval
