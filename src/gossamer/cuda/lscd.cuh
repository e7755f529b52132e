// y = x W^T + bias for a few tokens: W is read compressed and expanded straight into the registers of the matrix
// products. The layout of a stage is described in kernels/_lscd_pack.py, the pipeline in docs/kernels/lscd.md.
// Macros: STEPS products of depth 16 a stage; TILES of 8 tokens; BF16 (1) or fp16 (0); WORDS (1) or halves (0) are the
// items of a stage; TEAM warps that multiply together: 1 (mma.sync) or 4 (wgmma, sm_90a only); PAIR stages that a warp
// takes at once (1, 2; 1 in a team of 4); CLUSTER blocks that share a panel of rows (1, 2, 4); THREADS of the largest
// block; UNROLL words of masks.
#include "float16.cuh"
#include "lscd_copy.cuh"

constexpr int DEPTH = 16 * STEPS, TOKENS = 8 * TILES, ROW = 128;
constexpr int MASKS = WORDS ? 16 * STEPS : 32 * STEPS, HEAD = MASKS + 128;
constexpr int PER_WORD = WORDS ? 8 : 4;  // steps that a word of the masks serves
// A slot of x in shared memory is a stage deep, for wgmma half a stage, in parts of 64 columns: rows of 128 bytes, one
// per token, whose pieces of 16 bytes are swizzled by the token modulo 8, so that ldmatrix meets all banks.
constexpr int X_PER_STAGE = TEAM > 1 ? 2 : 1, X_DEPTH = DEPTH / X_PER_STAGE;
constexpr int PART = TOKENS * 128, SLOT = X_DEPTH / 64 * PART;
constexpr int X_BARRIERS = 1536, NOTHING = 2048;  // an empty stage, for the warps of a team that have no rows
constexpr int BARRIERS = TEAM > 1 ? 3072 : 2048;
constexpr int WORTH_WAKING = 32;  // lines of a stage: 5 % gained above (half of all values), 2 % lost below

#include "sums.cuh"

extern __shared__ __align__(1024) u8 shared[];

// X_DEPTH columns of every token from `first` on, zeros past the last one. Called by a warp.
__device__ inline void copy_x(u32 to, const TensorMap& map, const u16* x, int first, int cols, int tokens, u32 barrier,
                              int lane) {
#if BULK
  if (lane == 0) {
    expect(barrier, SLOT);
    tensor_copy(to, map, first / 64, barrier);
  }
#else
  constexpr int PIECES = X_DEPTH / 8, ROWS = 32 / PIECES;  // rows that the lanes copy at once
  const int piece = lane % PIECES, begin = lane / PIECES;
  const bool exists = first + 8 * piece < cols;
  const u16* from = x + begin * (i64)cols + (exists ? first + 8 * piece : 0);
  to += piece / 8 * PART + piece % 8 * 16;
#pragma unroll
  for (int row = 0; row < TOKENS; row += ROWS) {
    if (begin + row < tokens) copy16((to ^ (begin + row) % 8 * 16) + (begin + row) * 128, from, exists);
    from += ROWS * (i64)cols;
  }
  arrive_when_copied(barrier);
#endif
}

__device__ inline void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
               "{%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where a lane reads: streams 0 and 1 of halves and 0 of words run down from the first row of values, the others up
// from the last. A register of the left operand comes from stream `stream(register)`.
constexpr int STREAMS = WORDS ? 2 : 4;
using Pointers = u32[STREAMS];
__device__ constexpr int stream(int reg) { return WORDS ? reg / 2 : reg; }

__device__ inline void start(Pointers& at, u32 stage, u32 slots) {
  const u32 first = stage - address(shared) + HEAD, last = first + (slots >> 20) * ROW - ROW;
#pragma unroll
  for (int i = 0; i < STREAMS; ++i)
    at[i] = (i < STREAMS / 2 ? first : last) + (slots >> 5 * i & 31) * 4 + (WORDS ? 0 : i % 2 * 2);
}

