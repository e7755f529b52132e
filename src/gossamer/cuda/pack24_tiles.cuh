// What is 2:4 both ways. `search24`: of every 4 x 4 tile the best of the 90 masks with two per row and column (FST,
// 2404.01847, section 5.1), as four nibbles of metadata, one a row. `pack24_tiles`: the matrix under such masks, and its
// transpose, compressed. Macro: BF16.
#include "pack24.cuh"

constexpr int PITCH = 66;  // values of a row in shared memory: neighbours in a column lie in different banks
__device__ constexpr u32 PAIRS = 0xed9c84;  // the nibbles of (0,1) (0,2) (0,3) (1,2) (1,3) (2,3)
__device__ constexpr u32 nibble_of_pair(int pair) { return PAIRS >> 4 * pair & 15; }
__device__ constexpr u32 bits_of(u32 nibble) { return 1u << (nibble & 3) | 1u << (nibble >> 2); }

struct Fair {
  u8 pairs[90][4];
};
__device__ constexpr Fair all_fair() {
  Fair found = {};
  int count = 0;
  for (int code = 0; code < 6 * 6 * 6 * 6; ++code) {
    const int pairs[4] = {code / 216, code / 36 % 6, code / 6 % 6, code % 6};
    bool fair = true;
    for (int c = 0; c < 4; ++c) {
      int kept = 0;
      for (int r = 0; r < 4; ++r) kept += bits_of(nibble_of_pair(pairs[r])) >> c & 1;
      fair = fair && kept == 2;
    }
    if (!fair) continue;
    for (int r = 0; r < 4; ++r) found.pairs[count][r] = pairs[r];
    ++count;
  }
  return found;
}

struct Masks {
  static constexpr Fair fair = all_fair();  // found once: the compiler would take seconds to do it in each of 90 places
};

// Sums of the pairs of each row -> the nibbles of the first best mask.
template <int I> __device__ inline void try_mask(const float (&sums)[4][6], float& best, u32& chosen) {
  constexpr int A = Masks::fair.pairs[I][0], B = Masks::fair.pairs[I][1], C = Masks::fair.pairs[I][2],
                D = Masks::fair.pairs[I][3];
  constexpr u32 CODE =
      nibble_of_pair(A) | nibble_of_pair(B) << 4 | nibble_of_pair(C) << 8 | nibble_of_pair(D) << 12;
  const float score = sums[0][A] + sums[1][B] + sums[2][C] + sums[3][D];
  if (I == 0 || score > best) best = score, chosen = CODE;
  if constexpr (I + 1 < 90) try_mask<I + 1>(sums, best, chosen);
}

// Not less than nothing, NaN above all.
__device__ inline float magnitude(u16 bits) {
  const float a = fabsf(widen(bits));
  return a == a ? a : __int_as_float(0x7f800000);
}

// A thread takes two tiles side by side. Grid: ceil(rows / 4 * cols / 8 / 128), block 128.
extern "C" __global__ void __launch_bounds__(128) search24(const u16* w, u16* masks, i64 rows, i64 cols) {
  const i64 i = (i64)blockIdx.x * 128 + threadIdx.x, wide = cols / 8, row = i / wide * 4, col = i % wide * 8;
  if (row >= rows) return;
  alignas(16) u16 v[4][8];
#pragma unroll
  for (int r = 0; r < 4; ++r) *(uint4*)v[r] = *(const uint4*)(w + (row + r) * cols + col);
  u32 found[2];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    float sums[4][6];
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int p = 0; p < 6; ++p) {
        const u32 nibble = nibble_of_pair(p);
        sums[r][p] = magnitude(v[r][4 * t + (nibble & 3)]) + magnitude(v[r][4 * t + (nibble >> 2)]);
      }
    float best = 0;
    try_mask<0>(sums, best, found[t]);
  }
  *(u32*)(masks + row / 4 * (cols / 4) + col / 4) = found[0] | found[1] << 16;
}

// Four nibbles, one a row -> those of the columns.
__device__ inline u32 turned(u32 nibbles) {
  u32 x = 0, t;
#pragma unroll
  for (int i = 0; i < 16; i += 4) x |= bits_of(nibbles >> i & 15) << i;
  t = (x ^ x >> 3) & 0x0a0a, x ^= t ^ t << 3;
  t = (x ^ x >> 6) & 0x00cc, x ^= t ^ t << 6;  // the bits of a column side by side
  u32 found = 0;
#pragma unroll
  for (int i = 0; i < 16; i += 4) found |= nibble_of(x >> i & 15) << i;
  return found;
}

// The rows of the tile, or with T its columns. `kept`: nibbles by tiles of 4 x 4, in the same order.
template <bool T> __device__ inline Unit unit_of(const u16* tile, const u16 (&kept)[16][16], int line, int wide) {
  constexpr int DOWN = T ? 1 : PITCH, ALONG = T ? PITCH : 1;
  Unit packed = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    alignas(16) u16 codes[8];
    *(uint4*)codes = *(const uint4*)&kept[line / 4 + 2 * half][wide / 4];
#pragma unroll
    for (int g = 0; g < 8; ++g) {
      const u32 nibble = codes[g] >> 4 * (line % 4) & 15;
      const u16* from = tile + (line + 8 * half) * DOWN + (wide + 4 * g) * ALONG;
      const u32 low = plain_zero(from[(nibble & 3) * ALONG]), high = plain_zero(from[(nibble >> 2) * ALONG]);
      packed.put(half, g, {low | high << 16, nibble});
    }
  }
  return packed;
}

// A block takes 64 x 64; one half of its threads compresses the rows, the other the columns. Grid: (cols / 64, rows /
// 64), block 128.
extern "C" __global__ void __launch_bounds__(128)
    pack24_tiles(const u16* w, const u16* masks, u8* out, u8* out_t, i64 rows, i64 cols) {
  __shared__ __align__(16) u16 tile[64 * PITCH];
  __shared__ __align__(16) u16 kept[16][16];
  __shared__ __align__(16) u16 kept_t[16][16];
  const i64 top = (i64)blockIdx.y * 64, left = (i64)blockIdx.x * 64;
  const int thread = threadIdx.x;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int i = thread + 128 * j;
    const uint4 piece = *(const uint4*)(w + (top + i / 8) * cols + left + i % 8 * 8);
    u32* to = (u32*)(tile + i / 8 * PITCH + i % 8 * 8);
    to[0] = piece.x, to[1] = piece.y, to[2] = piece.z, to[3] = piece.w;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int i = thread + 128 * j;
    const u16 code = masks[(top / 4 + i / 16) * (cols / 4) + left / 4 + i % 16];
    kept[i / 16][i % 16] = code, kept_t[i % 16][i / 16] = turned(code);
  }
  __syncthreads();
  const int unit = thread % 64, wide = unit / 32 * 32, line = unit / 8 % 4 * 16 + unit % 8;
  const bool turn = thread >= 64;
  const Unit packed = turn ? unit_of<true>(tile, kept_t, line, wide) : unit_of<false>(tile, kept, line, wide);
  const i64 row = turn ? left : top, col = turn ? top : left, high = turn ? cols : rows, across = turn ? rows : cols;
  packed.store<true>(turn ? out_t : out, row + line, col + wide, high, across);
}
