// C = A B for a sparse A in windows of ROWS rows, laid out by gossamer/spmm/_windows.py; one warp per segment of a window.
// Sparse rows are the short side of the product: B^T [16 columns, 16 deep] times A^T [16 deep, 8 rows]. A lane loads
// whole vectors of B's rows, and owns the same columns of C, so nothing goes through shared memory.
// Macros: TYPE; ROWS 8, 16, 32; COLS columns of B per lane; MASKED (1) or dense (0) values; UNROLL groups at once;
// WARPS of a block.
#include "spmm_mma.cuh"

constexpr int DEPTH = 16, TILES = ROWS / 8, TILE_COLS = 8 * COLS;
constexpr int VEC = COLS < 16 / SIZE ? COLS : 16 / SIZE, LOADS = COLS / VEC;  // columns per load, loads per row of B
constexpr int VEC_BYTES = VEC * SIZE, VEC_WORDS = VEC_BYTES < 4 ? 1 : VEC_BYTES / 4, WORDS = LOADS * VEC_WORDS;
constexpr int PAIRS = COLS < 2 ? 1 : COLS / 2, SUMS = TILES * PAIRS * 4, SHARED = SUMS < 16 ? SUMS : 16;
constexpr int VALUE_WORDS = SIZE;  // of a lane's four values of a tile

struct Work {
  i32 window, begin, end;  // groups of 16 columns; window < 0: nothing to do
  u32 team;                // bits 0-3 the team's first warp, 4-8 its warps, 9 any team in the block, 10.. slot + 1
};

struct Matrix {
  const i32* cols;
  const Number* values;
  const u32* masks;
  const i32* starts;
};

// What says where the rest of a group lies; loaded a round ahead.
struct Head {
  Vector<i32, 4> cols;
  Vector<u32, 4> mask[TILES];
  i32 start[TILES];
};

__device__ inline Head load_head(const Matrix& a, int group, int end, int lane) {
  Head head;
#pragma unroll
  for (int i = 0; i < 4; ++i) head.cols.at[i] = -1;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    head.start[tile] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) head.mask[tile].at[i] = 0;
  }
  if (group < end) {
    head.cols = *(const Vector<i32, 4>*)(a.cols + (i64)group * DEPTH + lane % 4 * 4);
#if MASKED
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      head.mask[tile] = ((const Vector<u32, 4>*)a.masks)[(i64)group * TILES + tile];
      head.start[tile] = a.starts[(i64)group * TILES + tile];
    }
#endif
  }
  return head;
}

// The lane's columns of one row of B; `first` is its first column.
__device__ inline void load_row(u32 (&to)[WORDS], const u8* b, i32 row, i32 stride, i32 first, i32 n) {
  const u8* from = b + ((i64)row * stride + first) * SIZE;
#pragma unroll
  for (int l = 0; l < LOADS; ++l) {
#pragma unroll
    for (int i = 0; i < VEC_WORDS; ++i) to[l * VEC_WORDS + i] = 0;
    if (row >= 0 && first + l * 8 * VEC < n)
      load_words<VEC_BYTES, VEC_WORDS>(to + l * VEC_WORDS, from + l * 8 * VEC_BYTES);
  }
}

// Lane 4 r + t holds values of row r and columns 4 t to 4 t + 3 of the group.
__device__ inline void load_values(
    u32 (&to)[VALUE_WORDS], const Matrix& a, const Head& head, int group, int end, int tile, int lane) {
#pragma unroll
  for (int i = 0; i < VALUE_WORDS; ++i) to[i] = 0;
#if MASKED
  const auto& mask = head.mask[tile].at;
  const int word = lane / 8, bit = lane % 8 * 4;
  int before = head.start[tile];
#pragma unroll
  for (int i = 0; i < 4; ++i) before += __popc(mask[i] & (i < word ? FULL : i == word ? (1u << bit) - 1 : 0u));
  const u32 own = (word < 2 ? (word < 1 ? mask[0] : mask[1]) : (word < 3 ? mask[2] : mask[3])) >> bit;
  const Number* from = a.values + before;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (own >> i & 1) {
      const u32 value = from[__popc(own & ((1 << i) - 1))];
      if constexpr (SIZE == 4)
        to[i] = value;
      else
        to[i / 2] |= value << i % 2 * 16;
    }
#else
  if (group < end)
    load_words<4 * SIZE, VALUE_WORDS>(to, (const u8*)(a.values + (((i64)group * TILES + tile) * 32 + lane) * 4));
#endif
}