// The left operand of one product. Written as plain branches: from these the compiler makes predicates, seven bits at
// a time.
template <int STEP> __device__ inline void expand(u32 (&a)[4], Pointers& at, u32 bits) {
  constexpr int ITEMS = WORDS ? 4 : 8;
  u32 value[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    constexpr int FIRST = ITEMS * (STEP % PER_WORD);
    const int s = stream(i % 4);
    value[i] = 0;
    if (bits & 1u << (FIRST + i)) {
      if constexpr (WORDS)
        value[i] = *(const volatile u32*)(shared + at[s]);
      else
        value[i] = *(const volatile u16*)(shared + at[s]);
      at[s] += s < STREAMS / 2 ? ROW : -ROW;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = WORDS ? value[i] : __byte_perm(value[i], value[(i + 4) % ITEMS], 0x5410);
}

using Sums = float[PAIR][TILES][4];

#if TEAM == 1
// Two products of every tile with the columns of x from `x` on.
template <int STEP>
__device__ inline void expand_and_multiply(Sums& sums, Pointers (&at)[PAIR], const u32 (&bits)[PAIR], u32 x) {
  u32 b[TILES][4], a[PAIR][4];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[tile][0]), "=r"(b[tile][1]), "=r"(b[tile][2]), "=r"(b[tile][3])
                 : "r"(x + tile * 1024)
                 : "memory");
#pragma unroll
  for (int p = 0; p < PAIR; ++p) expand<STEP>(a[p], at[p], bits[p]);
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int p = 0; p < PAIR; ++p) multiply(sums[p][tile], a[p], b[tile][0], b[tile][1]);
#pragma unroll
  for (int p = 0; p < PAIR; ++p) expand<STEP + 1>(a[p], at[p], bits[p]);
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int p = 0; p < PAIR; ++p) multiply(sums[p][tile], a[p], b[tile][2], b[tile][3]);
}

// PAIR stages, one below the other in the matrix, times x. `x`: where this lane reads for ldmatrix.
__device__ inline void consume(Sums& sums, u32 stage, u32 x, int lane) {
  Pointers at[PAIR];
  u32 masks[PAIR], bits[PAIR];
#pragma unroll
  for (int p = 0; p < PAIR; ++p) {
    const u32 slots = load32(stage + MASKS + lane * 4);
    start(at[p], stage, slots);
    masks[p] = stage + lane * 4;
    bits[p] = load32(masks[p]);
    stage += HEAD + (slots >> 20) * ROW;
  }
#pragma unroll UNROLL
  for (int word = 0; word < STEPS / PER_WORD; ++word) {
    u32 next[PAIR];
#pragma unroll
    for (int p = 0; p < PAIR; ++p) next[p] = load32(masks[p] + (word + 1) * 128);  // after the last: no mask, not used
    x += word ? PER_WORD / 4 * PART : 0;
    expand_and_multiply<0>(sums, at, bits, x);
    expand_and_multiply<2>(sums, at, bits, x ^ 64);
    if constexpr (PER_WORD == 8) {
      expand_and_multiply<4>(sums, at, bits, x + PART);
      expand_and_multiply<6>(sums, at, bits, (x ^ 64) + PART);
    }
#pragma unroll
    for (int p = 0; p < PAIR; ++p) bits[p] = next[p];
  }
}
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "lscd_wgmma.cuh"
#endif

