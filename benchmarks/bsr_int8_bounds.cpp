// How fast this core does the inner loops of block-sparse int8 products when nothing else is in their way: x and dense
// weights in the first-level cache, no ends. Prints a JSON line a loop: nanoseconds of a step, four tile products (of
// 16 x 16 x 64) and, or, four groups (4 rows x 4 columns x 64 tokens). Arguments: seconds for every loop.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t channels = 256, chunks = channels / 64, rows = 96, groups = 24;  // groups of a block row

struct alignas(64) Tiles {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

alignas(64) uint8_t x[channels * 64], out[4 * 64 * 32];
alignas(64) int8_t dense[chunks * 2048], weights[rows * groups * 16];
alignas(64) int32_t sums[4 * 256];
uint16_t channel[rows * groups * 4], quad[rows * groups];

enum class Block { none, column, quad };

// Four channels, interleaved, or a quad as it lies.
template <Block B>
INLINE void fetch(int64_t g, __m512i (&in)[4]) {
  if constexpr (B == Block::quad) {
    for (int i = 0; i < 4; ++i) in[i] = _mm512_load_si512(x + 256 * quad[g] + 64 * i);
  } else {
    const auto line = [&](int i) { return _mm512_load_si512(x + 64 * channel[4 * g + i]); };
    const __m512i a = line(0), b = line(1), c = line(2), d = line(3);
    const __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
    const __m512i cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
    in[0] = _mm512_unpacklo_epi16(ab0, cd0);
    in[1] = _mm512_unpackhi_epi16(ab0, cd0);
    in[2] = _mm512_unpacklo_epi16(ab1, cd1);
    in[3] = _mm512_unpackhi_epi16(ab1, cd1);
  }
}

template <Block B>
INLINE void group(__m512i (&s)[4][4], int64_t g) {
  if constexpr (B == Block::none) return;
  __m512i in[4];
  fetch<B>(g, in);
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    int32_t four;
    std::memcpy(&four, weights + 16 * g + 4 * r, 4);
    const __m512i w = _mm512_set1_epi32(four);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) s[r][i] = _mm512_dpbusd_epi32(s[r][i], in[i], w);
  }
}

// A step: 32 rows by 32 tokens by 64 channels on the matrix unit, with a group after every product.
template <Block B, bool Matrix>
__attribute__((noipa)) void steps() {
  const int8_t* w = dense;
  const uint8_t* q = x;
  for (int64_t row = 0; row < rows; ++row) {
    __m512i s[4][4];
#pragma GCC unroll 4
    for (auto& r : s)
#pragma GCC unroll 4
      for (auto& v : r) v = _mm512_setzero_si512();
    for (int64_t g = row * groups; g < (row + 1) * groups; g += 4) {
      if constexpr (Matrix) {
        _tile_loadd(6, q, 128);
        _tile_loadd(4, w, 64);
        _tile_dpbsud(0, 4, 6);
      }
      group<B>(s, g);
      if constexpr (Matrix) {
        _tile_loadd(5, w + 1024, 64);
        _tile_dpbsud(2, 5, 6);
      }
      group<B>(s, g + 1);
      if constexpr (Matrix) {
        _tile_loadd(7, q + 64, 128);
        _tile_dpbsud(1, 4, 7);
      }
      group<B>(s, g + 2);
      if constexpr (Matrix) _tile_dpbsud(3, 5, 7);
      group<B>(s, g + 3);
      w += 2048;
      q += 2048;
      if (w == dense + sizeof dense) {
        w = dense;
        q = x;
      }
    }
    if constexpr (B != Block::none)
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          _mm_store_si128(reinterpret_cast<__m128i*>(out + 256 * (row % 32) + 64 * r + 16 * i),
                          _mm512_cvtsepi32_epi8(s[r][i]));
  }
  if constexpr (Matrix) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

void measure(const char* name, void (*run)(), double seconds) {
  using clock = std::chrono::steady_clock;
  run();
  double best = 1e9;
  const auto stop = clock::now() + std::chrono::duration<double>(seconds);
  for (int n = 0; n < 7 || clock::now() < stop; ++n) {
    const auto start = clock::now();
    run();
    best = std::min(best, std::chrono::duration<double>(clock::now() - start).count());
  }
  std::printf("{\"loop\": \"%s\", \"ns\": %.3f}\n", name, best * 1e9 / (rows * groups / 4));
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 0.02;
  constexpr int request_permission = 0x1023, tile_data = 18;
  const bool amx = __builtin_cpu_supports("avx512vnni") && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  std::srand(1);
  for (auto& v : x) v = static_cast<uint8_t>(std::rand() >> 8);
  for (auto& v : dense) v = static_cast<int8_t>(std::rand() >> 8);
  for (auto& v : weights) v = static_cast<int8_t>(std::rand() >> 8);
  for (auto& v : channel) v = static_cast<uint16_t>(std::rand() >> 8) % channels;
  for (auto& v : quad) v = static_cast<uint16_t>(std::rand() >> 8) % (channels / 4);
  measure("4x1", steps<Block::column, false>, seconds);
  measure("4x4", steps<Block::quad, false>, seconds);
  if (!amx) return 0;
  const Tiles tiles;
  _tile_loadconfig(&tiles);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  measure("tiles", steps<Block::none, true>, seconds);
  measure("4x1 and tiles", steps<Block::column, true>, seconds);
  measure("4x4 and tiles", steps<Block::quad, true>, seconds);
  _tile_release();
}
