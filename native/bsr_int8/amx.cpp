// AMX: 16 outputs by 16 tokens by 64 channels an instruction, on x in the layout q, whose rows of four channels by 16
// tokens are rows of a tile as they lie. Zeros are multiplied, too: gathering the channels that 16 rows have took
// longer (docs/kernels/bsr_int8.md).
#include "../amx.h"
#include "avx512.h"

namespace gossamer::bsr {
namespace {

// Every tile has 16 rows of 64 bytes.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// [row tiles][vectors][16 rows][16 tokens]
template <int NB>
struct Products {
  alignas(64) int32_t sums[2][NB / 16][16][16];
};

// Two tiles of rows by vectors V and, unless there is but one, V + 1, all channels.
template <int NB, int V>
INLINE void multiply_vectors(const Panels& a, int64_t panel, const uint8_t* x, Products<NB>& p) {
  const int8_t* weights = a.data + 2048 * a.chunks * panel;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < a.chunks; ++c, weights += 2048) {
    const uint8_t* quads = x + c * 64 * NB + 64 * V;
    _tile_loadd(6, quads, 4 * NB);
    _tile_loadd(4, weights, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(5, weights + 1024, 64);
    _tile_dpbsud(2, 5, 6);
    if constexpr (NB > 16) {
      _tile_loadd(7, quads + 64, 4 * NB);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, p.sums[0][V], 64);
  _tile_stored(2, p.sums[1][V], 64);
  if constexpr (NB > 16) {
    _tile_stored(1, p.sums[0][V + 1], 64);
    _tile_stored(3, p.sums[1][V + 1], 64);
  }
}

template <int NB>
INLINE void multiply(const Panels& a, int64_t panel, const uint8_t* x, Products<NB>& p) {
  multiply_vectors<NB, 0>(a, panel, x, p);
  if constexpr (NB == 64) multiply_vectors<NB, 2>(a, panel, x, p);
}

template <int NB, End E>
INLINE void panel(Finish<NB, true, E>& finish, const Weights& a, const Input& x, int64_t b, int64_t begin,
                  int64_t end) {
  const int64_t last = std::min(end, begin + panel_rows);
  Products<NB> p;
  multiply<NB>(a.panels, begin / panel_rows, x.data + block_start(x.layout, a.cols, b), p);
  for (int64_t i = 0; begin + i < last; ++i) {
    Sums<NB> s;
    finish.start(begin + i, s);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NB / 16; ++v)
        s.v[r][v] = _mm512_add_epi32(_mm512_load_si512(p.sums[i / 4][v][4 * (i % 4) + r]), s.v[r][v]);
    finish.tile(begin + i, s);
    finish.flush(begin + i);
  }
}

// Of token block b, rows begin .. end.
template <int NB, End E>
void block(const Weights& a, const Input& x, const Output& out, int64_t b, int64_t begin, int64_t end) {
  Finish<NB, true, E> finish(a, x, out, b);
  for (int64_t row = begin; row < end; row += panel_rows) panel(finish, a, x, b, row, end);
}

template <End E>
void all_blocks(const Weights& a, const Input& x, const Output& out, const Range& range) {
  const Config config;
  _tile_loadconfig(&config);
  // Panels outside, so that all tokens meet one while it is in the cache; but row-major outputs are written whole.
  const int64_t step = out.layout == Layout::rows ? range.row_end - range.row_begin : panel_rows;
  for (int64_t row = range.row_begin; row < range.row_end; row += step)
    for (int64_t b = range.token_begin; b < range.token_end; ++b) {
      const int64_t width = width_of(x.tokens, b);
      const auto run = width == 64 ? block<64, E> : width == 32 ? block<32, E> : block<16, E>;
      run(a, x, out, b, row, std::min(range.row_end, row + step));
    }
  _tile_release();
}

}  // namespace

bool amx_usable() {
  static const bool usable = amx_granted(1u << 25);  // int8
  return usable;
}

void amx_blocks(const Weights& a, const Input& x, const Output& out, const Range& range) {
  const End how = end_of(x, out);
  const auto run = how == End::bytes    ? all_blocks<End::bytes>
                   : how == End::floats ? all_blocks<End::floats>
                                        : all_blocks<End::any>;
  run(a, x, out, range);
}

}  // namespace gossamer::bsr