// A block of threads takes a panel, `high` blocks of 16 * PAIR rows; `split` warps share each of them, every one takes
// each `split`-th stage. Warps of a team have blocks that follow each other and the same stages. A block of a cluster
// takes its share of the stages of a row. Grid: panels * CLUSTER. Block: 32 * (high, rounded up to teams, * split + 1),
// the last warp copies x. `offsets`: of stages, in 128 bytes. `deep`: stages in a row of stages. `ring`: stages that a
// warp keeps in flight, of up to `room` bytes; `x_ring`: slots of x, at least X_PER_STAGE * split. `lines`: 128 bytes
// each, of all stages.
extern "C" __global__ void __launch_bounds__(THREADS) CLUSTERED(CLUSTER)
    lscd(const u8* stages, const u32* offsets, const u16* x, const u16* bias, u16* y, i32 rows, i32 cols, i32 tokens,
         i32 deep, i32 high, i32 split, i32 ring, i32 x_ring, i32 room, i32 lines,
         const __grid_constant__ TensorMap map) {
#if TEAM == 1 || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int SHARE = BULK ? CLUSTER : 1;
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, warps = (high + TEAM - 1) / TEAM * TEAM * split;
  const u32 base = address(shared), rank = cluster_rank<SHARE>();
  const u32 x_full = base + X_BARRIERS, x_empty = x_full + 8 * x_ring;
  const u32 xs = base + BARRIERS, own = xs + x_ring * SLOT + warp * ring * room;
  const int per_block = (deep + SHARE - 1) / SHARE, from = rank * per_block;
  const int count = clamp(deep - from, 0, per_block);
  const int panel = blockIdx.x / SHARE, team = warp / TEAM, local = team / split * TEAM + warp % TEAM;
  const int chunk = team % split, turns = (count - chunk + split - 1) / split;
  const i64 block = ((i64)panel * high + local) * PAIR;
  const bool works = warp < warps && local < high && block * 16 < rows;
  Sums sums = {};

  const auto copy_x_slot = [&](int i, int slot) {
    copy_x(xs + slot * SLOT, map, x, from * DEPTH + i * X_DEPTH, cols, tokens, x_full + 8 * slot, lane);
  };

  const u32 full = base + warp * ring * 8;
  const u64 policy = read_once();
  const i64 first = (block / 2 * deep + from) * 2 + block % 2;
  Table table{offsets + first, chunk, split, count, PAIR, lane};
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
  const int x_count = count * X_PER_STAGE;
  if (warp >= warps) {
    if (lane == 0) prefetch_map(map);
    for (int i = lane; i < x_ring; i += 32) {
      init_barrier(x_full + 8 * i, COPIERS);
      init_barrier(x_empty + 8 * i, warps / split * COPIERS);
    }
    if (TEAM > 1 && lane == 0) init_barrier(base + X_BARRIERS - 8, warps);
    publish_barriers();
    __syncwarp();
    for (int i = 0; i < x_ring && i < x_count; ++i) copy_x_slot(i, i);
  } else if constexpr (TEAM > 1) {
    for (int i = threadIdx.x; i < HEAD / 4; i += warps * 32) *(u32*)(shared + NOTHING + i * 4) = 0;
  }
  __syncthreads();  // and so the first stages of all warps come before the second of any

  if (warp >= warps) {
    Ring slot{0, 0};
    for (int i = x_ring; i < x_count; ++i) {
      wait(x_empty + 8 * slot.slot, slot.parity);
      copy_x_slot(i, slot.slot);
      slot.advance(1, x_ring);
    }
  } else {
    if (works)
      for (int t = 1; t < ring && t < turns; ++t) table.copy(t, own + t * room, stages, full + 8 * t, policy);
    Ring here{0, 0}, there{chunk * X_PER_STAGE, 0};
#if TEAM == 1
    const u32 x_lane = xs + lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;
    for (int t = 0; t < turns; ++t) {
      const u32 stage = own + here.slot * room;
      if (works) wait(full + 8 * here.slot, here.parity);
      wait(x_full + 8 * there.slot, there.parity);
      if (works) consume(sums, stage, x_lane + there.slot * SLOT, lane);
      __syncwarp();
      if (lane < COPIERS) arrive(x_empty + 8 * there.slot);
      if (works && t + ring < turns) table.copy(t + ring, stage, stages, full + 8 * here.slot, policy);
      here.advance(1, ring);
      there.advance(split, x_ring);
    }
#else
    // `before`: the barrier of the last slot of x, which products in flight still read; at first one that nobody needs.
    u32 a[2][2][4], before = base + X_BARRIERS - 8;
    for (int t = 0; t < turns; ++t) {
      const u32 stage = works ? own + here.slot * room : base + NOTHING;
      if (works) wait(full + 8 * here.slot, here.parity);
      Pointers at;
      start(at, stage, load32(stage + MASKS + lane * 4));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        wait(x_full + 8 * there.slot, there.parity);
        multiply_slot(sums[0], a, at, stage + lane * 4 + half * (MASKS / 2), xs + there.slot * SLOT, before, lane);
        before = x_empty + 8 * there.slot;
        there.advance(half ? 2 * split - 1 : 1, x_ring);
      }
      __syncwarp();
      if (works && t + ring < turns) table.copy(t + ring, stage, stages, full + 8 * here.slot, policy);
      here.advance(1, ring);
    }
    finish(sums[0]);
#endif
  }
  __syncthreads();

  // The sums lie where x and the stages lay, and after them what the peers send.
  write_sums<TEAM, SHARE>((float*)(shared + BARRIERS), sums, {panel, high, split, warps, rank}, warp, lane, bias, y,
                          rows, tokens);
#else
  __trap();  // wgmma is Hopper's alone; nobody launches this
#endif
}
