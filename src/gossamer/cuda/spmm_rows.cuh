// C = A B for a sparse A in CSR, cut into segments of rows, in plain float32. A team of TEAM lanes holds a row of B,
// 16 bytes of it LOADS times per lane. A segment has one team or several, which take turns with its entries.
// Macros: TYPE (2: float32, exact products); TEAM, LOADS; UNROLL entries of a team in flight.
#include "spmm_mma.cuh"

constexpr int VEC = 16 / SIZE, TILE_COLS = TEAM * VEC * LOADS, THREADS = 128, WARPS = THREADS / 32;

struct alignas(16) Segment {
  i32 row, begin, end, slot;  // entries; slot < 0: the whole row
};

// How many segments get a block, and how many 32, 16, 8, 4, 2 and 1 lanes; they lie in this order.
struct Counts {
  i32 of[7];
};

// What a lane needs of A and B: `b` at its own columns, `stride` bytes between B's rows, where each of its vectors lies.
struct Operands {
  const i32* cols;
  const Number* values;
  const u8* b;
  i32 stride, vector[LOADS];
};

struct Entries {
  i32 col[UNROLL];
  float value[UNROLL];
};

// Of a round in which STEP teams take turns, the entries from `at` on; the segment ends before them all unless WHOLE.
template <int STEP, bool WHOLE>
__device__ inline Entries load_entries(const Operands& from, i32 at, i32 end) {
  const i32* cols = from.cols + at;
  const Number* values = from.values + at;
  Entries found;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const bool there = WHOLE || at + u * STEP < end;
    found.col[u] = there ? cols[u * STEP] : -1;
    found.value[u] = there ? to_float(values[u * STEP]) : 0;
  }
  return found;
}

__device__ inline void add_row(float (&sums)[LOADS * VEC], float value, const u32 (&row)[LOADS * 4]) {
#pragma unroll
  for (int i = 0; i < LOADS * VEC; ++i) {
    const Number x = SIZE == 4 ? (Number)row[i * SIZE / 4] : (Number)(row[i * SIZE / 4] >> i % 2 * 16);
    sums[i] = fmaf(value, to_float(x), sums[i]);
  }
}

// The team meets so that all of a round is asked for before any of it is waited for; without that, the compiler saves
// registers and asks bit by bit, which costs more than it gains where a lane loads more than one vector.
__device__ inline void meet_team() {
  if constexpr (LOADS > 1) __syncwarp(TEAM == 32 ? FULL : ((1u << TEAM % 32) - 1) << threadIdx.x % 32 / TEAM * TEAM);
}

template <bool WHOLE>
__device__ inline void add_entries(float (&sums)[LOADS * VEC], const Operands& from, const Entries& here) {
  u32 row[UNROLL][LOADS * 4];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
    for (int l = 0; l < LOADS; ++l) {
      if (WHOLE || here.col[u] >= 0) {
        load_words<16, 4>(row[u] + l * 4, from.b + (i64)here.col[u] * from.stride + from.vector[l]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) row[u][l * 4 + i] = 0;
      }
    }
  }
  meet_team();
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) add_row(sums, here.value[u], row[u]);
}

// The warps of a block add up in their order; the first one gets it.
__device__ inline void sum_block(float (&sums)[LOADS * VEC]) {
  __shared__ float shared[WARPS][LOADS * VEC][TEAM];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane < TEAM)
#pragma unroll
    for (int i = 0; i < LOADS * VEC; ++i) shared[warp][i][lane] = sums[i];
  __syncthreads();
  if (threadIdx.x >= TEAM) return;
#pragma unroll
  for (int i = 0; i < LOADS * VEC; ++i)
#pragma unroll
    for (int w = 1; w < WARPS; ++w) sums[i] += shared[w][i][lane];
}

// A segment by WIDTH lanes; the sum is the first team's. A block, of which there are few, loads entries a round ahead:
// nothing else hides the wait for them.
template <int WIDTH>
__device__ inline void sum_segment(float (&sums)[LOADS * VEC], const Operands& from, i32 begin, i32 end) {
  constexpr int STEP = WIDTH / TEAM, ROUND = UNROLL * STEP;
#pragma unroll
  for (int i = 0; i < LOADS * VEC; ++i) sums[i] = 0;
  i32 at = begin + threadIdx.x % WIDTH / TEAM;
  if constexpr (WIDTH == THREADS) {
    Entries next = load_entries<STEP, false>(from, at, end);
    for (; at < end; at += ROUND) {
      const Entries here = next;
      next = load_entries<STEP, false>(from, at + ROUND, end);
      add_entries<false>(sums, from, here);
    }
  } else {
    for (; at + ROUND - STEP < end; at += ROUND) add_entries<true>(sums, from, load_entries<STEP, true>(from, at, end));
    if (at < end) add_entries<false>(sums, from, load_entries<STEP, false>(from, at, end));
  }
#pragma unroll
  for (int d = (WIDTH < 32 ? WIDTH : 32) / 2; d >= TEAM; d /= 2)
#pragma unroll
    for (int i = 0; i < LOADS * VEC; ++i) sums[i] += __shfl_xor_sync(FULL, sums[i], d);
  if constexpr (WIDTH == THREADS) sum_block(sums);
}

