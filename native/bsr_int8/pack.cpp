#include "pack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace gossamer::bsr {
namespace {

constexpr int64_t window = 128, window_columns = 16;
constexpr int64_t panel_padding = 64;  // bytes: what is read past the last value

// Single columns of a block row, blocks of four taken apart: body(column, weights of its 4 rows, their stride).
template <class Body>
void each_column(const Blocks& a, int64_t row, const Body& body) {
  for (int64_t i = a.starts[row]; i < a.starts[row + 1]; ++i)
    for (int64_t j = 0; j < a.block; ++j) {
      const int64_t column = int64_t{a.columns[i]} * a.block + j;
      if (column < a.cols) body(column, a.data + 4 * a.block * i + j, a.block);
    }
}

// Columns are taken in turn for as long as they fit: new_group(first column), then add(place, column, weights, stride).
template <class New, class Add>
void each_window(const Blocks& a, int64_t row, const New& new_group, const Add& add) {
  int64_t first = 0, used = window_columns;
  each_column(a, row, [&](int64_t column, const int8_t* weights, int64_t stride) {
    if (used == window_columns || column - first >= window) {
      new_group(column);
      first = column;
      used = 0;
    }
    add(used++, column - first, weights, stride);
  });
}

void set_offset(void* offsets, bool wide, int64_t at, int64_t offset) {
  if (wide) static_cast<uint32_t*>(offsets)[at] = static_cast<uint32_t>(offset);
  else static_cast<uint16_t*>(offsets)[at] = static_cast<uint16_t>(offset);
}

int64_t panels_of(const Blocks& a) { return (a.block_rows + panel_rows - 1) / panel_rows; }
int64_t chunks_of(const Blocks& a) { return (a.cols + 63) / 64; }
int64_t values_start(const Blocks& a) { return 8 * panels_of(a) * (1 + panel_rows * chunks_of(a)); }

struct Column {
  int64_t at;
  const int8_t* weights;
  int64_t stride;
};
using Columns = std::vector<Column>;

// In descending order, to be taken from the back; none past the last block row.
Columns columns_of(const Blocks& a, int64_t row) {
  Columns found;
  if (row < a.block_rows)
    each_column(a, row, [&](int64_t at, const int8_t* from, int64_t stride) { found.push_back({at, from, stride}); });
  std::reverse(found.begin(), found.end());
  return found;
}

// Takes what lies in chunk c; where the values go on.
int8_t* fill_chunk(Columns& left, int64_t c, int8_t* mask, int8_t* values) {
  uint64_t bits = 0;
  Columns here;
  for (; !left.empty() && left.back().at < 64 * (c + 1); left.pop_back()) {
    bits |= uint64_t{1} << (left.back().at % 64);
    here.push_back(left.back());
  }
  std::memcpy(mask, &bits, 8);
  for (int64_t r = 0; r < 4; ++r)
    for (const Column& column : here) *values++ = column.weights[r * column.stride];
  return values;
}

int64_t offset_of(const Blocks& a, int32_t column) { return int64_t{column} * (a.block == 4 ? 32 : 8); }

}  // namespace

void check(const Blocks& a) {
  const int64_t across = (a.cols + a.block - 1) / a.block;
  for (int64_t row = 0; row < a.block_rows; ++row) {
    int64_t before = -1;
    if (a.starts[row + 1] < a.starts[row]) throw std::invalid_argument("bsr_int8: starts of block rows do not ascend");
    for (int64_t i = a.starts[row]; i < a.starts[row + 1]; ++i) {
      if (a.columns[i] <= before || a.columns[i] >= across)
        throw std::invalid_argument("bsr_int8: columns of block row " + std::to_string(row) + " do not ascend within " +
                                    std::to_string(across));
      before = a.columns[i];
    }
  }
}

void count_groups(const Blocks& a, int64_t* starts) {
  starts[0] = 0;
  for (int64_t row = 0; row < a.block_rows; ++row) {
    const int64_t blocks = a.starts[row + 1] - a.starts[row];
    starts[row + 1] = starts[row] + (a.block == 4 ? blocks : (blocks + 3) / 4);
  }
}

