// y = x W^T + bias for up to 64 tokens: W is read compressed and expanded straight into the registers of the matrix
// products. The layout of a stage is described in kernels/_lscd_pack.py, the pipeline in docs/kernels/lscd.md.
// Macros: STEPS products of depth 16 a stage; TILES of 8 tokens; BF16 (1) or fp16 (0); PAIR stages that a warp
// takes at once (1, 2); CLUSTER blocks that share a panel of rows (1, 2); THREADS of the largest block.
#include "types.cuh"

#if __CUDA_ARCH__ >= 900
#define BULK 1
#define CLUSTERED(COUNT) __cluster_dims__(COUNT, 1, 1)
#else
#define BULK 0
#define CLUSTERED(COUNT)
#endif

constexpr int DEPTH = 16 * STEPS, TOKENS = 8 * TILES;
constexpr int MASKS = 32 * STEPS, HEAD = MASKS + 128, ROW = 128;
// A row of x is shifted by half a line of banks against the next, so that two of them can be read at once.
constexpr int PITCH = 2 * DEPTH + 64, SLOT = TOKENS * PITCH;
constexpr int BARRIERS = 2048, X_BARRIERS = 1536;
constexpr int WORTH_WAKING = 32;  // lines of a stage: 5 % gained above (half of all values), 2 % lost below
constexpr int SUM_PITCH = 20;  // floats of one token's 16 sums: no two lanes of an accumulator in one bank
constexpr int COPIERS = BULK ? 1 : 32;  // lanes that take part in the copy of a stage

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

// 16 bytes; zeros if `exists` is false, from a pointer that may be anywhere in the same array.
__device__ inline void copy16(u32 to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

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

// DEPTH columns of every token from `first` on, zeros past the last column. Called by a whole warp. The engine for bulk
// copies takes as long for a row of this length as a warp does for many, so it is left to the weights.
__device__ inline void copy_x(u32 to, const u16* x, int first, int cols, int tokens, u32 barrier, int lane) {
#pragma unroll 8
  for (int token = 0; token < tokens; ++token)
#pragma unroll
    for (int piece = 8 * lane; piece < DEPTH; piece += 256) {
      const bool exists = first + piece < cols;
      copy16(to + token * PITCH + 2 * piece, x + token * (i64)cols + (exists ? first + piece : 0), exists);
    }
  arrive_when_copied(barrier);
}

__device__ inline u32 load32(u32 at) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
  return word;
}

extern __shared__ __align__(128) u8 shared[];

__device__ inline void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
#endif
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Streams 0 and 1 run down from the first row of values, 2 and 3 up from the last: register i of the left operand
// comes from stream i. Written as plain branches: from these the compiler makes predicates, seven bits at a time.
template <int STEP> __device__ inline void expand(u32 (&a)[4], u32 (&at)[4], u32 bits) {
  u32 value[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    value[i] = 0;
    if (bits & 1u << (8 * STEP + i)) {
      value[i] = *(const volatile u16*)(shared + at[i % 4]);
      at[i % 4] += i % 4 < 2 ? ROW : -ROW;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = __byte_perm(value[i], value[i + 4], 0x5410);
}

using Sums = float[PAIR][TILES][4];
using Pointers = u32[PAIR][4];

template <int HALF>
__device__ inline void expand_and_multiply(Sums& sums, Pointers& at, const u32 (&bits)[PAIR], u32 x) {
  u32 b[TILES][4], a[PAIR][4];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[tile][0]), "=r"(b[tile][1]), "=r"(b[tile][2]), "=r"(b[tile][3])
                 : "r"(x + tile * 8 * PITCH + HALF * 64)
                 : "memory");
#pragma unroll
  for (int p = 0; p < PAIR; ++p) expand<2 * HALF>(a[p], at[p], bits[p]);
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int p = 0; p < PAIR; ++p) multiply(sums[p][tile], a[p], b[tile][0], b[tile][1]);
#pragma unroll
  for (int p = 0; p < PAIR; ++p) expand<2 * HALF + 1>(a[p], at[p], bits[p]);
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int p = 0; p < PAIR; ++p) multiply(sums[p][tile], a[p], b[tile][2], b[tile][3]);
}

