// A matrix as row-padded bits (bit j of byte b = column 8 b + j) and its non-zero values, row after row.
#pragma once

#include <cstdint>

namespace gossamer {

// The kernels of one ISA, one row a call; arrays are indexed by log2(bytes per element).
// A non-zero is an element with a bit set under `significant`. Nothing is read or written past the ends given.
struct BitmaskRow {
  using Count = int64_t (*)(const void* src, int64_t cols, uint64_t significant);
  using Pack = void (*)(const void* src, int64_t cols, uint64_t significant, uint8_t* mask, void* out, void* out_end);
  using Unpack = void (*)(const uint8_t* mask, const void* values, const void* values_end, int64_t cols, void* dst);
  using Popcount = int64_t (*)(const uint8_t* mask, int64_t bytes);

  Count count[4];
  Pack pack[4];
  Unpack unpack[4];
  Unpack unpack_bf16_f32;
  Popcount popcount;
};

extern const BitmaskRow bitmask_scalar;
#ifdef GOSSAMER_X86
extern const BitmaskRow bitmask_avx2;
extern const BitmaskRow bitmask_avx512;
#endif

// Pointers come from Python as integers. offsets has rows + 1 entries, in elements: row r owns
// values[offsets[r] : offsets[r + 1]].
void bitmask_count(uintptr_t src, int64_t rows, int64_t cols, int64_t row_stride_bytes, int itemsize, bool is_float,
                   uintptr_t counts, int threads);
void bitmask_pack(uintptr_t src, int64_t rows, int64_t cols, int64_t row_stride_bytes, int itemsize, bool is_float,
                  uintptr_t mask, uintptr_t offsets, uintptr_t values, int threads);
void bitmask_unpack(uintptr_t mask, uintptr_t values, uintptr_t offsets, int64_t rows, int64_t cols, int itemsize,
                    uintptr_t dst, int64_t dst_row_stride_bytes, int threads);
void bitmask_unpack_bf16_f32(uintptr_t mask, uintptr_t values, uintptr_t offsets, int64_t rows, int64_t cols,
                             uintptr_t dst, int64_t dst_row_stride_bytes, int threads);
void popcount_rows(uintptr_t mask, int64_t rows, int64_t row_bytes, uintptr_t counts, int threads);

}  // namespace gossamer
