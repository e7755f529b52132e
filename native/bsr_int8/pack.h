// From stored blocks to what the kernels read.
#pragma once

#include "bsr.h"

namespace gossamer::bsr {

// Blocks in row-major order: `columns` [blocks] in units of blocks, ascending in each block row, whose first block is
// `starts` [block rows + 1]; `data` [blocks][4 rows][block columns].
struct Blocks {
  int64_t block_rows, cols;
  int block;
  const int64_t* starts;
  const int32_t* columns;
  const int8_t* data;
};

// Throws std::invalid_argument unless the columns ascend within the matrix.
void check(const Blocks& a);

// Where each block row's groups, or windows, start: [block rows + 1].
void count_groups(const Blocks& a, int64_t* starts);
void count_windows(const Blocks& a, int64_t* starts);

void fill_groups(const Blocks& a, const int64_t* starts, bool wide, int8_t* data, void* offsets);
void fill_windows(const Blocks& a, const int64_t* starts, int8_t* data, uint8_t* index, uint32_t* base);

// What Panels::data points to, and its bytes.
int64_t panel_bytes(const Blocks& a);
void fill_panels(const Blocks& a, int8_t* data);

// Each row's sum of weights: [4 * block rows].
void sum_rows(const Blocks& a, int32_t* sums);

}  // namespace gossamer::bsr
