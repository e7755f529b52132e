// Documents grouped by likeness: spherical k-means over sparse rows, centres kept sparse.
#pragma once

#include <cstdint>
#include <vector>

#include "build.h"

namespace gossamer::retrieval {

struct Grouping {
  std::vector<uint32_t> order;   // documents, group after group
  std::vector<uint32_t> starts;  // groups + 1, places in `order`
  // The groups' centres as rows of unit length.
  std::vector<int64_t> centre_starts;
  std::vector<uint32_t> centre_columns;
  std::vector<float> centre_values;
};

// Groups of about `size` documents, of four times as many at most. Deterministic. Throws std::bad_alloc only.
Grouping group(const Rows& rows, uint32_t dim, uint32_t size, int threads);

// Rows in another order; the outputs have room for them all.
void permute(const Rows& rows, const uint32_t* order, int64_t* starts, uint32_t* columns, float* values, int threads);

}  // namespace gossamer::retrieval
