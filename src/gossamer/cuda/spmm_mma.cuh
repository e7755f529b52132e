// Numbers of a sparse product and the tensor-core steps on them. TYPE: 0 float16, 1 bfloat16, 2 float32 (tf32 products).
#include "types.cuh"

constexpr int SIZE = TYPE == 2 ? 4 : 2;  // bytes of a number
using Number = typename Unsigned<SIZE>::type;

__device__ inline float to_float(Number x) {
  if constexpr (TYPE == 0) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((u16)x));
    return y;
  }
  return __uint_as_float(TYPE == 1 ? (u32)x << 16 : (u32)x);
}

__device__ inline bool is_zero(Number x) { return !(Number)(x << 1); }

// Two neighbouring results as they lie in memory.
__device__ inline u32 rounded_pair(float low, float high) {
  u32 pair;
  if constexpr (TYPE == 0)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

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

__device__ inline u32 to_tf32(u32 x) {
  u32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
  return y;
}

// d += a b for a [16, 16] and b [16, 8] of 16-bit numbers.
__device__ inline void multiply16(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if TYPE == 1
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// d += a b for a [16, 8] and b [8, 8] in tf32.
__device__ inline void multiply32(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
