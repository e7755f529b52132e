// Bitmask decode and encode. One warp takes one tile: up to 1,024 columns of one row, 32 of them per lane's mask word.
// Macros: BYTES of a value (1, 2, 4, 8); VEC values per lane and access (1, or 16 / BYTES where rows lie at multiples of
// 16 bytes).
#include "types.cuh"

using T = Unsigned<BYTES>::type;
using Lot = Vector<T, VEC>;
constexpr int WARPS = 4, TILE = 1024, COUNTED = 8, STEPS = TILE / (32 * VEC), CHUNK = 16 / BYTES;

struct Tile {
  i64 index, row;
  i64 first;  // column
  int width;  // columns, 1 to TILE
  int lane;
  bool exists;
};

__device__ inline Tile tile_at(i64 index, i64 rows, i64 cols) {
  const i64 per_row = (cols + TILE - 1) / TILE, row = rows == 1 ? index >= per_row : index / per_row;
  const i64 first = (index - row * per_row) * TILE;
  const bool exists = index >= 0 && row < rows;
  return {index, row, first, (int)clamp(cols - first, 0, TILE), (int)(threadIdx.x % 32), exists};
}

__device__ inline i64 warp_index() { return (i64)blockIdx.x * WARPS + threadIdx.x / 32; }

// The lane's 32 columns; zeros past the end of the row.
__device__ inline u32 load_word(const u8* mask, const Tile& t, i64 cols) {
  const u8* bytes = mask + t.row * ((cols + 7) / 8) + t.first / 8 + t.lane * 4;
  const int left = (t.width + 7) / 8 - t.lane * 4;
  if (left >= 4 && aligned(bytes, 4)) return *(const u32*)bytes;
  u32 word = 0;
  for (int i = 0; i < 4; ++i)
    if (i < left) word |= (u32)bytes[i] << 8 * i;
  return word;
}

__device__ inline void store_word(u32 word, u8* mask, const Tile& t, i64 cols) {
  u8* bytes = mask + t.row * ((cols + 7) / 8) + t.first / 8 + t.lane * 4;
  const int left = (t.width + 7) / 8 - t.lane * 4;
  if (left >= 4 && aligned(bytes, 4)) {
    *(u32*)bytes = word;
    return;
  }
  for (int i = 0; i < 4; ++i)
    if (i < left) bytes[i] = word >> 8 * i;
}

__device__ inline Lot load(const T* from, int column, int width) {
  if (column + VEC <= width) return *(const Lot*)(from + column);
  Lot lot = {};
#pragma unroll
  for (int v = 0; v < VEC; ++v)
    if (column + v < width) lot.at[v] = from[column + v];
  return lot;
}

// counts[0] = 0 and counts[i + 1] = non-zeros of tile i: a cumulative sum makes offsets of them.
__device__ inline void store_count(u32 word, i64* counts, const Tile& t) {
  const u32 total = __reduce_add_sync(FULL, __popc(word));
  if (t.lane == 0) counts[t.index + 1] = total;
  if (t.lane == 0 && t.index == 0) counts[0] = 0;
}

// A tile is so little to read that each warp takes COUNTED of them: starting blocks would take longer.
extern "C" __global__ void __launch_bounds__(WARPS * 32) count(const u8* mask, i64* counts, i64 rows, i64 cols) {
  Tile tiles[COUNTED];
  u32 words[COUNTED];
#pragma unroll
  for (int i = 0; i < COUNTED; ++i) {
    tiles[i] = tile_at(warp_index() * COUNTED + i, rows, cols);
    words[i] = tiles[i].exists ? load_word(mask, tiles[i], cols) : 0;
  }
#pragma unroll
  for (int i = 0; i < COUNTED; ++i)
    if (tiles[i].exists) store_count(words[i], counts, tiles[i]);
}

// A mask with more bits than there are values reads none past the last.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    unpack(const T* values, const u8* mask, const i64* offsets, T* dense, i64 nnz, i64 rows, i64 cols) {
  const Tile t = tile_at(warp_index(), rows, cols);
  if (!t.exists) return;
  const i64 start = offsets[t.index];
  const u32 word = load_word(mask, t, cols);
  const i32 before = sum_before(__popc(word), t.lane);
  const T* from = values + start;
  const int left = clamp(nnz - start, 0, TILE);
  T* to = dense + t.row * cols + t.first;
