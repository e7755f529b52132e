// C = A B for a sparse A in CSR, cut into segments of rows, in plain float32. A team of TEAM lanes holds 16 bytes of a row
// of B each, LOADS times; PAR teams take turns with a segment's entries, with a long segment's all teams of a block.
// Macros: TYPE (2: float32, exact products); TEAM, PAR, LOADS; UNROLL entries of a team in flight.
#include "spmm_mma.cuh"

constexpr int VEC = 16 / SIZE, TILE_COLS = TEAM * VEC * LOADS, THREADS = 128, WARPS = THREADS / 32;

struct Segment {
  i32 row, begin, end, slot;  // entries; slot < 0: the whole row
};

__device__ inline void add_row(float (&sums)[LOADS * VEC], float value, const u32 (&row)[LOADS * 4]) {
#pragma unroll
  for (int i = 0; i < LOADS * VEC; ++i) {
    const Number x = SIZE == 4 ? (Number)row[i * SIZE / 4] : (Number)(row[i * SIZE / 4] >> i % 2 * 16);
    sums[i] = fmaf(value, to_float(x), sums[i]);
  }
}

__device__ inline void load_row(u32 (&to)[LOADS * 4], const u8* b, i32 row, i32 stride, i32 first, i32 n) {
#pragma unroll
  for (int l = 0; l < LOADS; ++l) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[l * 4 + i] = 0;
    if (row >= 0 && first + l * TEAM * VEC < n)
      load_words<16, 4>(to + l * 4, b + ((i64)row * stride + first + l * TEAM * VEC) * SIZE);
  }
}

struct Entries {
  i32 col[UNROLL];
  float value[UNROLL];
};

__device__ inline Entries load_entries(const i32* cols, const Number* values, i32 at, i32 end, i32 step) {
  Entries found;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const i32 entry = at + u * step;
    found.col[u] = entry < end ? cols[entry] : -1;
    found.value[u] = entry < end ? to_float(values[entry]) : 0;
  }
  return found;
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

// A segment by WIDTH lanes, `lane` being this one: entries in turn, a round's after the last one's, or, where nothing
// else hides the wait for them, loaded a round ahead.
template <int WIDTH, bool AHEAD>
__device__ inline void sum_segment(
    float (&sums)[LOADS * VEC], const Segment& own, int lane, const i32* cols, const Number* values, const u8* b,
    i32 first, i32 n, i32 stride) {
  constexpr int STEP = WIDTH / TEAM;
#pragma unroll
  for (int i = 0; i < LOADS * VEC; ++i) sums[i] = 0;
  i32 at = own.begin + lane / TEAM;
  Entries next;
  if constexpr (AHEAD) next = load_entries(cols, values, at, own.end, STEP);
  for (; at < own.end; at += UNROLL * STEP) {
    const Entries here = AHEAD ? next : load_entries(cols, values, at, own.end, STEP);
    u32 row[UNROLL][LOADS * 4];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) load_row(row[u], b, here.col[u], stride, first, n);
    if constexpr (AHEAD) next = load_entries(cols, values, at + UNROLL * STEP, own.end, STEP);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) add_row(sums, here.value[u], row[u]);
  }
#pragma unroll
  for (int d = (WIDTH < 32 ? WIDTH : 32) / 2; d >= TEAM; d /= 2)
#pragma unroll
    for (int i = 0; i < LOADS * VEC; ++i) sums[i] += __shfl_xor_sync(FULL, sums[i], d);
}

// The first `wide` segments are the long ones, each for a block.
extern "C" __global__ void __launch_bounds__(THREADS) spmm_rows(
    const void* segments, const i32* cols, const void* values, const u8* b, u8* c, float* partial, i32 count, i32 wide,
    i32 n, i32 stride) {
  constexpr int WIDTH = TEAM * PAR;
  const bool whole = (i32)blockIdx.x < wide;
  const i32 index = whole ? blockIdx.x : wide + (blockIdx.x - wide) * (THREADS / WIDTH) + threadIdx.x / WIDTH;
  const i32 lane = whole ? threadIdx.x : threadIdx.x % WIDTH, first = blockIdx.y * TILE_COLS + lane % TEAM * VEC;
  Segment own = {0, 0, 0, -1};
  if (index < count) own = ((const Segment*)segments)[index];
  float sums[LOADS * VEC];
  if (whole) {
    sum_segment<THREADS, true>(sums, own, lane, cols, (const Number*)values, b, first, n, stride);
    sum_block(sums);
  } else {
    sum_segment<WIDTH, false>(sums, own, lane, cols, (const Number*)values, b, first, n, stride);
  }
  if (index >= count || lane >= TEAM) return;
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
