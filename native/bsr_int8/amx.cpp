// AMX: 16 outputs by 16 tokens by 64 channels an instruction, on x in the layout q, whose rows of four channels by 16
// tokens are rows of a tile as they lie. Zeros are multiplied, too: gathering the channels that 16 rows have took
// longer (docs/kernels/bsr_int8.md). Weights are stored without them and put into tiles in the first-level cache, for
// all tokens that follow. The matrix unit works by itself for most of the time: meanwhile the vector unit expands
// weights, or finishes the tokens before these.
#include <optional>

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

constexpr int64_t slice_chunks = 12;  // whose weights, of 32 rows, leave room in the first-level cache; but
constexpr int64_t most_chunks = 16;   // up to so many are better not cut in two where many tokens follow
constexpr int64_t group_blocks = 8;   // of tokens, at most, and
constexpr int64_t group_bytes = 1 << 20;  // which stay in the second-level cache while all panels pass
constexpr int64_t ahead = 2;          // chunks, from the writing of weights to the reading of a tile
constexpr int64_t fetch_ahead = 768;  // bytes, of the values that are expanded

// 32 rows by 64 tokens.
struct alignas(64) Products {
  int32_t sums[2][4][16][16];  // [row tile][vector][row][token]
};

struct alignas(64) Slice {
  int8_t weights[most_chunks][2][16][64];
};

constexpr auto make_numbers = [] {
  struct { int8_t at[64]; } found{};
  for (int i = 0; i < 64; ++i) found.at[i] = static_cast<int8_t>(i);
  return found;
};
alignas(64) constexpr auto numbers = make_numbers();

// What is left to be read of a panel.
struct Packed {
  const int8_t *masks, *values;

  Packed(const Panels& a, int64_t panel, int64_t panels)
      : masks(a.data + 8 * panels + 8 * panel_rows * a.chunks * panel) {
    int64_t start;
    std::memcpy(&start, a.data + 8 * panel, 8);
    values = a.data + start;
  }

  // The block rows of the next chunk. Loads are what the tiles compete for: two for the four rows, if they have
  // at most 32 channels each, as their bytes are then picked out by numbers that count from the first row's.
  INLINE void expand(int8_t* to) {
#pragma GCC unroll 8
    for (int i = 0; i < panel_rows; ++i, masks += 8, to += 256) {
      _mm_prefetch(reinterpret_cast<const char*>(values) + fetch_ahead, _MM_HINT_T0);
      uint64_t mask;
      std::memcpy(&mask, masks, 8);
      const int64_t count = _mm_popcnt_u64(mask);
      if (__builtin_expect(count > 32, 0)) {
        for (int r = 0; r < 4; ++r, values += count)
          _mm512_store_si512(to + 64 * r, _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(values)));
        continue;
      }
      const __m512i first = _mm512_maskz_expand_epi8(mask, _mm512_load_si512(numbers.at));
      const __m512i second = _mm512_add_epi8(first, _mm512_set1_epi8(static_cast<char>(count)));
      const __m512i top = _mm512_loadu_si512(values), bottom = _mm512_loadu_si512(values + 2 * count);
      _mm512_store_si512(to, _mm512_maskz_permutexvar_epi8(mask, first, top));
      _mm512_store_si512(to + 64, _mm512_maskz_permutexvar_epi8(mask, second, top));
      _mm512_store_si512(to + 128, _mm512_maskz_permutexvar_epi8(mask, first, bottom));
      _mm512_store_si512(to + 192, _mm512_maskz_permutexvar_epi8(mask, second, bottom));
      values += 4 * count;
    }
  }
};

// Where tiles 1 and 3 of the last pass go. They are stored within the next one: a store waits for the last product of
// its tile, and hardly anything after it starts as long.
struct Pending {
  int32_t *upper = nullptr, *lower = nullptr;

  INLINE void store() {
    if (!upper) return;
    _tile_stored(1, upper, 64);
    _tile_stored(3, lower, 64);
    upper = nullptr;
  }
};

// What the vector unit does beside a pass, from chunk `first` on. All of a chunk's at its end: among the loads of tiles
// it took longer.
struct Nothing {
  static constexpr int64_t first = 0;
  INLINE void operator()(int64_t) const {}
};