__device__ inline void multiply(float (&sums)[SUMS], int tile, const u32 (&b)[4][WORDS], const u32 (&v)[VALUE_WORDS]) {
#pragma unroll
  for (int pair = 0; pair < PAIRS; ++pair) {
    float* d = sums + (tile * PAIRS + pair) * 4;
#if TYPE == 2
    const int i = 2 * pair, j = COLS > 1 ? i + 1 : i;
    const u32 some = COLS > 1 ? FULL : 0;
    multiply32(d, b[0][i], b[0][j] & some, b[1][i], b[1][j] & some, v[0], v[1]);
    multiply32(d, b[2][i], b[2][j] & some, b[3][i], b[3][j] & some, v[2], v[3]);
#else
    multiply16(
        d, __byte_perm(b[0][pair], b[1][pair], 0x5410), __byte_perm(b[0][pair], b[1][pair], 0x7632),
        __byte_perm(b[2][pair], b[3][pair], 0x5410), __byte_perm(b[2][pair], b[3][pair], 0x7632), v[0], v[1]);
#endif
  }
}

__device__ inline Number column_of(const u32 (&row)[WORDS], int column) {
  if constexpr (SIZE == 4) return (Number)row[column];
  return (Number)(row[column / 2] >> column % 2 * 16);
}

__device__ inline Number value_at(const Matrix& a, int group, int tile, int row, int depth) {
  const i64 item = (i64)group * TILES + tile;
  const int at = row * DEPTH + depth;
#if MASKED
  const u32* mask = a.masks + item * 4;
  if (!(mask[at / 32] >> at % 32 & 1)) return 0;
  int before = a.starts[item] + __popc(mask[at / 32] & ((1u << at % 32) - 1));
#pragma unroll 1
  for (int i = 0; i < at / 32; ++i) before += __popc(mask[i]);
  return a.values[before];
#else
  return a.values[item * 128 + at];
#endif
}

// Where a sum is not finite: the same without the entries that are not there, which times Inf or NaN would be NaN.
__device__ inline void sum_exactly(
    float (&sums)[SUMS], const Matrix& a, const Work& work, const u8* b, i32 stride, i32 first, i32 n, int lane) {
#pragma unroll
  for (int i = 0; i < SUMS; ++i) sums[i] = 0;
#pragma unroll 1
  for (int group = work.begin; group < work.end; ++group)
#pragma unroll 1
    for (int depth = 0; depth < DEPTH; ++depth) {
      const i32 col = a.cols[(i64)group * DEPTH + depth];
      u32 row[WORDS];
      load_row(row, b, col, stride, first, n);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const Number value = col < 0 ? (Number)0 : value_at(a, group, tile, lane % 4 * 2 + r, depth);
          if (!is_zero(value))
#pragma unroll
            for (int c = 0; c < COLS; ++c) {
              float& sum = sums[(tile * PAIRS + c / 2) * 4 + c % 2 * 2 + r];
              sum = fmaf(to_float(value), to_float(column_of(row, c)), sum);
            }
        }
    }
}

__device__ inline void sum_segment(
    float (&sums)[SUMS], const Matrix& a, const Work& work, const u8* b, i32 stride, i32 first, i32 n, int lane) {
#pragma unroll
  for (int i = 0; i < SUMS; ++i) sums[i] = 0;
  Head next[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) next[u] = load_head(a, work.begin + u, work.end, lane);
  for (int group = work.begin; group < work.end; group += UNROLL) {
    u32 rows[UNROLL][4][WORDS], values[UNROLL][TILES][VALUE_WORDS];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const Head head = next[u];
      next[u] = load_head(a, group + UNROLL + u, work.end, lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) load_row(rows[u][i], b, head.cols.at[i], stride, first, n);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        load_values(values[u][tile], a, head, group + u, work.end, tile, lane);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
#if TYPE == 2
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int w = 0; w < WORDS; ++w) rows[u][i][w] = to_tf32(rows[u][i][w]);
#endif
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) multiply(sums, tile, rows[u], values[u][tile]);
    }
  }
  bool odd = false;
