// The reference of the vector kernels: every CPU, every layout, exact integer sums.
#include <array>

#include "common.h"

namespace gossamer::bsr {
namespace {

void blocks(const Weights& a, const Input& x, const Output& out, const Range& range) {
  for (int64_t b = range.token_begin; b < range.token_end; ++b) {
    const int64_t width = width_of(x.tokens, b), quad = a.block == 4 ? 4 : 1;
    const uint8_t* block = x.data + block_start(x.layout, a.cols, b);
    for (int64_t row = range.row_begin; row < range.row_end; ++row) {
      std::array<int32_t, 4 * block_tokens> sums{};
      for (int64_t g = a.groups.starts[row]; g < a.groups.starts[row + 1]; ++g)
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t at = quad == 4 ? offset_at(a.groups, g) : offset_at(a.groups, 4 * g + j);
          const uint8_t* channel = block + at / 8 * width + (quad == 4 ? j : 0);
          for (int64_t r = 0; r < 4; ++r)
            for (int64_t t = 0; t < width; ++t)
              sums[static_cast<size_t>(r * width + t)] += a.groups.data[16 * g + 4 * r + j] * channel[quad * t];
        }
      finish_tile(a, x, out, row, b * block_tokens, width, sums.data());
    }
  }
}

void windows(const Weights& a, const Input& x, const Output& out, const Range& range) {
  const Windows& w = a.windows;
  for (int64_t token = range.token_begin; token < range.token_end; ++token)
    for (int64_t row = range.row_begin; row < range.row_end; ++row) {
      int32_t sums[4] = {};
      for (int64_t g = w.starts[row]; g < w.starts[row + 1]; ++g)
        for (int64_t j = 0; j < 16; ++j) {
          const int channel = x.data[token * x.stride + w.base[g] + w.index[16 * g + j]];
          for (int64_t r = 0; r < 4; ++r) sums[r] += w.data[64 * g + 16 * r + j] * channel;
        }
      finish_tile(a, x, out, row, token, 1, sums);
    }
}

}  // namespace

const Kernels scalar_kernels{blocks, windows, quantise_plain};

}  // namespace gossamer::bsr