struct Expanding {
  static constexpr int64_t first = 0;
  Packed& packed;
  int8_t* weights;
  INLINE void operator()(int64_t c) const { packed.expand(weights + 2048 * (c + ahead)); }
};

// Two tiles of rows by vectors V and, unless there is but one, V + 1, some chunks, added to what earlier ones gave;
// beside them `meanwhile`, in the chunks before `until`. These have a loop of their own, without questions: a branch
// that is predicted wrongly holds up the matrix unit, too. From the second chunk on all of the pass before is stored.
template <int NB, int V, class Meanwhile>
INLINE void multiply_vectors(const int8_t* weights, int64_t chunks, const uint8_t* x, bool first, Products& p,
                             Pending& pending, int64_t until, const Meanwhile& meanwhile) {
  if (first) {
    _tile_zero(0);
    _tile_zero(2);
  } else {
    _tile_loadd(0, p.sums[0][V], 64);
    _tile_loadd(2, p.sums[1][V], 64);
  }
  const uint8_t* quads = x + 64 * V;
  const auto left = [&]() __attribute__((always_inline)) {
    // Activations pass by the first-level cache, where the weights are to stay.
    _tile_stream_loadd(6, quads, 4 * NB);
    _tile_loadd(4, weights, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(5, weights + 1024, 64);
    _tile_dpbsud(2, 5, 6);
  };
  const auto right = [&]() __attribute__((always_inline)) {
    if constexpr (NB > 16) {
      _tile_stream_loadd(7, quads + 64, 4 * NB);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(3, 5, 7);
    }
    weights += 2048;
    quads += 64 * NB;
  };
  if (chunks > 0) left();
  pending.store();
  if constexpr (NB > 16) {
    if (first) {
      _tile_zero(1);
      _tile_zero(3);
    } else {
      _tile_loadd(1, p.sums[0][V + 1], 64);
      _tile_loadd(3, p.sums[1][V + 1], 64);
    }
  }
  if (chunks > 0) right();
  if (Meanwhile::first == 0 && until > 0) meanwhile(0);
  int64_t c = 1;
  for (; c < until; ++c) {
    left();
    right();
    meanwhile(c);
  }
  for (; c < chunks; ++c) {
    left();
    right();
  }
  _tile_stored(0, p.sums[0][V], 64);
  _tile_stored(2, p.sums[1][V], 64);
  if constexpr (NB > 16) pending = {p.sums[0][V + 1][0], p.sums[1][V + 1][0]};
}

// The end of 32 rows of a token block, a block row at a time.
template <int NB, End E>
class Ending {
  const Weights& a;
  const Products& p;
  Finish<NB, true, E> finish;
  const int64_t begin, end;
  int64_t row;

 public:
  Ending(const Weights& a, const Input& x, const Output& out, int64_t b, int64_t begin, int64_t end, const Products& p)
      : a(a), p(p), finish(a, x, out, b, end), begin(begin), end(end), row(begin) {}

  int64_t left() const { return end - row; }

  // The commonest ends are code of the loops around them, at a gain of 3 %; all in each would take minutes to compile.
  INLINE void step_between() {
    if constexpr (E == End::any) step();
    else step_now();
  }

  __attribute__((noinline)) void step() { step_now(); }

 private:
  INLINE void step_now() {
    const int64_t i = row - begin;
    Sums<NB> s;
    finish.start(row, s);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NB / 16; ++v)
        s.v[r][v] = _mm512_add_epi32(_mm512_load_si512(p.sums[i / 4][v][4 * (i % 4) + r]), s.v[r][v]);
    finish.tile(row, s);
    finish.flush(row++);
  }
};

// All of a range, panel by panel.
template <End E>
class Job {
  const Weights& a;
  const Input& x;
  const Output& out;
  const Range& range;
  std::optional<Ending<64, E>> waiting;  // while the products of the next block are made
  Pending pending;
  Slice slice;
  Products products[group_blocks + 1];
  int64_t next = 0;  // of products, in turn

  // A block row of `waiting` in every chunk but the first one, in which the last of its sums are stored.
  struct Finishing {
    static constexpr int64_t first = 1;
    Job& job;
    INLINE void operator()(int64_t) const { job.waiting->step_between(); }
  };