#pragma unroll(STEPS < 8 ? STEPS : 8)
  for (int step = 0; step < STEPS; ++step) {
    const int source = step * VEC + t.lane * VEC / 32, shift = t.lane * VEC % 32;
    const u32 bits = __shfl_sync(FULL, word, source);
    i32 at = __shfl_sync(FULL, before, source) + __popc(bits & ((1u << shift) - 1));
    Lot lot;
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const bool set = bits >> (shift + v) & 1;
      lot.at[v] = set && at < left ? from[at] : (T)0;
      at += set;
    }
    const int column = (step * 32 + t.lane) * VEC;
    if (column + VEC <= t.width) {
      *(Lot*)(to + column) = lot;
    } else {
#pragma unroll
      for (int v = 0; v < VEC; ++v)
        if (column + v < t.width) to[column + v] = lot.at[v];
    }
  }
}

// A value is zero if none of its bits in `magnitude` is set: all bits, but for the sign of floats.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    mark(const T* dense, u8* mask, i64* counts, u64 magnitude, i64 rows, i64 cols, i64 stride) {
  const Tile t = tile_at(warp_index(), rows, cols);
  if (!t.exists) return;
  const T* from = dense + t.row * stride + t.first;
  u32 word = 0;
#pragma unroll(STEPS < 16 ? STEPS : 16)
  for (int step = 0; step < STEPS; ++step) {
    const Lot lot = load(from, (step * 32 + t.lane) * VEC, t.width);
    u32 bits = 0;
#pragma unroll
    for (int v = 0; v < VEC; ++v) bits |= (u32)((lot.at[v] & (T)magnitude) != 0) << v;
    // Neighbours that share a word put it together, then lane w takes word w if this step made it.
    if constexpr (VEC == 1) {
      bits = __ballot_sync(FULL, bits);
    } else {
      bits <<= t.lane * VEC % 32;
#pragma unroll
      for (int d = 1; d < 32 / VEC; d *= 2) bits |= __shfl_xor_sync(FULL, bits, d);
      bits = __shfl_sync(FULL, bits, t.lane % VEC * (32 / VEC));
    }
    if (t.lane / VEC == step) word = bits;
  }
  store_word(word, mask, t, cols);
  store_count(word, counts, t);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    pack(const T* dense, const u8* mask, const i64* offsets, T* values, i64 rows, i64 cols, i64 stride) {
  // Laid out as the values will be, so that 16 bytes that lie together there lie together here.
  __shared__ alignas(16) T staged[WARPS][TILE + CHUNK];
  // Backwards: what `mark` read last is still in the cache.
  const i64 tiles = rows * ((cols + TILE - 1) / TILE);
  const Tile t = tile_at(tiles - 1 - warp_index(), rows, cols);
  if (!t.exists) return;
  const i64 start = offsets[t.index];
  const int skew = start % CHUNK, end = skew + (int)(offsets[t.index + 1] - start);
  const u32 word = load_word(mask, t, cols);
  const i32 before = sum_before(__popc(word), t.lane);
  const T* from = dense + t.row * stride + t.first;
  T* stage = staged[threadIdx.x / 32];
#pragma unroll(STEPS < 8 ? STEPS : 8)
  for (int step = 0; step < STEPS; ++step) {
    const Lot lot = load(from, (step * 32 + t.lane) * VEC, t.width);
    const int source = step * VEC + t.lane * VEC / 32, shift = t.lane * VEC % 32;
    const u32 bits = __shfl_sync(FULL, word, source);
    i32 at = skew + __shfl_sync(FULL, before, source) + __popc(bits & ((1u << shift) - 1));
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const bool set = bits >> (shift + v) & 1;
      if (set) stage[at] = lot.at[v];
      at += set;
    }
  }
  __syncwarp();
  T* to = values + start - skew;
  for (int i = t.lane * CHUNK; i < end; i += 32 * CHUNK) {
    if (i >= skew && i + CHUNK <= end) {
      *(Vector<T, CHUNK>*)(to + i) = *(const Vector<T, CHUNK>*)(stage + i);
    } else {
      for (int v = i; v < i + CHUNK; ++v)
        if (v >= skew && v < end) to[v] = stage[v];
    }
  }
}
