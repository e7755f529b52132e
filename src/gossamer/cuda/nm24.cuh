// y = x W^T + bias for a few tokens and a 2:4 weight: W goes compressed from memory into the registers of the sparse
// matrix products, mma.sp, which want it so: nothing is decoded. The layout is described in kernels/_nm24_pack.py.
// Macros: TILES of 8 tokens; BF16 (1) or fp16 (0); PAIR stages that a warp takes at once, one below the other (1, 2);
// CLUSTER blocks that share a panel of rows (1, 2, 4); THREADS of the largest block, the last X_WARPS warps copy x.
#include "float16.cuh"
#include "lscd_copy.cuh"

constexpr int STEPS = 8, DEPTH = 32 * STEPS, TOKENS = 8 * TILES;
constexpr int PITCH = 2 * DEPTH + 16;  // of a token in shared memory: shifted, so that ldmatrix meets all banks
constexpr int SLOT = TOKENS * PITCH, BARRIERS = 512;
constexpr int LANE_STAGE = 16 * (1 + STEPS);  // bytes of a stage that a lane owns: metadata, then a value block a step

// With two tiles, ptxas 13.0 and 13.5 die of an internal error (C7907) for Blackwell; `gpu` in cuda_nm24.py knows it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && TILES == 2
#define CRASHES_PTXAS 1
#else
#define CRASHES_PTXAS 0
#endif

#include "sums.cuh"

extern __shared__ __align__(128) u8 shared[];

// 16 bytes that are read once; `value` stays as it is if `exists` is false.
__device__ inline void load_once(u32 (&value)[4], const u8* from, bool exists) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0; "
               "@p ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(value[0]), "+r"(value[1]), "+r"(value[2]), "+r"(value[3])
               : "l"(from), "r"((int)exists));
}

// Rows of `a` in 32 columns, two kept of every four; `meta` of a pair of steps, the lanes of HALF hold those of this one.
template <int HALF>
__device__ inline void multiply(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[4], u32 meta) {
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta),
                 "n"(HALF));
}

struct Stage {
  u32 meta[STEPS / 2], values[STEPS][4];
};
using Sums = float[PAIR][TILES][4];

// Step STEP of the stages, whose values give way to those of the next. `x`: where this lane reads for ldmatrix.
template <int STEP>
__device__ inline void step(Sums& sums, Stage (&stage)[PAIR], const u8* next, bool more, u32 x) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    u32 b[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(x + tile * 8 * PITCH + STEP * 64)
                 : "memory");
#pragma unroll
    for (int p = 0; p < PAIR; ++p)
      multiply<STEP % 2>(sums[p][tile], stage[p].values[STEP], b, stage[p].meta[STEP / 2]);
  }
#pragma unroll
  for (int p = 0; p < PAIR; ++p) load_once(stage[p].values[STEP], next + p * 32 * LANE_STAGE + 512 * (1 + STEP), more);
}

__device__ inline void consume(Sums& sums, Stage (&stage)[PAIR], const u8* next, bool more, u32 x) {
  u32 meta[PAIR][4] = {};
#pragma unroll
  for (int p = 0; p < PAIR; ++p) load_once(meta[p], next + p * 32 * LANE_STAGE, more);
  step<0>(sums, stage, next, more, x);
  step<1>(sums, stage, next, more, x);
  step<2>(sums, stage, next, more, x);
  step<3>(sums, stage, next, more, x);
  step<4>(sums, stage, next, more, x);
  step<5>(sums, stage, next, more, x);
  step<6>(sums, stage, next, more, x);
  step<7>(sums, stage, next, more, x);
#pragma unroll
  for (int p = 0; p < PAIR; ++p)
#pragma unroll
    for (int i = 0; i < 4; ++i) stage[p].meta[i] = meta[p][i];
}

