// AVX2: bytes are widened to 16 bits, because vpmaddubsw would saturate, those of x once for all rows. One vpmaddwd
// multiplies 8 tokens by two weights that are one broadcast; four rows by 16 tokens at a time.
#include <memory>

#include "ymm_quantise.h"

namespace gossamer::bsr {
namespace {

INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

INLINE __m256i multiply(__m256i sum, __m256i in, __m256i w) { return _mm256_add_epi32(sum, _mm256_madd_epi16(in, w)); }

// 16 tokens of a block of the layout t, that starts `x` and is `width` wide: 32 bytes a channel, tokens 0-3, 8-11, 4-7,
// 12-15, so that interleaving two channels in each lane brings tokens 0-7 and 8-15.
void widen_t(const uint8_t* x, int64_t width, int64_t channels, uint8_t* out) {
  for (int64_t c = 0; c < channels; ++c, x += width, out += 32)
    store(out, _mm256_permute4x64_epi64(_mm256_cvtepu8_epi16(load16(x)), 0xd8));
}

// Of the layout q: 128 bytes for four channels, the first two of tokens 0-7 side by side, of 8-15, then the other two.
void widen_q(const uint8_t* x, int64_t width, int64_t channels, uint8_t* out) {
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t c = 0; c < channels; c += 4, x += 4 * width, out += 128)
    for (int half = 0; half < 2; ++half) {
      const __m256i bytes = load(x + 32 * half);
      const __m256 a = _mm256_castsi256_ps(_mm256_unpacklo_epi8(bytes, zero));
      const __m256 b = _mm256_castsi256_ps(_mm256_unpackhi_epi8(bytes, zero));
      store(out + 32 * half, _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)));
      store(out + 64 + 32 * half, _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)));
    }
}

constexpr int64_t most_groups = 128;  // whose weights are widened at a time

// Sums of a block row and the 16 tokens of x, widened.
template <bool Quads, class Off>
INLINE void product(const Groups& a, int64_t row, const uint8_t* x, int32_t (*sums)[tile_tokens]) {
  constexpr int many = Quads ? 1 : 4;  // offsets of a group
  alignas(32) int32_t weights[8 * most_groups];
  __m256i s[4][2];
  for (auto& r : s) r[0] = r[1] = _mm256_setzero_si256();
  for (int64_t first = a.starts[row]; first < a.starts[row + 1]; first += most_groups) {
    const int64_t count = std::min(most_groups, a.starts[row + 1] - first);
    for (int64_t g = 0; g < count; ++g) store(weights + 8 * g, _mm256_cvtepi8_epi16(load16(a.data + 16 * (first + g))));
    const Off* offsets = static_cast<const Off*>(a.offsets) + many * first;
    for (const int32_t *w = weights, *end = w + 8 * count; w < end; w += 8, offsets += many)
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        __m256i in[2];
        if constexpr (Quads) {
          const uint8_t* quad = x + 4 * int64_t{offsets[0]} + 64 * p;
          in[0] = load(quad);
          in[1] = load(quad + 32);
        } else {
          const __m256i one = load(x + 4 * int64_t{offsets[2 * p]}), two = load(x + 4 * int64_t{offsets[2 * p + 1]});
          in[0] = _mm256_unpacklo_epi16(one, two);
          in[1] = _mm256_unpackhi_epi16(one, two);
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const __m256i weight = _mm256_set1_epi32(w[2 * r + p]);
          s[r][0] = multiply(s[r][0], in[0], weight);
          s[r][1] = multiply(s[r][1], in[1], weight);
        }
      }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    store(sums[r], s[r][0]);
    store(sums[r] + 8, s[r][1]);
  }
}

// Memory for the channels of 16 tokens, kept per thread unless it is much.
class Widened {
  static constexpr int64_t most_kept = int64_t{1} << 20;
  std::unique_ptr<uint8_t[]> own;

 public:
  uint8_t* data;
  explicit Widened(int64_t channels) {
    thread_local std::unique_ptr<uint8_t[]> kept;
    thread_local int64_t size = 0;
    const int64_t needed = 32 * (channels + 3) + 64;
    if (needed > most_kept) {
      own.reset(new uint8_t[static_cast<size_t>(needed)]);
    } else if (size < needed) {
      kept.reset(new uint8_t[static_cast<size_t>(needed)]);
      size = needed;
    }
    data = own ? own.get() : kept.get();
    data += -reinterpret_cast<uintptr_t>(data) % 64;
  }
};

template <bool Quads, class Off>
void all_blocks(const Weights& a, const Input& x, const Output& out, const Range& range) {
  const Widened widened(a.cols);
  for (int64_t b = range.token_begin; b < range.token_end; ++b) {
    const int64_t width = width_of(x.tokens, b), first = b * block_tokens;
    const uint8_t* block = x.data + block_start(x.layout, a.cols, b);
    for (int64_t t = 0; t < width && first + t < x.tokens; t += tile_tokens) {
      Quads ? widen_q(block + 4 * t, width, a.cols, widened.data) : widen_t(block + t, width, a.cols, widened.data);
      Finish finish(a, x, out, first + t);
      for (int64_t row = range.row_begin; row < range.row_end; row += 2) {
        Tile tile;
        const bool both = row + 1 < range.row_end;
        product<Quads, Off>(a.groups, row, widened.data, tile.sums);
        if (both) product<Quads, Off>(a.groups, row + 1, widened.data, tile.sums + 4);
        finish(row, both, tile);
      }
    }
  }
}

void blocks(const Weights& a, const Input& x, const Output& out, const Range& range) {
  const bool wide = a.groups.wide;
  const auto run = a.block == 4 ? (wide ? all_blocks<true, uint32_t> : all_blocks<true, uint16_t>)
                                : (wide ? all_blocks<false, uint32_t> : all_blocks<false, uint16_t>);
  run(a, x, out, range);
}

INLINE __m256i multiply_lanes(__m256i sum, __m256i in, __m256i w) {
  const __m256i even = _mm256_and_si256(in, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(in, 8);
  const __m256i even_weights = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd_weights = _mm256_srai_epi16(w, 8);
  return multiply(multiply(sum, even, even_weights), odd, odd_weights);
}

}  // namespace
}  // namespace gossamer::bsr

#include "ymm_windows.h"

namespace gossamer::bsr {
const Kernels avx2_kernels{blocks, windows, quantise};
}  // namespace gossamer::bsr