// PAIR stages, one below the other in the matrix, times x. `x`: where this lane's token and columns begin.
__device__ inline void consume(Sums& sums, u32 stage, u32 x, int lane) {
  Pointers at;
  u32 masks[PAIR], bits[PAIR];
#pragma unroll
  for (int p = 0; p < PAIR; ++p) {
    const u32 slots = load32(stage + MASKS + lane * 4), height = (slots >> 20) * ROW;
    const u32 first = stage - address(shared) + HEAD, last = first + height - ROW;
    at[p][0] = first + (slots & 31) * 4, at[p][1] = first + (slots >> 5 & 31) * 4 + 2;
    at[p][2] = last + (slots >> 10 & 31) * 4, at[p][3] = last + (slots >> 15 & 31) * 4 + 2;
    masks[p] = stage + lane * 4;
    bits[p] = load32(masks[p]);
    stage += HEAD + height;
  }
#pragma unroll UNROLL
  for (int word = 0; word < STEPS / 4; ++word) {
    u32 next[PAIR];
#pragma unroll
    for (int p = 0; p < PAIR; ++p) next[p] = load32(masks[p] + (word + 1) * 128);  // after the last: no mask, not used
    expand_and_multiply<0>(sums, at, bits, x + word * 128);
    expand_and_multiply<1>(sums, at, bits, x + word * 128);
#pragma unroll
    for (int p = 0; p < PAIR; ++p) bits[p] = next[p];
  }
}