// Finds and sums up this block's segments: those of WIDTH lanes are counts.of[AT], before `begin` lie those of more.
// True for the lanes that have a segment's sum.
template <int WIDTH, int AT>
__device__ inline bool sum_own(
    float (&sums)[LOADS * VEC], Segment& own, const Segment* segments, const Operands& from, const Counts& counts,
    i32 block, i32 begin) {
  constexpr int EACH = THREADS / WIDTH;
  if constexpr (WIDTH > TEAM) {
    const i32 blocks = (counts.of[AT] + EACH - 1) / EACH;
    if (block >= blocks)
      return sum_own<(WIDTH < THREADS ? WIDTH / 2 : 32), AT + 1>(
          sums, own, segments, from, counts, block - blocks, begin + counts.of[AT]);
  }
  const i32 index = block * EACH + threadIdx.x / WIDTH;
  if (index < counts.of[AT]) own = segments[begin + index];
  sum_segment<WIDTH>(sums, from, own.begin, own.end);
  return index < counts.of[AT] && threadIdx.x % WIDTH < TEAM;
}

extern "C" __global__ void __launch_bounds__(THREADS) spmm_rows(
    const void* segments, const i32* cols, const void* values, const u8* b, u8* c, float* partial, i32 by_block,
    i32 by32, i32 by16, i32 by8, i32 by4, i32 by2, i32 by1, i32 n, i32 stride) {
  const Counts counts = {by_block, by32, by16, by8, by4, by2, by1};
  const i32 first = blockIdx.y * TILE_COLS + threadIdx.x % TEAM * VEC;
  // What would lie beyond B's last column is read where something lies, for nothing: cheaper than to ask each time.
  Operands from = {cols, (const Number*)values, b + (first < n ? (i64)first * SIZE : 0), stride * SIZE, {}};
#pragma unroll
  for (int l = 1; l < LOADS; ++l) from.vector[l] = first + l * TEAM * VEC < n ? l * TEAM * 16 : 0;
  Segment own = {0, 0, 0, -1};
  float sums[LOADS * VEC];
  if (!sum_own<THREADS, 0>(sums, own, (const Segment*)segments, from, counts, blockIdx.x, 0)) return;
#pragma unroll
  for (int l = 0; l < LOADS; ++l) {
    const i32 column = first + l * TEAM * VEC;
    if (column >= n) continue;
    float all[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) all[i] = sums[l * VEC + i];
    if (own.slot < 0) {
      store_rounded(c + ((i64)own.row * n + column) * SIZE, all);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) partial[(i64)own.slot * n + column + i] = all[i];
    }
  }
}

// Rows in several segments: `longs` has row, first slot and end slot of each.
extern "C" __global__ void spmm_rows_sum(const i32* longs, const float* partial, u8* c, i32 n) {
  const i32 *own = longs + blockIdx.x * 3, column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= n) return;
  float sum[1] = {0};
  for (i32 slot = own[1]; slot < own[2]; ++slot) sum[0] += partial[(i64)slot * n + column];
  store_rounded(c + ((i64)own[0] * n + column) * SIZE, sum);
}

// out[e] = x[rows[e]] . y[cols[e]] for every stored entry e: the gradient of A's values; a team per entry.
extern "C" __global__ void __launch_bounds__(THREADS) sddmm(
    const i32* rows, const i32* cols, const u8* x, const u8* y, float* out, i64 count, i32 n, i32 x_stride,
    i32 y_stride) {
  const i64 entry = ((i64)blockIdx.x * THREADS + threadIdx.x) / TEAM;
  const int lane = threadIdx.x % TEAM;
  const i64 here = entry < count ? entry : count - 1;
  const u8 *a = x + (i64)rows[here] * x_stride * SIZE, *b = y + (i64)cols[here] * y_stride * SIZE;
  float sum = 0;
  for (i32 column = lane * VEC; column < n; column += TEAM * VEC) {
    const auto one = *(const Vector<Number, VEC>*)(a + column * SIZE);
    const auto other = *(const Vector<Number, VEC>*)(b + column * SIZE);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum = fmaf(to_float(one.at[i]), to_float(other.at[i]), sum);
  }
#pragma unroll
  for (int d = TEAM / 2; d; d /= 2) sum += __shfl_xor_sync(FULL, sum, d);
  if (entry < count && !lane) out[entry] = sum;
}
