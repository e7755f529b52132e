// The decoder of lscd.cuh alone: warps expand stages that lie in shared memory, again and again; nothing is read from
// memory and nothing multiplied. Macros: those of lscd.cuh with TEAM, PAIR, TILES and CLUSTER 1; SUMMED (1): the xor of
// all registers goes to `found`, else they are made and dropped.
#include "lscd.cuh"

template <int STEP> __device__ inline void make(u32& sum, Pointers& at, u32 bits) {
  u32 a[4];
  expand<STEP>(a, at, bits);
  if constexpr (SUMMED)
    sum ^= a[0] ^ a[1] ^ a[2] ^ a[3];
  else
    asm volatile("" ::"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
}

// Every warp has a copy of `stage`, of `bytes`. `clocks`: of each block, clocks and nanoseconds for `rounds` of all.
extern "C" __global__ void __launch_bounds__(THREADS)
    lscd_decode(const u32* stage, i64* clocks, u32* found, i32 bytes, i32 rounds) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 own = address(shared) + warp * bytes;
  for (int i = lane; i < bytes / 4; i += 32) *(u32*)(shared + warp * bytes + 4 * i) = stage[i];
  __syncthreads();
  i64 begin, end;
  const i64 first = clock64();
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin)::"memory");
  u32 sum = 0;
  for (int round = 0; round < rounds; ++round) {
    Pointers at;
    start(at, own, load32(own + MASKS + lane * 4));
    u32 bits = load32(own + lane * 4);
#pragma unroll UNROLL
    for (int word = 0; word < STEPS / PER_WORD; ++word) {
      const u32 next = load32(own + lane * 4 + (word + 1) * 128);
      make<0>(sum, at, bits);
      make<1>(sum, at, bits);
      make<2>(sum, at, bits);
      make<3>(sum, at, bits);
      if constexpr (PER_WORD == 8) {
        make<4>(sum, at, bits);
        make<5>(sum, at, bits);
        make<6>(sum, at, bits);
        make<7>(sum, at, bits);
      }
      bits = next;
    }
  }
  __syncthreads();
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(end)::"memory");
  if (threadIdx.x == 0) {
    clocks[2 * blockIdx.x] = clock64() - first;
    clocks[2 * blockIdx.x + 1] = end - begin;
  }
  if constexpr (SUMMED) found[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
