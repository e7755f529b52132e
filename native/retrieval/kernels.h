// The inner loops of search, one table per instruction set.
#pragma once

#include <cstdint>

#include "../isa.h"

namespace gossamer::retrieval {

// Accumulators have 65,536 entries, so that any 16-bit place is one of them; only a range's are read back.
constexpr int accumulators = 65536;
constexpr int groups = 512;

struct Kernels {
  // acc[place] += round(impact * weight / 2^15) for each posting, until |impact| of a group of 16 starts below `least`;
  // returns how many were read. Meanwhile `next`, up to next_end, is fetched: a line a group, as many at once would
  // stall the loads.
  uint32_t (*scatter)(int16_t* acc, const uint32_t* postings, uint32_t count, int16_t weight, int least,
                      const uint32_t* next, const uint32_t* next_end);
  // The same of a row of impacts; docs is a multiple of 32.
  void (*dense)(int16_t* acc, const int16_t* row, uint32_t docs, int16_t weight);
  // Places with acc >= least, in ascending order; docs is a multiple of 32 (padding holds -32768).
  uint32_t (*collect)(const int16_t* acc, uint32_t docs, int16_t least, uint16_t* places);
  // Maxima of `groups` disjoint sets of places.
  void (*maxima)(const int16_t* acc, uint32_t docs, int16_t* out);
  // -32768 where the bit of a place is 0; docs is a multiple of 32.
  void (*mask)(int16_t* acc, uint32_t docs, const uint32_t* bits);
  // out[i] = inner product of the weights, 65,536 of them, with the narrow row (see segment.h) from rows[i] to
  // rows[i + 1] in data.
  void (*score)(const float* weights, const uint32_t* rows, const uint32_t* data, uint32_t docs, float* out);
};

extern const Kernels kernels_scalar;
#ifdef GOSSAMER_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

inline const Kernels& kernels() {
  switch (isa::active()) {
#ifdef GOSSAMER_X86
    case isa::Isa::avx512:
      return kernels_avx512;
    case isa::Isa::avx2:
      return kernels_avx2;
#endif
    default:
      return kernels_scalar;
  }
}

}  // namespace gossamer::retrieval
