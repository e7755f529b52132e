#include "checksum.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../parallel.h"

namespace gossamer::retrieval {
namespace {

constexpr uint64_t block_bytes = uint64_t{1} << 20;
constexpr int lanes = 8;

// A bijection of h and of word: equal inputs but for one word never meet again.
uint64_t mix(uint64_t h, uint64_t word) {
  h = (h ^ word) * 0x9e3779b97f4a7c15u;
  return h << 29 | h >> 35;
}

uint64_t block_sum(const char* data, uint64_t bytes) {
  uint64_t h[lanes];
  for (int i = 0; i < lanes; ++i) h[i] = 0x243f6a8885a308d3u + static_cast<uint64_t>(i);
  uint64_t words[lanes];
  uint64_t at = 0;
  for (; at + sizeof words <= bytes; at += sizeof words) {
    std::memcpy(words, data + at, sizeof words);
    for (int i = 0; i < lanes; ++i) h[i] = mix(h[i], words[i]);
  }
  std::memset(words, 0, sizeof words);
  if (at < bytes) std::memcpy(words, data + at, bytes - at);
  uint64_t sum = bytes;
  for (int i = 0; i < lanes; ++i) sum = mix(sum, mix(h[i], words[i]));
  return sum;
}

}  // namespace

uint64_t checksum(const void* data, uint64_t bytes, int threads) {
  const char* from = static_cast<const char*>(data);
  std::vector<uint64_t> sums((bytes + block_bytes - 1) / block_bytes);
  parallel_rows(static_cast<int64_t>(sums.size()), static_cast<int64_t>(bytes), threads,
                [&](int64_t begin, int64_t end) {
                  for (auto i = static_cast<uint64_t>(begin); i < static_cast<uint64_t>(end); ++i)
                    sums[i] = block_sum(from + i * block_bytes, std::min(block_bytes, bytes - i * block_bytes));
                });
  uint64_t sum = bytes;
  for (uint64_t one : sums) sum = mix(sum, one);
  return sum;
}

}  // namespace gossamer::retrieval
