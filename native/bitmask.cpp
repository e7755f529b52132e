#include "bitmask.h"

#include <stdexcept>

#include "isa.h"
#include "parallel.h"

namespace gossamer {
namespace {

const BitmaskRow& kernels() {
  switch (isa::active()) {
#ifdef GOSSAMER_X86
    case isa::Isa::avx512: return bitmask_avx512;
    case isa::Isa::avx2: return bitmask_avx2;
#endif
    default: return bitmask_scalar;
  }
}

int log2_size(int itemsize) {
  switch (itemsize) {
    case 1: return 0;
    case 2: return 1;
    case 4: return 2;
    case 8: return 3;
    default: throw std::invalid_argument("itemsize must be 1, 2, 4 or 8");
  }
}

// -0.0 is a zero: of a float, every bit but the sign counts.
uint64_t significant_bits(int itemsize, bool is_float) { return ~uint64_t{0} >> (64 - 8 * itemsize + is_float); }

template <class T>
T* at(uintptr_t pointer, int64_t offset) {
  return reinterpret_cast<T*>(pointer) + offset;
}

void unpack_rows(BitmaskRow::Unpack unpack, uintptr_t mask, uintptr_t values, uintptr_t offsets, int64_t rows,
                 int64_t cols, int itemsize, uintptr_t dst, int64_t dst_row_stride_bytes, int threads) {
  const int64_t row_bytes = (cols + 7) / 8;
  const int64_t* first = at<const int64_t>(offsets, 0);
  const char* end = at<const char>(values, first[rows] * itemsize);
  parallel_rows(rows, rows * cols * itemsize, threads, [=](int64_t begin, int64_t stop) {
    for (int64_t r = begin; r < stop; ++r)
      unpack(at<const uint8_t>(mask, r * row_bytes), at<const char>(values, first[r] * itemsize), end, cols,
             at<char>(dst, r * dst_row_stride_bytes));
  });
}

}  // namespace

void bitmask_count(uintptr_t src, int64_t rows, int64_t cols, int64_t row_stride_bytes, int itemsize, bool is_float,
                   uintptr_t counts, int threads) {
  const auto count = kernels().count[log2_size(itemsize)];
  const uint64_t significant = significant_bits(itemsize, is_float);
  parallel_rows(rows, rows * cols * itemsize, threads, [=](int64_t begin, int64_t stop) {
    for (int64_t r = begin; r < stop; ++r)
      *at<int64_t>(counts, r) = count(at<const char>(src, r * row_stride_bytes), cols, significant);
  });
}

void bitmask_pack(uintptr_t src, int64_t rows, int64_t cols, int64_t row_stride_bytes, int itemsize, bool is_float,
                  uintptr_t mask, uintptr_t offsets, uintptr_t values, int threads) {
  const auto pack = kernels().pack[log2_size(itemsize)];
  const uint64_t significant = significant_bits(itemsize, is_float);
  const int64_t row_bytes = (cols + 7) / 8;
  const int64_t* first = at<const int64_t>(offsets, 0);
  parallel_rows(rows, rows * cols * itemsize, threads, [=](int64_t begin, int64_t stop) {
    for (int64_t r = begin; r < stop; ++r)
      pack(at<const char>(src, r * row_stride_bytes), cols, significant, at<uint8_t>(mask, r * row_bytes),
           at<char>(values, first[r] * itemsize), at<char>(values, first[r + 1] * itemsize));
  });
}

void bitmask_unpack(uintptr_t mask, uintptr_t values, uintptr_t offsets, int64_t rows, int64_t cols, int itemsize,
                    uintptr_t dst, int64_t dst_row_stride_bytes, int threads) {
  unpack_rows(kernels().unpack[log2_size(itemsize)], mask, values, offsets, rows, cols, itemsize, dst,
              dst_row_stride_bytes, threads);
}

void bitmask_unpack_bf16_f32(uintptr_t mask, uintptr_t values, uintptr_t offsets, int64_t rows, int64_t cols,
                             uintptr_t dst, int64_t dst_row_stride_bytes, int threads) {
  unpack_rows(kernels().unpack_bf16_f32, mask, values, offsets, rows, cols, 2, dst, dst_row_stride_bytes, threads);
}

void popcount_rows(uintptr_t mask, int64_t rows, int64_t row_bytes, uintptr_t counts, int threads) {
  const auto popcount = kernels().popcount;
  parallel_rows(rows, rows * row_bytes, threads, [=](int64_t begin, int64_t stop) {
    for (int64_t r = begin; r < stop; ++r)
      *at<int64_t>(counts, r) = popcount(at<const uint8_t>(mask, r * row_bytes), row_bytes);
  });
}

}  // namespace gossamer