void count_windows(const Blocks& a, int64_t* starts) {
  starts[0] = 0;
  for (int64_t row = 0; row < a.block_rows; ++row) {
    int64_t groups = 0;
    each_window(a, row, [&](int64_t) { ++groups; }, [](int64_t, int64_t, const int8_t*, int64_t) {});
    starts[row + 1] = starts[row] + groups;
  }
}

void fill_groups(const Blocks& a, const int64_t* starts, bool wide, int8_t* data, void* offsets) {
  std::memset(data, 0, static_cast<size_t>(16 * starts[a.block_rows]));
  for (int64_t row = 0; row < a.block_rows; ++row) {
    const int64_t blocks = a.starts[row + 1] - a.starts[row], first = a.starts[row];
    if (a.block == 4) {
      for (int64_t i = 0; i < blocks; ++i)
        set_offset(offsets, wide, starts[row] + i, offset_of(a, a.columns[first + i]));
      if (blocks != 0) std::memcpy(data + 16 * starts[row], a.data + 16 * first, static_cast<size_t>(16 * blocks));
      continue;
    }
    // The last group is filled up with zeros at the last column.
    for (int64_t i = 0; i < (blocks + 3) / 4 * 4; ++i)
      set_offset(offsets, wide, 4 * starts[row] + i, offset_of(a, a.columns[first + std::min(i, blocks - 1)]));
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t r = 0; r < 4; ++r)
        data[16 * (starts[row] + i / 4) + 4 * r + i % 4] = a.data[4 * (first + i) + r];
  }
}

void fill_windows(const Blocks& a, const int64_t* starts, int8_t* data, uint8_t* index, uint32_t* base) {
  std::memset(data, 0, static_cast<size_t>(64 * starts[a.block_rows]));
  std::memset(index, 0, static_cast<size_t>(16 * starts[a.block_rows]));
  for (int64_t row = 0; row < a.block_rows; ++row) {
    int64_t group = starts[row] - 1;
    each_window(
        a, row, [&](int64_t column) { base[++group] = static_cast<uint32_t>(column); },
        [&](int64_t place, int64_t from_base, const int8_t* weights, int64_t stride) {
          index[16 * group + place] = static_cast<uint8_t>(from_base);
          for (int64_t r = 0; r < 4; ++r) data[64 * group + 16 * r + place] = weights[r * stride];
        });
  }
}

int64_t panel_bytes(const Blocks& a) {
  int64_t columns = 0;
  for (int64_t row = 0; row < a.block_rows; ++row)
    each_column(a, row, [&](int64_t, const int8_t*, int64_t) { ++columns; });
  return values_start(a) + 4 * columns + panel_padding;
}

void fill_panels(const Blocks& a, int8_t* data) {
  const int64_t chunks = chunks_of(a);
  std::memset(data, 0, static_cast<size_t>(values_start(a)));
  int8_t* masks = data + 8 * panels_of(a);
  int8_t* values = data + values_start(a);
  std::vector<Columns> rows(panel_rows);
  for (int64_t panel = 0; panel < panels_of(a); ++panel, masks += 8 * panel_rows * chunks) {
    const int64_t start = values - data;
    std::memcpy(data + 8 * panel, &start, 8);
    for (int64_t i = 0; i < panel_rows; ++i) rows[static_cast<size_t>(i)] = columns_of(a, panel * panel_rows + i);
    for (int64_t c = 0; c < chunks; ++c)
      for (int64_t i = 0; i < panel_rows; ++i)
        values = fill_chunk(rows[static_cast<size_t>(i)], c, masks + 8 * (panel_rows * c + i), values);
  }
  std::memset(values, 0, panel_padding);
}

void sum_rows(const Blocks& a, int32_t* sums) {
  for (int64_t row = 0; row < a.block_rows; ++row) {
    std::memset(sums + 4 * row, 0, 16);
    each_column(a, row, [&](int64_t, const int8_t* weights, int64_t stride) {
      for (int64_t r = 0; r < 4; ++r) sums[4 * row + r] += weights[r * stride];
    });
  }
}

}  // namespace gossamer::bsr
