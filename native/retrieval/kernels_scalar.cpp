#include <algorithm>
#include <cstdlib>

#include "kernels.h"

namespace gossamer::retrieval {
namespace {

int16_t share(int16_t impact, int16_t weight) { return static_cast<int16_t>((impact * weight + (1 << 14)) >> 15); }

uint32_t scatter(int16_t* acc, const uint32_t* postings, uint32_t count, int16_t weight, int least,
                 const uint32_t* next, const uint32_t* next_end) {
  for (; next < next_end; next += 16) __builtin_prefetch(next);
  for (uint32_t i = 0; i < count; ++i) {
    const int16_t impact = static_cast<int16_t>(postings[i] >> 16);
    if (i % 16 == 0 && std::abs(int{impact}) < least) return i;
    int16_t& sum = acc[postings[i] & 0xffff];
    sum = static_cast<int16_t>(sum + share(impact, weight));
  }
  return count;
}

void dense(int16_t* acc, const int16_t* row, uint32_t docs, int16_t weight) {
  for (uint32_t i = 0; i < docs; ++i) acc[i] = static_cast<int16_t>(acc[i] + share(row[i], weight));
}

uint32_t collect(const int16_t* acc, uint32_t docs, int16_t least, uint16_t* places) {
  uint32_t n = 0;
  for (uint32_t i = 0; i < docs; ++i)
    if (acc[i] >= least) places[n++] = static_cast<uint16_t>(i);
  return n;
}

void maxima(const int16_t* acc, uint32_t docs, int16_t* out) {
  std::fill_n(out, groups, int16_t{-32768});
  for (uint32_t i = 0; i < docs; ++i) out[i % groups] = std::max(out[i % groups], acc[i]);
}

void mask(int16_t* acc, uint32_t docs, const uint32_t* bits) {
  for (uint32_t i = 0; i < docs; ++i)
    if ((bits[i / 32] >> (i % 32) & 1) == 0) acc[i] = -32768;
}

void score(const float* weights, const uint32_t* rows, const uint32_t* data, uint32_t docs, float* out) {
  for (uint32_t doc = 0; doc < docs; ++doc) {
    const uint32_t length = (rows[doc + 1] - rows[doc]) * 2 / 3;
    const auto* columns = reinterpret_cast<const uint16_t*>(data + rows[doc]);
    const auto* values = reinterpret_cast<const float*>(data + rows[doc + 1] - length);
    float sum = 0;
    for (uint32_t i = 0; i < length; ++i) sum += weights[columns[i]] * values[i];
    out[doc] = sum;
  }
}

}  // namespace

const Kernels kernels_scalar = {scatter, dense, collect, maxima, mask, score};

}  // namespace gossamer::retrieval
