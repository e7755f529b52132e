// Dense [rows, cols] of 16-bit values from the stages of kernels/_lscd_pack.py, one warp per stage.
// Macros: STEPS products of depth 16 a stage; WORDS (1) or halves (0) as items; WARPS of a block.
#include "types.cuh"

constexpr int DEPTH = 16 * STEPS, MASKS = (WORDS ? 16 : 32) * STEPS, HEAD = MASKS + 128, ROW = 128;
constexpr int STREAMS = WORDS ? 2 : 4, RUNS = WORDS ? 4 : 2;  // of 32 columns, per word of the mask

extern __shared__ __align__(16) u8 shared[];

__device__ inline void copy_stage(u8* to, const u8* from, u32 bytes, int lane) {
  const u32 base = (u32)__cvta_generic_to_shared(to);
  for (u32 i = lane * 16; i < bytes; i += 512)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(base + i), "l"(from + i) : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}

// Of two steps: register 0 or 1 (and 2 or 3) of each is value 0 and 1 (2 and 3) of row `half`.
using Run = u32[2][4];

__device__ inline void read_run(Run& run, u32 (&at)[STREAMS], const u8* stage, u32 bits) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < 4; ++j) run[half][j] = 0;
#pragma unroll
  for (int step = 0; step < 2; ++step)
#pragma unroll
    for (int item = 0; item < (WORDS ? 4 : 8); ++item) {
      const int reg = item % 4, stream = WORDS ? reg / 2 : reg, shift = item / 4 * 16;
      if (bits >> ((WORDS ? 4 : 8) * step + item) & 1) {
        const u8* from = stage + at[stream];
        run[reg % 2][2 * step + reg / 2] |= WORDS ? *(const u32*)from : (u32) * (const u16*)from << shift;
        at[stream] += stream < STREAMS / 2 ? ROW : -ROW;
      }
    }
}

// Lane t of four gets value t of each of them.
__device__ inline void transpose(u32 (&values)[4], int lane) {
#pragma unroll
  for (int d = 1; d < 4; d *= 2)
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & d) continue;
      const bool upper = lane & d;
      const u32 got = __shfl_xor_sync(FULL, upper ? values[low] : values[low + d], d);
      values[low] = upper ? got : values[low];
      values[low + d] = upper ? values[low + d] : got;
    }
}

__device__ inline void store(u16* row, const u32 (&values)[4], int first, int cols) {
  if (first + 8 <= cols && cols % 8 == 0) {
    *(Vector<u32, 4>*)(row + first) = {values[0], values[1], values[2], values[3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (first + i < cols) row[first + i] = (u16)(values[i / 2] >> i % 2 * 16);
}

// `deep`: stages in a row of stages. Shared memory: WARPS times `room`, the bytes of the largest stage.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    expand(const u8* stages, const u32* offsets, u16* dense, i32 rows, i32 cols, i32 deep, i32 room) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const i64 stage = (i64)blockIdx.x * WARPS + warp, pair = stage / 2;
  const i64 top = pair / deep * 32 + stage % 2 * 16;
  if (top >= rows) return;
  const u32 begin = offsets[stage], bytes = (offsets[stage + 1] - begin) * 128;
  u8* here = shared + warp * room;
  copy_stage(here, stages + (u64)begin * 128, bytes, lane);

  const u32 slots = *(const u32*)(here + MASKS + lane * 4), last = HEAD + (slots >> 20) * ROW - ROW;
  u32 at[STREAMS];
#pragma unroll
  for (int i = 0; i < STREAMS; ++i)
    at[i] = (i < STREAMS / 2 ? HEAD : last) + (slots >> 5 * i & 31) * 4 + (WORDS ? 0 : i % 2 * 2);
  int first = (int)(pair % deep) * DEPTH + lane % 4 * 8;
#pragma unroll
  for (int word = 0; word < STEPS / 2 / RUNS; ++word) {
    const u32 mask = *(const u32*)(here + word * 128 + lane * 4);
#pragma unroll
    for (int i = 0; i < RUNS; ++i, first += 32) {
      Run run;
      read_run(run, at, here, mask >> i * (32 / RUNS));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const i64 row = top + lane / 4 + half * 8;
        transpose(run[half], lane);
        if (row < rows) store(dense + row * cols, run[half], first, cols);
      }
    }
  }
}
