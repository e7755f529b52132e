// Included by lscd.cuh where four warps multiply together: the left operand from the registers of each, 16 rows a warp,
// x from shared memory, read once for the team.

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// The right operand from `x` on, in units of 16 bytes: rows of 128 bytes, one per token and end to end, whose pieces of
// 16 bytes are swizzled by the row modulo 8. The low half of the descriptor, to which offsets may be added.
__device__ inline u32 descriptor(u32 x) { return 1u << 16 | x >> 4; }
constexpr u64 DESCRIPTOR = (u64)(1u << 30 | 1024 >> 4) << 32;

#define SUM(T) "+f"(sums[FIRST + T][0]), "+f"(sums[FIRST + T][1]), "+f"(sums[FIRST + T][2]), "+f"(sums[FIRST + T][3])
#if TILES == 1
#define SHAPE "m64n8k16"
#define OPERANDS "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8"
#define SUMS SUM(0)
#elif TILES == 2
#define SHAPE "m64n16k16"
#define OPERANDS "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12"
#define SUMS SUM(0), SUM(1)
#elif TILES == 4
#define SHAPE "m64n32k16"
#define OPERANDS \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20"
#define SUMS SUM(0), SUM(1), SUM(2), SUM(3)
#else
#define SHAPE "m64n64k16"
#define OPERANDS \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36"
#define SUMS SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7)
#endif

// Up to 8 tiles, from FIRST on, with 16 columns of x.
template <int FIRST> __device__ inline void multiply_tiles(float (&sums)[TILES][4], const u32 (&a)[4], u32 x) {
  asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE
               " " OPERANDS ", p, 1, 1, 0; }"
               : SUMS
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(DESCRIPTOR | x));
}

// Two products of every tile; those that were begun before them are finished on return.
template <int STEP>
__device__ inline void expand_and_multiply(float (&sums)[TILES][4], u32 (&a)[2][4], Pointers& at, u32 bits, u32 x) {
  expand<STEP>(a[0], at, bits);
  expand<STEP + 1>(a[1], at, bits);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    multiply_tiles<0>(sums, a[i], x + 2 * i);
    if constexpr (TILES > 8) multiply_tiles<8>(sums, a[i], x + 2 * i + (8 * 8 * 128 >> 4));
  }
  wgmma_commit();
  wgmma_wait<1>();
}

// Half a stage times the slot `x`. `masks`: of this half and lane. `before`: the barrier of the slot that products in
// flight still read.
__device__ inline void multiply_slot(float (&sums)[TILES][4], u32 (&a)[2][2][4], Pointers& at, u32 masks, u32 x,
                                     u32 before, int lane) {
  const u32 bits = load32(masks), more = WORDS ? bits : load32(masks + 128);
  const u32 low = descriptor(x), high = low + (PART >> 4);
  constexpr int LATER = WORDS ? 4 : 0;
  expand_and_multiply<0>(sums, a[0], at, bits, low);
  if (lane == 0) arrive(before);
  expand_and_multiply<2>(sums, a[1], at, bits, low + 4);
  expand_and_multiply<LATER>(sums, a[0], at, more, high);
  expand_and_multiply<LATER + 2>(sums, a[1], at, more, high + 4);
}

__device__ inline void finish(float (&sums)[TILES][4]) { wgmma_wait<0>(); }
