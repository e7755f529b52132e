// What the kernels of all instruction sets have in common. Static, because each file has instructions of its own.
#pragma once

#include <algorithm>
#include <cstring>

#include "../bsr_int8/common.h"
#include "encoder.h"

namespace gossamer::encoder {
namespace {

using bsr::Layout;

constexpr int zero_point = 128;
constexpr float tiny = 1e-36f;  // magnitudes below count as zeros

// Bytes of one head of one sentence: queries and keys [quads][padded] of four channels each, signed and unsigned;
// values [quads][padded / 4][4 channels] of four tokens each, signed. Past the last token lie zeros.
struct Head {
  int64_t count, padded, quads;
  uint8_t *queries, *keys, *values;
  int32_t* scores;   // [padded][query_lanes]
  uint8_t* weights;  // [padded / 4][query_lanes] of four tokens each
};

inline Head head_of(const Attention& a, int64_t count, uint8_t* scratch) {
  const int64_t padded = (count + query_lanes - 1) / query_lanes * query_lanes, bytes = padded * a.head_size;
  scratch += (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;
  uint8_t* scores = scratch + 3 * bytes;
  return {count,           padded, a.head_size / 4, scratch, scratch + bytes, scratch + 2 * bytes,
          reinterpret_cast<int32_t*>(scores), scores + padded * query_lanes * 4};
}

// Where token t of the layout t lies, for channel 0, and how far the next channel is.
struct Place {
  int64_t at, step;
};

inline Place place_t(int64_t channels, int64_t tokens, int64_t t) {
  const int64_t b = t / bsr::block_tokens;
  return {bsr::block_start(Layout::t, channels, b) + t % bsr::block_tokens, bsr::width_of(tokens, b)};
}

// Copies quads `quad` .. + quads of tokens first .. + count, [quads][padded][4].
inline void gather(const Attention& a, int64_t quad, int64_t first, const Head& h, uint8_t* out) {
  for (int64_t done = 0; done < h.count;) {
    const int64_t token = first + done, b = token / bsr::block_tokens, at = token % bsr::block_tokens;
    const int64_t width = bsr::width_of(a.tokens, b), piece = std::min(h.count - done, bsr::block_tokens - at);
    const uint8_t* from = a.qkv + bsr::block_start(Layout::q, 3 * a.hidden, b) + 4 * (quad * width + at);
    for (int64_t c = 0; c < h.quads; ++c)
      std::memcpy(out + 4 * (c * h.padded + done), from + 4 * c * width, static_cast<size_t>(4 * piece));
    done += piece;
  }
}

inline void gather_head(const Attention& a, int64_t first, int64_t head, const Head& h) {
  const int64_t quad = head * h.quads, step = a.hidden / 4;
  gather(a, quad, first, h, h.queries);
  gather(a, quad + step, first, h, h.keys);
  gather(a, quad + 2 * step, first, h, h.values);
}

}  // namespace
}  // namespace gossamer::encoder