__device__ inline float widen(u16 bits) {
#if BF16
  return __uint_as_float((u32)bits << 16);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

__device__ inline u16 narrow(float value) {
  u16 bits;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  return bits;
}

__device__ inline u32 cluster_rank() {
  u32 rank = 0;
#if BULK
  if constexpr (CLUSTER > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ inline void cluster_arrive() {
#if BULK
  if constexpr (CLUSTER > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ inline void cluster_wait() {
#if BULK
  if constexpr (CLUSTER > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

__device__ inline void store_in_peer(u32 at, u32 rank, float value) {
#if BULK
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.f32 [there], %2; }" ::"r"(
                   at),
               "r"(rank ^ 1), "f"(value)
               : "memory");
#endif
}

// The stages of one warp, each `step`-th of `count`, from `first` on: where they lie is read 32 at a time, the next 32
// being on their way.
struct Table {
  const u32* offsets;
  int first, step, count, lane;
  u32 begin, end, next_begin, next_end;

  __device__ void fetch(int t) {
    const int stage = first + (t + lane) * step;
    const bool exists = stage < count;
    const u32* at = offsets + (i64)stage * 2;
    next_begin = exists ? at[0] : 0;
    next_end = exists ? at[PAIR] : 0;
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

// A block of threads takes a panel, `high` blocks of 16 * PAIR rows; `split` warps share each block of rows, every one
// takes each `split`-th stage. A block of a cluster takes its share of the stages of a row. Grid: panels * CLUSTER.
// Block: 32 * (high * split + 1), the last warp copies x. `offsets`: of stages, in 128 bytes. `deep`: stages in a row
// of stages. `ring`: stages that a warp keeps in flight, of up to `room` bytes; `x_ring`: of x, at least `split`.
// `lines`: 128 bytes each, of all stages.
extern "C" __global__ void __launch_bounds__(THREADS) CLUSTERED(CLUSTER)
    lscd(const u8* stages, const u32* offsets, const u16* x, const u16* bias, u16* y, i32 rows, i32 cols, i32 tokens,
         i32 deep, i32 high, i32 split, i32 ring, i32 x_ring, i32 room, i32 lines) {
  constexpr int SHARE = BULK ? CLUSTER : 1, TALL = 16 * PAIR;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = high * split;
  const u32 base = address(shared), rank = cluster_rank();
  const u32 x_full = base + X_BARRIERS, x_empty = x_full + 8 * x_ring;
  const u32 xs = base + BARRIERS, own = xs + x_ring * SLOT + warp * ring * room;
  const u32 received = xs + x_ring * SLOT + warps * ring * room;
  const int per_block = (deep + SHARE - 1) / SHARE, from = rank * per_block;
  const int count = clamp(deep - from, 0, per_block);
  const int panel = blockIdx.x / SHARE, chunk = warp % split, turns = (count - chunk + split - 1) / split;
  const i64 block = ((i64)panel * high + warp / split) * PAIR;
  const bool works = warp < warps && block * 16 < rows;
  Sums sums = {};

  cluster_arrive();
  const auto copy_x_stage = [&](int stage, int slot) {
    copy_x(xs + slot * SLOT, x, (from + stage) * DEPTH, cols, tokens, x_full + 8 * slot, lane);
  };

  const u32 full = base + warp * ring * 8;
  const u64 policy = read_once();
  const i64 first = (block / 2 * deep + from) * 2 + block % 2;
  Table table{offsets + first, chunk, split, count, lane};
  if (works && turns) {
    table.fetch(0);
    if (lane == 0) {
      // Until it is known where the first stage lies, its memory can be woken where it would lie were all alike.
      const float mean = (float)lines / ((rows + 31) / 32 * 2) / deep;
      const int size = clamp(room / 128, 0, lines);
      if (mean >= WORTH_WAKING) prefetch(stages + clamp(mean * (first + 2 * chunk), 0, lines - size) * 128, size * 128);
      for (int i = 0; i < ring; ++i) init_barrier(full + 8 * i, COPIERS);
      publish_barriers();
    }
    __syncwarp();
    table.copy(0, own, stages, full, policy);
  }
  if (warp == warps) {
    for (int i = lane; i < x_ring; i += 32) {
      init_barrier(x_full + 8 * i, 32);
      init_barrier(x_empty + 8 * i, high);
    }
    publish_barriers();
    __syncwarp();
    for (int i = 0; i < x_ring && i < count; ++i) copy_x_stage(i, i);
  }
  __syncthreads();  // and so the first stages of all warps come before the second of any

  if (warp == warps) {
    Ring slot{0, 0};
    for (int i = x_ring; i < count; ++i) {
      wait(x_empty + 8 * slot.slot, slot.parity);
      copy_x_stage(i, slot.slot);
      slot.advance(1, x_ring);
    }
  } else {
    if (works)
      for (int t = 1; t < ring && t < turns; ++t) table.copy(t, own + t * room, stages, full + 8 * t, policy);
    Ring here{0, 0}, there{chunk, 0};
    const u32 x_lane = lane / 4 * PITCH + lane % 4 * 16;
    for (int t = 0; t < turns; ++t) {
      const u32 stage = own + here.slot * room;
      if (works) wait(full + 8 * here.slot, here.parity);
      wait(x_full + 8 * there.slot, there.parity);
      if (works) consume(sums, stage, xs + there.slot * SLOT + x_lane, lane);
      __syncwarp();
      if (lane == 0) arrive(x_empty + 8 * there.slot);
      if (works && t + ring < turns) table.copy(t + ring, stage, stages, full + 8 * here.slot, policy);
      here.advance(1, ring);
      there.advance(split, x_ring);
    }
  }
  __syncthreads();

  // The sums lie where x and the stages lay.
  float* partial = (float*)(shared + BARRIERS);
  if (warp < warps) {
#pragma unroll
    for (int p = 0; p < PAIR; ++p)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = tile * 8 + lane % 4 * 2 + i % 2, row = lane / 4 + i / 2 * 8;
          partial[((warp * PAIR + p) * TOKENS + token) * SUM_PITCH + row] = sums[p][tile][i];
        }
  }
  __syncthreads();

  const int share = high * TALL / SHARE, items = share * tokens;
  const auto total = [&](int row, int token) {
    const float* at = partial + ((row / TALL * split * PAIR + row % TALL / 16) * TOKENS + token) * SUM_PITCH + row % 16;
    float sum = 0;
    for (int c = 0; c < split; ++c) sum += at[c * PAIR * TOKENS * SUM_PITCH];
    return sum;
  };
  if constexpr (SHARE > 1) {
    cluster_wait();  // the peer has started
    for (int i = threadIdx.x; i < items; i += blockDim.x)
      store_in_peer(received + 4 * i, rank, total((rank ^ 1) * share + i % share, i / share));
    cluster_arrive();
    cluster_wait();
  }
  const float* other = (const float*)(shared + (received - base));
  for (int i = threadIdx.x; i < items; i += blockDim.x) {
    const int local = rank * share + i % share, token = i / share;
    const i64 row = (i64)panel * high * TALL + local;
    if (row >= rows) continue;
    float sum = total(local, token);
    if constexpr (SHARE > 1) sum += other[i];
    if (bias) sum += widen(bias[row]);
    y[token * (i64)rows + row] = narrow(sum);
  }
}
