// Numbers of a sparse product. TYPE: 0 float16, 1 bfloat16, 2 float32 (tf32 products).
#include "types.cuh"

constexpr int SIZE = TYPE == 2 ? 4 : 2;  // bytes of a number
using Number = typename Unsigned<SIZE>::type;

#include "spmm_ptx.cuh"

__device__ inline float to_float(Number x) {
  if constexpr (TYPE == 0) return half_to_float((u16)x);
  return __uint_as_float(TYPE == 1 ? (u32)x << 16 : (u32)x);
}

__device__ inline bool is_zero(Number x) { return !(Number)(x << 1); }

// COUNT numbers, at a multiple of their size together, widened.
template <int COUNT> __device__ inline void store_rounded(u8* to, const float (&x)[COUNT]) {
  if constexpr (TYPE == 2) {
    Vector<float, COUNT> all;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) all.at[i] = x[i];
    *(Vector<float, COUNT>*)to = all;
  } else if constexpr (COUNT == 1) {
    *(u16*)to = (u16)rounded_pair(x[0], 0);
  } else {
    Vector<u32, COUNT / 2> all;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) all.at[i] = rounded_pair(x[2 * i], x[2 * i + 1]);
    *(Vector<u32, COUNT / 2>*)to = all;
  }
}

// BYTES at a multiple of BYTES as words, the last one filled with zeros.
template <int BYTES, int WORDS> __device__ inline void load_words(u32* to, const u8* from) {
  if constexpr (BYTES == 2) {
    to[0] = *(const u16*)from;
  } else {
    const auto all = *(const Vector<u32, WORDS>*)from;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) to[i] = all.at[i];
  }
}
