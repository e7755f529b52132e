// What lscd.cuh uses of the memory system: barriers in shared memory, copies onto them, clusters, and the tables that
// say where the stages of a weight lie.
#include "types.cuh"

#if __CUDA_ARCH__ >= 900
#define BULK 1
#define CLUSTERED(COUNT) __cluster_dims__(COUNT, 1, 1)
#else
#define BULK 0
#define CLUSTERED(COUNT)
#endif

// Lanes that take part in a copy, and in giving back what was copied. Before Hopper all give back, each for itself: one
// lane could for all after a __syncwarp(), but racecheck, which watches those copies, follows no such chain.
constexpr int COPIERS = BULK ? 1 : 32;

struct Ring {
  int slot;
  u32 parity;
  // step <= size
  __device__ void advance(int step, int size) {
    slot += step;
    if (slot >= size) {
      slot -= size;
      parity ^= 1;
    }
  }
};

// What is the same in all lanes, in a way that the compiler sees.
__device__ inline int uniform(int x) { return __shfl_sync(FULL, x, 0); }

__device__ inline u32 address(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }

__device__ inline void init_barrier(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ inline void publish_barriers() {
#if BULK
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ inline void arrive(u32 barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

__device__ inline void wait(u32 barrier, u32 parity) {
  u32 done = 0;
  do {
#if BULK
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
#endif
  } while (!done);
}

__device__ inline u64 read_once() {
  u64 policy = 0;
#if BULK
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

__device__ inline void expect(u32 barrier, u32 bytes) {
#if BULK
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

__device__ inline void bulk(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
#if BULK
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
               : "memory");
#endif
}

__device__ inline void prefetch(const void* from, u32 bytes) {
#if BULK
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// How a matrix lies in global memory and which boxes of it are copied; encoded by the driver (kernels/_lscd_map.py).
struct alignas(64) TensorMap {
  u64 opaque[16];
};

__device__ inline void prefetch_map(const TensorMap& map) {
#if BULK
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// The box of all rows from block `part` of 64 columns on, swizzled; zeros where there is no matrix.
__device__ inline void tensor_copy(u32 to, const TensorMap& map, int part, u32 barrier) {
#if BULK
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %2, %3}], [%4];" ::"r"(to), "l"(&map), "r"(0), "r"(part), "r"(barrier)
               : "memory");
#endif
}

// 16 bytes; zeros if `exists` is false, from a pointer that may be anywhere in the same array.
__device__ inline void copy16(u32 to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

// Arrives once all copies that this thread has begun are there, earlier ones too: slots of a ring fill in order.
__device__ inline void arrive_when_copied(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Called by a whole warp.
__device__ inline void copy_stage(u32 to, const u8* from, u32 bytes, u32 barrier, u64 policy, int lane) {
#if BULK
  if (lane == 0) {
    expect(barrier, bytes);
    bulk(to, from, bytes, barrier, policy);
  }
#else
  for (u32 i = lane * 16; i < bytes; i += 512) copy16(to + i, from + i, true);
  arrive_when_copied(barrier);
#endif
}

__device__ inline u32 load32(u32 at) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
  return word;
}

// The stages of one warp, each `step`-th of `count`, from `first` on: where they lie is read 32 at a time, the next 32
// being on their way. `tall` stages, one below the other, are copied at once.
struct Table {
  const u32* offsets;
  int first, step, count, tall, lane;
  u32 begin, end, next_begin, next_end;

  __device__ void fetch(int t) {
    const int stage = first + (t + lane) * step;
    const bool exists = stage < count;
    const u32* at = offsets + (i64)stage * 2;
    next_begin = exists ? at[0] : 0;
    next_end = exists ? at[tall] : 0;
  }
  __device__ void turn(int t) {
    begin = next_begin, end = next_end;
    fetch(t + 32);
  }
  __device__ void copy(int t, u32 to, const u8* stages, u32 barrier, u64 policy) {
    if (t % 32 == 0) turn(t);
    const u32 from = __shfl_sync(FULL, begin, t % 32), until = __shfl_sync(FULL, end, t % 32);
    copy_stage(to, stages + (u64)from * 128, (until - from) * 128, barrier, policy, lane);
  }
};

template <int COUNT> __device__ inline u32 cluster_rank() {
  u32 rank = 0;
#if BULK
  if constexpr (COUNT > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// All threads of all blocks of a cluster, and what they wrote before.
__device__ inline void cluster_sync() {
#if BULK
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

__device__ inline void store_in_peer(u32 at, u32 rank, float value) {
#if BULK
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2; }" ::"r"(
                   at),
               "r"(rank), "f"(value)
               : "memory");
#endif
}