  void settle() {
    if (!waiting) return;
    while (waiting->left()) waiting->step();
    waiting.reset();
  }

  template <int NB, int V>
  INLINE void pass(const uint8_t* quads, int64_t chunks, bool first, Packed* fresh, Products& p) {
    int8_t* weights = slice.weights[0][0][0];
    if (fresh) {
      for (int64_t c = 0; c < std::min(ahead, chunks); ++c) fresh->expand(weights + 2048 * c);
      return multiply_vectors<NB, V>(weights, chunks, quads, first, p, pending, chunks - ahead,
                                     Expanding{*fresh, weights});
    }
    int64_t rows = waiting ? waiting->left() : 0;
    if (V == 0 && NB == 64) rows = std::min(rows, panel_rows / 2);
    if (rows)
      return multiply_vectors<NB, V>(weights, chunks, quads, first, p, pending, std::min(1 + rows, chunks),
                                     Finishing{*this});
    multiply_vectors<NB, V>(weights, chunks, quads, first, p, pending, 0, Nothing{});
  }

  // Of token block b: products with a slice; its end, if the slice is the last one.
  template <int NB>
  INLINE void block(int64_t b, int64_t row, int64_t from, int64_t chunks, Packed* fresh, Products& p) {
    const uint8_t* quads = x.data + block_start(x.layout, a.cols, b) + 64 * NB * from;
    pass<NB, 0>(quads, chunks, from == 0, fresh, p);
    if constexpr (NB == 64) pass<NB, 2>(quads, chunks, from == 0, nullptr, p);
    if (from + chunks < a.panels.chunks) return;
    if (NB < 64) pending.store();
    settle();
    const int64_t last = std::min(range.row_end, row + panel_rows);
    if constexpr (NB == 64) {
      waiting.emplace(a, x, out, b, row, last, p);
    } else {
      Ending<NB, E> ending(a, x, out, b, row, last, p);
      while (ending.left()) ending.step();
    }
  }

  INLINE void panel(int64_t row, int64_t begin, int64_t end) {
    Packed packed(a.panels, row / panel_rows, (a.block_rows() + panel_rows - 1) / panel_rows);
    const int64_t count = a.panels.chunks, most = count <= most_chunks && end - begin > 2 ? most_chunks : slice_chunks;
    const int64_t slices = std::max<int64_t>(1, (count + most - 1) / most);
    const int64_t slots = slices == 1 ? 2 : end - begin + 1;
    for (int64_t s = 0; s < slices; ++s) {
      const int64_t from = count * s / slices, chunks = count * (s + 1) / slices - from;
      for (int64_t b = begin; b < end; ++b) {
        Products& p = products[(next + b - begin) % slots];
        Packed* fresh = b == begin ? &packed : nullptr;
        const int64_t width = width_of(x.tokens, b);
        if (width == 64) block<64>(b, row, from, chunks, fresh, p);
        else if (width == 32) block<32>(b, row, from, chunks, fresh, p);
        else block<16>(b, row, from, chunks, fresh, p);
      }
    }
    next = (next + end - begin) % slots;
  }

 public:
  Job(const Weights& a, const Input& x, const Output& out, const Range& range) : a(a), x(x), out(out), range(range) {}

  void run() {
    const int64_t count = range.token_end - range.token_begin, bytes = 64 * block_tokens * a.panels.chunks;
    const int64_t most = std::clamp<int64_t>(group_bytes / std::max<int64_t>(1, bytes), 1, group_blocks);
    const int64_t groups = (count + most - 1) / most;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = range.token_begin + count * g / groups, end = range.token_begin + count * (g + 1) / groups;
      for (int64_t row = range.row_begin; row < range.row_end; row += panel_rows) panel(row, begin, end);
      pending.store();
      settle();
      next = 0;
    }
  }
};

template <End E>
void all_blocks(const Weights& a, const Input& x, const Output& out, const Range& range) {
  const Config config;
  _tile_loadconfig(&config);
  Job<E>(a, x, out, range).run();
  _tile_release();
}

}  // namespace

bool amx_usable() {
  static const bool usable = __builtin_cpu_supports("avx512vbmi2") && amx_granted(1u << 25);  // int8
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