#pragma unroll
  for (int i = 0; i < SUMS; ++i) odd |= !(fabsf(sums[i]) <= 3.402823466e38f);
  if (__any_sync(FULL, odd)) sum_exactly(sums, a, work, b, stride, first, n, lane);
}

// The warps of a team add up what all of them have, each a share of it and in their order; the first one gets it.
__device__ inline void sum_team(float (&sums)[SUMS], u32 team, int warp, int lane) {
  __shared__ float shared[WARPS][SHARED][32];
  const int first = team & 15, warps = team >> 4 & 31;
#pragma unroll
  for (int at = 0; at < SUMS; at += SHARED) {
    if (at) __syncthreads();
#pragma unroll
    for (int i = 0; i < SHARED; ++i) shared[warp][i][lane] = sums[at + i];
    __syncthreads();
    for (int i = warp - first; i < SHARED; i += warps) {
      float sum = shared[first][i][lane];
      for (int other = 1; other < warps; ++other) sum += shared[first + other][i][lane];
      shared[first][i][lane] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SHARED; ++i) sums[at + i] = shared[warp][i][lane];
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) spmm_windows(
    const void* works, const i32* cols, const void* values, const u32* masks, const i32* starts, const i32* order,
    const u8* b, u8* c, float* partial, i32 rows, i32 n, i32 stride) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Work work = ((const Work*)works)[(i64)blockIdx.x * WARPS + warp];
  const Matrix a = {cols, (const Number*)values, masks, starts};
  const i32 first = blockIdx.y * TILE_COLS + lane / 4 * VEC;
  float sums[SUMS];
  sum_segment(sums, a, work, b, stride, first, n, lane);
  if (work.team >> 9 & 1) sum_team(sums, work.team, warp, lane);
  if (work.window < 0 || warp != (work.team & 15)) return;
  const i32 slot = (i32)(work.team >> 10) - 1;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = tile * 8 + lane % 4 * 2 + r;
      i32 row = work.window * ROWS + own;
      if (row >= rows) continue;
      if (order != nullptr) row = order[row];
#pragma unroll
      for (int l = 0; l < LOADS; ++l) {
        const i32 column = first + l * 8 * VEC;
        float all[VEC];
#pragma unroll
        for (int i = 0; i < VEC; ++i)
          all[i] = sums[(tile * PAIRS + (l * VEC + i) / 2) * 4 + (l * VEC + i) % 2 * 2 + r];
        if (column >= n) continue;
        if (slot < 0) {
          store_rounded(c + ((i64)row * n + column) * SIZE, all);
        } else {
          float* to = partial + ((i64)slot * ROWS + own) * n + column;
#pragma unroll
          for (int i = 0; i < VEC; ++i) to[i] = all[i];
        }
      }
    }
}

// Windows whose segments fill several blocks: `longs` has window, first slot and end slot of each.
extern "C" __global__ void spmm_windows_sum(
    const i32* longs, const i32* order, const float* partial, u8* c, i32 rows, i32 n) {
  const i32 *own = longs + blockIdx.x * 3, column = blockIdx.z * blockDim.x + threadIdx.x, in = blockIdx.y;
  i32 row = own[0] * ROWS + in;
  if (row >= rows || column >= n) return;
  if (order != nullptr) row = order[row];
  float sum[1] = {0};
  for (i32 slot = own[1]; slot < own[2]; ++slot) sum[0] += partial[((i64)slot * ROWS + in) * n + column];
  store_rounded(c + ((i64)row * n + column) * SIZE, sum);
}
