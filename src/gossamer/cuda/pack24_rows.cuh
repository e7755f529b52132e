// A matrix pruned to 2:4 along its rows and compressed. Macros: BF16; SOFT (S-STE's soft threshold) or the two largest;
// DENSE (1): the pruned matrix as well.
#include "pack24.cuh"

// S-STE's soft threshold: a magnitude less the third of its group, times `scale`.
__device__ inline u16 soft(u16 bits, float third, float scale) {
  const float w = widen(bits);
  return narrow(widen(narrow(w - fminf(fmaxf(w, -third), third))) * scale);
}

__device__ inline Pair pair_of(const Four& v, float scale) {
  const Top top = top_of(v);
  u16 kept[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int i = top.nibble >> 2 * k & 3;
    kept[k] = i & 2 ? (i & 1 ? v[3] : v[2]) : (i & 1 ? v[1] : v[0]);
    if (SOFT) kept[k] = soft(kept[k], widen(top.third), scale);
    kept[k] = plain_zero(kept[k]);
  }
  return {(u32)kept[0] | (u32)kept[1] << 16, top.nibble};
}

// A thread takes 32 columns of two rows; 8 threads side by side, 4 one below the other, so that loads are lines and the
// metadata of a warp whole sectors. `scale`: null or one float. Grid: rows / 64 * cols / 64, block 64.
extern "C" __global__ void __launch_bounds__(64)
    pack24_rows(const u16* w, const float* scale, u8* out, u16* dense, i64 rows, i64 cols) {
  const i64 unit = (i64)blockIdx.x * 64 + threadIdx.x, strips = cols / 64;  // of 64 columns: two units wide
  const i64 wide = unit % 2, row4 = unit / 2 % 4, rest = unit / 8, strip = rest % strips, above = rest / strips;
  const i64 pair = above * 4 + row4, row = pair / 8 * 16 + pair % 8, col = strip * 64 + wide * 32;
  const float factor = scale ? *scale : 1.0f;
  Unit packed = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const i64 begin = (row + 8 * half) * cols + col;
    alignas(16) u16 v[8][4];
    alignas(16) u64 whole[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) *(uint4*)v[2 * i] = *(const uint4*)(w + begin + 8 * i);
#pragma unroll
    for (int g = 0; g < 8; ++g) {
      const Pair pair = pair_of(v[g], factor);
      packed.put(half, g, pair);
      whole[g] = (u64)(pair.values & 0xffff) << 16 * (pair.nibble & 3) | (u64)(pair.values >> 16) << 16 * (pair.nibble >> 2);
    }
    u8* own = (u8*)(dense + begin);
    u8* other = own + (threadIdx.x & 1 ? -64 : 64);
#pragma unroll
    for (int i = 0; DENSE && i < 2; ++i) store32(own + 32 * i, other + 32 * i, (const u32*)(whole + 4 * i));
  }
  packed.store<false>(out, row, col, rows, cols);
}