// DEPTH columns of every token from `first` on, zeros past the last column. Called by X_WARPS warps, in turns by row.
__device__ inline void copy_x(u32 to, const u16* x, int first, int cols, int tokens, u32 barrier, int lane, int warp) {
  const bool exists = first + 8 * lane < cols;
  const u16* from = x + warp * (i64)cols + (exists ? first + 8 * lane : 0);
  to += warp * PITCH + lane * 16;
#pragma unroll
  for (int row = 0; row < TOKENS; row += X_WARPS) {
    if (row + warp < tokens) copy16(to + row * PITCH, from, exists);
    from += X_WARPS * (i64)cols;
  }
  arrive_when_copied(barrier);
}

// A block of threads takes a panel, `high` blocks of 16 * PAIR rows; `split` warps share each of them, every one takes
// each `split`-th stage. A block of a cluster takes its share of the stages of a row. Grid: panels * CLUSTER. Block:
// 32 * (high * split + X_WARPS). `deep`: stages in a row of stages; `x_ring`: slots of x, at least `split`.
extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTERED(CLUSTER)
    nm24(const u8* stages, const u16* x, const u16* bias, u16* y, i32 rows, i32 cols, i32 tokens, i32 deep, i32 high,
         i32 split, i32 x_ring) {
#if CRASHES_PTXAS
  __trap();  // nobody launches this
#else
  constexpr int SHARE = BULK ? CLUSTER : 1;
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, warps = high * split;
  const u32 base = address(shared), rank = cluster_rank<SHARE>();
  const u32 x_full = base, x_empty = x_full + 8 * x_ring, xs = base + BARRIERS;
  const int per_block = (deep + SHARE - 1) / SHARE, from = rank * per_block;
  const int count = clamp(deep - from, 0, per_block);
  const int panel = blockIdx.x / SHARE, local = warp / split, chunk = warp % split;
  const int turns = warp < warps ? (count - chunk + split - 1) / split : 0;
  const i64 block = ((i64)panel * high + local) * PAIR;
  const bool works = turns > 0 && block * 16 < rows;

  // Two stages one below the other lie side by side in memory.
  const u8* next = stages + ((block / 2 * deep + from + chunk) * 2 + block % 2) * 32 * LANE_STAGE + lane * 16;
  const i64 stride = (i64)split * 2 * 32 * LANE_STAGE;
  Stage stage[PAIR] = {};
#pragma unroll
  for (int p = 0; p < PAIR; ++p) {
    load_once(stage[p].meta, next + p * 32 * LANE_STAGE, works);
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
      load_once(stage[p].values[i], next + p * 32 * LANE_STAGE + 512 * (1 + i), works);
  }

  if (warp == warps) {
    for (int i = lane; i < x_ring; i += 32) {
      init_barrier(x_full + 8 * i, 32 * X_WARPS);
      init_barrier(x_empty + 8 * i, high);
    }
    publish_barriers();
  }
  __syncthreads();

  Sums sums = {};
  if (warp >= warps) {
    Ring slot{0, 0};
    for (int i = 0; i < count; ++i) {
      if (i >= x_ring) wait(x_empty + 8 * slot.slot, slot.parity ^ 1);
      copy_x(xs + slot.slot * SLOT, x, (from + i) * DEPTH, cols, tokens, x_full + 8 * slot.slot, lane, warp - warps);
      slot.advance(1, x_ring);
    }
  } else {
    Ring there{chunk, 0};
    const u32 x_lane = xs + lane % 8 * PITCH + lane / 8 * 16;
    for (int t = 0; t < turns; ++t) {
      next += stride;
      wait(x_full + 8 * there.slot, there.parity);
      if (works) consume(sums, stage, next, t + 1 < turns, x_lane + there.slot * SLOT);
      __syncwarp();
      if (lane == 0) arrive(x_empty + 8 * there.slot);
      there.advance(split, x_ring);
    }
  }
  __syncthreads();

  // The sums lie where x lay, and after them what the peers send.
  write_sums<1, SHARE>((float*)(shared + BARRIERS), sums, {panel, high, split, warps, rank}, warp, lane, bias, y,
                       rows, tokens);
#endif
}
