// 2:4 matrices pruned and compressed in one pass, in the layout that cuSPARSELt uses on Hopper: the values [rows, cols/2]
// row after row, then 4 bits a group of four: two indices of 2 bits. These nibbles lie by tiles of 64 x 64, 512 bytes each
// and row of tiles after row of tiles; see `meta_at`. cuda_patterns.py compares it with the library's own before use.
#include "float16.cuh"

using Four = u16[4];
constexpr float TINY = 1.17549435e-38f;

// The two of four at `first` < `second`, and where they are.
struct Pair {
  u32 values, nibble;
};
__device__ inline u16 plain_zero(u16 bits) { return bits == 0x8000 ? 0 : bits; }

// The nibble of a mask of four bits, two of them set: the 16 by the masks.
__device__ inline u32 nibble_of(u32 mask) { return (u32)(0xe0dc009804000ull >> 4 * mask) & 15; }

// 32 bytes of each of two neighbouring threads, at `own` and `other`. Each stores a half of either, so that both store
// whole sectors. All threads of the warp take part.
__device__ inline void store32(u8* own, u8* other, const u32* words) {
  const bool odd = threadIdx.x & 1;
  u32 got[4], kept[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    kept[i] = odd ? words[4 + i] : words[i];
    got[i] = __shfl_xor_sync(FULL, odd ? words[i] : words[4 + i], 1);
  }
  uint4* even = (uint4*)(odd ? other : own) + odd;
  uint4* next = (uint4*)(odd ? own : other) + odd;
  *even = odd ? uint4{got[0], got[1], got[2], got[3]} : uint4{kept[0], kept[1], kept[2], kept[3]};
  *next = odd ? uint4{kept[0], kept[1], kept[2], kept[3]} : uint4{got[0], got[1], got[2], got[3]};
}

// 8 groups of rows r and r + 8, r % 16 < 8: what one thread compresses. `col` in groups' columns, a multiple of 32.
struct Unit {
  u32 values[2][8];
  u64 meta;

  __device__ void put(int half, int group, Pair pair) {
    values[half][group] = pair.values;
    meta |= (u64)pair.nibble << 4 * (half + (group >> 2) * 2 + (group & 3) * 4);
  }
  __device__ static i64 meta_at(i64 row, i64 col, i64 cols) {
    const i64 tile = (row >> 6) * (cols >> 6) + (col >> 6);
    return tile * 512 + (col >> 5 & 1) * 256 + (row >> 4 & 3) * 64 + (row & 7) * 8;
  }
  // A neighbour has the same row and the next columns, or with BELOW the same columns and the next row.
  template <bool BELOW> __device__ void store(u8* out, i64 row, i64 col, i64 rows, i64 cols) const {
    const i64 apart = (BELOW ? cols : 32) * (threadIdx.x & 1 ? -1 : 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u8* own = out + (row + 8 * half) * cols + col;  // cols / 2 values of 2 bytes a row
      store32(own, own + apart, values[half]);
    }
    *(u64*)(out + rows * cols + meta_at(row, col, cols)) = meta;
  }
};

// Where the two largest magnitudes of four are, of equal ones the first, and the bits of the third. Magnitudes are in
// the order of their bits, NaN above all.
struct Top {
  u32 nibble, third;
};
__device__ inline Top top_of(const Four& v) {
  u32 key[4];
#pragma unroll
  for (u32 i = 0; i < 4; ++i) key[i] = (v[i] & 0x7fffu) << 2 | (3 - i);  // the place besides, so that none are equal
  const u32 high0 = max(key[0], key[1]), low0 = min(key[0], key[1]), high1 = max(key[2], key[3]),
            low1 = min(key[2], key[3]), high = min(high0, high1), low = max(low0, low1);
  const u32 one = max(high0, high1) & 3, two = max(high, low) & 3;
  return {(max(one, two) | min(one, two) << 2) ^ 15, min(high, low) >> 2};
}
