// The two kinds of 16 bits: bfloat16 where the macro BF16 is 1, else fp16. TYPE is what PTX calls it.
#include "types.cuh"

#if BF16
#define TYPE "bf16"
__device__ inline float widen(u16 bits) { return __uint_as_float((u32)bits << 16); }
__device__ inline u16 narrow(float value) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#else
#define TYPE "f16"
__device__ inline float widen(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ inline u16 narrow(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#endif
