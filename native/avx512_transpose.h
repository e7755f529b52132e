// 16 registers of 16 lanes, transposed. Anonymous, as everything that is compiled for one ISA.
#include <immintrin.h>

#include <cstdint>

namespace gossamer {
namespace {

constexpr int side = 16;

// Where lanes come from when two registers swap blocks of `step` lanes: the upper of the first, the lower of the second.
struct Swap {
  alignas(64) int32_t low[side], high[side];

  constexpr explicit Swap(int step) : low(), high() {
    for (int i = 0; i < side; ++i) {
      low[i] = i & step ? side + i - step : i;
      high[i] = i & step ? side + i : i + step;
    }
  }
};

constexpr Swap swaps[] = {Swap(8), Swap(4), Swap(2), Swap(1)};

[[gnu::always_inline]] inline void transpose(__m512i* v) {
  _Pragma("GCC unroll 16")
  for (int s = 0; s < 4; ++s) {
    const __m512i low = _mm512_load_si512(swaps[s].low), high = _mm512_load_si512(swaps[s].high);
    const int step = 8 >> s;
    _Pragma("GCC unroll 16")
    for (int i = 0; i < side; ++i)
      if (!(i & step)) {
        const __m512i one = v[i], other = v[i + step];
        v[i] = _mm512_permutex2var_epi32(one, low, other);
        v[i + step] = _mm512_permutex2var_epi32(one, high, other);
      }
  }
}

}  // namespace
}  // namespace gossamer
