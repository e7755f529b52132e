// The loops of linear.h that every ISA shares. A translation unit first defines, in the anonymous namespace,
//   Vec                                          // a register of float32
//   constexpr int lanes, group, most_rows;       // float32 in a Vec; tokens a pass; rows worked off together
//   Vec zero(); Vec load(const float*); Vec fma(Vec a, Vec b, Vec c); float sum(Vec);
//   void sum(Vec, Vec, Vec, Vec, float* to);     // of four, each to the bit as if alone; where most_rows is 4
//   template <class T> struct Block {            // T = uint32_t (float32), uint16_t (bfloat16)
//     using Raw;                                 // weights as they are stored
//     static constexpr int cols, vecs;           // columns a Raw holds, and the Vecs they widen to
//     static Raw read(const T*);
//     static Raw read(const T*, int64_t n);      // touches n weights only; n may be any number
//     static E expand(Raw, uint64_t bits);       // the next weight for each bit that is set, else zero
//     static void widen(Raw or E, Vec* w);       // E: Raw, too, or what widens in another way
//     static constexpr int column(int i);        // which column of the block lane i of the widened block holds
//   };
// and what many_rows.h asks for.
// Everything here is anonymous too: were it shared, the linker could keep the AVX-512 copy for every CPU.
// No #pragma once for the same reason.
#include <cstdint>
#include <cstring>

#include "linear.h"

namespace gossamer {
namespace {

// GCC gives up on both by itself here, and then keeps the sums in memory: three times slower.
#define GOSSAMER_INLINE [[gnu::always_inline]] inline
#ifndef GOSSAMER_UNROLL
#define GOSSAMER_UNROLL _Pragma("GCC unroll 16")
#endif

// How far ahead of their use weights are fetched, first towards the second-level cache, then into the first: DRAM
// latency times the bandwidth of one core, and some. The hardware's own prefetcher stops at every 4 KiB.
constexpr int far_bytes = 4096, near_bytes = 2048;
constexpr int line_bytes = 64;

// The same in bytes of a row's weights and mask. Rows that go together are read side by side, so what comes next lies a
// whole number of such groups further on.
struct Ahead {
  int64_t far, near, mask;
};

template <int lines, class T>
GOSSAMER_INLINE void prefetch(const T* from, const Ahead& ahead) {
  const char* at = reinterpret_cast<const char*>(from);
  GOSSAMER_UNROLL
  for (int i = 0; i < lines; ++i) {
    __builtin_prefetch(at + ahead.far + i * line_bytes, 0, 2);
    __builtin_prefetch(at + ahead.near + i * line_bytes, 0, 3);
  }
}

// x is worked off in chunks of columns that leave room in a first-level cache; where there are several, a tile of rows
// shares each.
constexpr int64_t x_bytes_at_once = 16384;
constexpr int tile_rows = 16;

constexpr int step_vecs = step_cols / lanes;
template <class T>
constexpr int step_blocks = step_cols / Block<T>::cols;

inline uint64_t bits_of_step(const uint8_t* mask) {
  uint64_t bits;
  std::memcpy(&bits, mask, 8);
  return bits;
}

// Padding bits are dropped, not trusted. 0 < cols < step_cols.
inline uint64_t bits_of_tail(const uint8_t* mask, int64_t cols) {
  uint64_t bits = 0;
  std::memcpy(&bits, mask, static_cast<size_t>((cols + 7) / 8));
  return bits & ((uint64_t{1} << cols) - 1);
}

// One row of a bitmask matrix. Unless `careful`, a whole block may be read from wherever the row's values end.
template <class T, bool careful>
struct BitmaskSource {
  static constexpr bool dense = false;
  static constexpr int weight_bytes = sizeof(T);
  const uint8_t* mask;
  const T* values;
  const T* end;

  BitmaskSource() = default;
  BitmaskSource(const LinearJob& job, int64_t row)
      : mask(job.mask + row * ((job.cols + 7) / 8)),
        values(static_cast<const T*>(job.values) + job.offsets[row]),
        end(static_cast<const T*>(job.values) + job.offsets[row + 1]) {}

  static int64_t row_bytes(const LinearJob& job) {
    return job.offsets[job.rows] * int64_t{sizeof(T)} / (job.rows ? job.rows : 1);
  }

  GOSSAMER_INLINE void expand(uint64_t bits, Vec* w) {
    using B = Block<T>;
    GOSSAMER_UNROLL
    for (int i = 0; i < step_blocks<T>; ++i) {
      // From the start of the step, not from the last block: the additions then form no chain.
      const T* at = values + __builtin_popcountll(bits & ((uint64_t{1} << (i * B::cols)) - 1));
      const uint64_t here = B::cols == 64 ? bits : bits >> (i * B::cols) & ((uint64_t{1} << B::cols) - 1);
      B::widen(B::expand(careful ? B::read(at, end - at) : B::read(at), here), w + i * B::vecs);
    }
    values += __builtin_popcountll(bits);
  }

  GOSSAMER_INLINE void next(Vec* w, const Ahead& ahead) {
    prefetch<1>(values, ahead);
    expand(bits_of_step(mask), w);
    mask += step_cols / 8;
  }

  GOSSAMER_INLINE void tail(int64_t cols, Vec* w) { expand(bits_of_tail(mask, cols), w); }

  void first_lines() const {
    for (int b = 0; b < near_bytes / 8; b += line_bytes) __builtin_prefetch(mask + b);
    for (int b = 0; b < near_bytes; b += line_bytes) __builtin_prefetch(reinterpret_cast<const char*>(values) + b);
  }
};

template <class T>
struct DenseSource {
  static constexpr bool dense = true;
  static constexpr int weight_bytes = sizeof(T);
  const T* weights;

  DenseSource() = default;
  DenseSource(const LinearJob& job, int64_t row) : weights(static_cast<const T*>(job.values) + row * job.cols) {}

  static int64_t row_bytes(const LinearJob& job) { return job.cols * int64_t{sizeof(T)}; }

  void first_lines() const {}  // one stream, which the hardware's own prefetcher catches at once

  GOSSAMER_INLINE void next(Vec* w, const Ahead& ahead) {
    prefetch<step_cols * sizeof(T) / line_bytes>(weights, ahead);
    GOSSAMER_UNROLL
    for (int i = 0; i < step_blocks<T>; ++i)
      Block<T>::widen(Block<T>::read(weights + i * Block<T>::cols), w + i * Block<T>::vecs);
    weights += step_cols;
  }

  GOSSAMER_INLINE void tail(int64_t cols, Vec* w) {
    GOSSAMER_UNROLL
    for (int i = 0; i < step_blocks<T>; ++i)
      Block<T>::widen(Block<T>::read(weights + i * Block<T>::cols, cols - i * Block<T>::cols), w + i * Block<T>::vecs);
  }
};

// Enough independent sums to hide the latency of an FMA, as few as the registers allow. Rows that go together hide it
// for one another, and adding up many sums costs as much as a step.
template <class Source, int tokens>
constexpr int sums = tokens < 4 && (Source::dense || most_rows == 1) ? 4 : tokens < 8 ? 2 : 1;

template <class Source, int tokens>
struct Sums {
  static constexpr int many = sums<Source, tokens>;
  Vec of[tokens][many];

  GOSSAMER_INLINE void clear() {
    GOSSAMER_UNROLL
    for (int t = 0; t < tokens; ++t)
      GOSSAMER_UNROLL
      for (int i = 0; i < many; ++i) of[t][i] = zero();
  }

  GOSSAMER_INLINE void add_step(const Vec* w, const float* x) {
    GOSSAMER_UNROLL
    for (int i = 0; i < step_vecs; ++i)
      GOSSAMER_UNROLL
      for (int t = 0; t < tokens; ++t)
        of[t][i % many] = fma(w[i], load(x + t * step_cols + i * lanes), of[t][i % many]);
  }

  GOSSAMER_INLINE Vec of_token(int t) const {
    Vec all = of[t][0];
    GOSSAMER_UNROLL
    for (int i = 1; i < many; ++i) all = add(all, of[t][i]);
    return all;
  }
};

// Masks of a step of n rows, which lie one after the other (`adjacent`) or apart. A row's are an eighth of a line: asked
// for row by row, every line would be asked for eight times.
template <int n, bool adjacent, class Source>
GOSSAMER_INLINE void prefetch_masks(const Source* sources, const uint8_t*& next, const Ahead& ahead) {
  if constexpr (Source::dense) {
    return;
  } else if constexpr (adjacent) {
    __builtin_prefetch(next, 0, 2);
    next += n * step_cols / 8;
  } else {
    GOSSAMER_UNROLL
    for (int r = 0; r < n; ++r) __builtin_prefetch(sources[r].mask + ahead.mask, 0, 2);
  }
}

// The next `cols` columns of n rows; only the last ones of a row may be no whole step. `adjacent`: whole rows that lie
// one after the other.
template <int n, bool adjacent, class Source, int tokens>
GOSSAMER_INLINE void add_cols(Source* sources, Sums<Source, tokens>* all, const float* x, int64_t x_step, int64_t cols,
                              const Ahead& ahead) {
  Vec w[step_vecs];
  const uint8_t* masks = nullptr;
  if constexpr (!Source::dense) masks = sources[0].mask + ahead.mask;
  for (; cols >= step_cols; cols -= step_cols, x += x_step) {
    prefetch_masks<n, adjacent>(sources, masks, ahead);
    GOSSAMER_UNROLL
    for (int r = 0; r < n; ++r) {
      sources[r].next(w, ahead);
      all[r].add_step(w, x);
    }
  }
  if (cols > 0)
    GOSSAMER_UNROLL
    for (int r = 0; r < n; ++r) {
      sources[r].tail(cols, w);
      all[r].add_step(w, x);
    }
}

inline float widened(float value) { return value; }

inline float widened(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline float to_float(const void* from, Float type, int64_t i) {
  return type == Float::f32 ? static_cast<const float*>(from)[i] : widened(static_cast<const uint16_t*>(from)[i]);
}

// To the nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void finish(const LinearJob& job, int64_t row, int token, float value) {
  if (job.bias) value += to_float(job.bias, job.bias_type, row);
  const int64_t at = token * job.rows + row;
  if (job.y_type == Float::f32)
    static_cast<float*>(job.y)[at] = value;
  else
    static_cast<uint16_t*>(job.y)[at] = to_bf16(value);
}

template <int n, class Source, int tokens>
GOSSAMER_INLINE void finish_rows(const LinearJob& job, int64_t row, const Sums<Source, tokens>* of_rows) {
  GOSSAMER_UNROLL
  for (int t = 0; t < tokens; ++t) {
    float totals[n];
    if constexpr (n == 4) {
      sum(of_rows[0].of_token(t), of_rows[1].of_token(t), of_rows[2].of_token(t), of_rows[3].of_token(t), totals);
    } else {
      for (int r = 0; r < n; ++r) totals[r] = sum(of_rows[r].of_token(t));
    }
    for (int r = 0; r < n; ++r) finish(job, row + r, t, totals[r]);
  }
}

template <int tokens>
constexpr int64_t chunk_cols = x_bytes_at_once / (tokens * int64_t{sizeof(float)}) / step_cols * step_cols;

template <class Source, int tokens, int n>
GOSSAMER_INLINE void whole_rows(const LinearJob& job, int64_t row, const Ahead& ahead) {
  Source sources[n];
  Sums<Source, tokens> all[n];
  GOSSAMER_UNROLL
  for (int r = 0; r < n; ++r) {
    sources[r] = Source(job, row + r);
    all[r].clear();
  }
  add_cols<n, true>(sources, all, job.x, job.tokens * step_cols, job.cols, ahead);
  finish_rows<n>(job, row, all);
}

// Rows that are read side by side share the loads of x, which is what the arithmetic of sparse rows waits for; dense
// ones wait for memory, and one stream is read faster than several.
template <class Source, int tokens>
constexpr int rows_together = Source::dense || tokens > 2 ? 1 : most_rows / tokens > 1 ? most_rows / tokens : 1;

constexpr double sparse_below = 0.45;  // the density below which arithmetic takes longer than memory

// Of short rows that are read side by side, what lies a little ahead in one is being read as part of another.
template <class Source, int n>
Ahead ahead_of_rows(const LinearJob& job) {
  const int64_t row_bytes = Source::row_bytes(job), group_bytes = n * row_bytes + 1;
  const auto rows_over = [=](int64_t bytes) { return (bytes + group_bytes - 1) / group_bytes * n; };
  const bool within = n == 1 || row_bytes >= 2 * near_bytes;
  const int64_t near_rows = within ? 0 : rows_over(near_bytes);
  const int64_t far_rows = within ? rows_over(far_bytes) : near_rows + rows_over(far_bytes - near_bytes);
  return {far_rows * row_bytes, within ? near_bytes : near_rows * row_bytes, far_rows * ((job.cols + 7) / 8)};
}

template <class Source, int tokens, int n>
int64_t rows_side_by_side(const LinearJob& job, int64_t begin, int64_t end) {
  const Ahead ahead = ahead_of_rows<Source, n>(job);
  for (; begin + n <= end; begin += n) whole_rows<Source, tokens, n>(job, begin, ahead);
  return begin;
}

template <class Source, int tokens>
void rows_at_once(const LinearJob& job, int64_t begin, int64_t end) {
  // What lies nearer than what is fetched ahead.
  if (begin < end) Source(job, begin).first_lines();
  constexpr int n = rows_together<Source, tokens>, half = n > 1 ? n / 2 : 1;
  const bool sparse = static_cast<double>(Source::row_bytes(job)) <
                      sparse_below * static_cast<double>(job.cols) * Source::weight_bytes;
  if (n > half && sparse) begin = rows_side_by_side<Source, tokens, n>(job, begin, end);
  if (half > 1) begin = rows_side_by_side<Source, tokens, half>(job, begin, end);
  rows_side_by_side<Source, tokens, 1>(job, begin, end);
}

// The columns [k, k + cols) of n rows, whose state lies in memory from one chunk to the next.
template <int n, class Source, int tokens>
GOSSAMER_INLINE void chunk_of_rows(const LinearJob& job, Source* sources, Sums<Source, tokens>* all, int64_t k, int64_t cols,
                                   const Ahead& ahead) {
  Source here[n];
  Sums<Source, tokens> sums_here[n];
  GOSSAMER_UNROLL
  for (int r = 0; r < n; ++r) here[r] = sources[r], sums_here[r] = all[r];
  add_cols<n, false>(here, sums_here, job.x + k * job.tokens, job.tokens * step_cols, cols, ahead);
  GOSSAMER_UNROLL
  for (int r = 0; r < n; ++r) sources[r] = here[r], all[r] = sums_here[r];
}

template <class Source, int tokens>
void rows_in_chunks(const LinearJob& job, int64_t begin, int64_t end) {
  constexpr int64_t chunk = chunk_cols<tokens>;
  constexpr int n = rows_together<Source, tokens>;
  const Ahead ahead{Source::row_bytes(job) * chunk / (job.cols ? job.cols : 1), near_bytes, chunk / 8};
  Source sources[tile_rows];
  Sums<Source, tokens> all[tile_rows];
  for (; begin < end; begin += tile_rows) {
    const int tile = static_cast<int>(end - begin < tile_rows ? end - begin : tile_rows);
    for (int r = 0; r < tile; ++r) {
      sources[r] = Source(job, begin + r);
      all[r].clear();
    }
    for (int64_t k = 0; k < job.cols; k += chunk) {
      const int64_t cols = job.cols - k < chunk ? job.cols - k : chunk;
      int r = 0;
      for (; r + n <= tile; r += n) chunk_of_rows<n>(job, sources + r, all + r, k, cols, ahead);
      for (; r < tile; ++r) chunk_of_rows<1>(job, sources + r, all + r, k, cols, ahead);
    }
    for (int r = 0; r < tile; ++r) finish_rows<1>(job, begin + r, all + r);
  }
}

template <class Source, int tokens>
void rows(const LinearJob& job, int64_t begin, int64_t end) {
  if (job.cols <= 2 * chunk_cols<tokens>)
    rows_at_once<Source, tokens>(job, begin, end);
  else
    rows_in_chunks<Source, tokens>(job, begin, end);
}

// The last rows, those less than a block away from the end of the values, are read with care.
template <class T, int tokens>
void bitmask_rows(const LinearJob& job, int64_t begin, int64_t end) {
  const int64_t safe = job.offsets[job.rows] - Block<T>::cols;
  int64_t middle = end;
  while (middle > begin && job.offsets[middle] > safe) --middle;
  rows<BitmaskSource<T, false>, tokens>(job, begin, middle);
  rows_in_chunks<BitmaskSource<T, true>, tokens>(job, middle, end);
}

template <class T, int tokens>
void dense_rows(const LinearJob& job, int64_t begin, int64_t end) {
  rows<DenseSource<T>, tokens>(job, begin, end);
}

// A whole block: nothing in the loop but loads and stores, which compilers turn into shuffles.
template <class T, class X>
GOSSAMER_INLINE void arrange(const X* x, float* out) {
  for (int i = 0; i < Block<T>::cols; ++i) out[i] = widened(x[Block<T>::column(i)]);
}

template <class T, class X>
void arrange_all(const X* x, int64_t cols, int64_t tokens, float* out) {
  constexpr int wide = Block<T>::cols;
  for (int64_t k = 0; k < cols; k += step_cols, out += tokens * step_cols)
    for (int64_t b = 0; b < step_cols; b += wide)
      if (k + b + wide <= cols) {
        arrange<T>(x + k + b, out + b);
      } else {
        X padded[wide] = {};
        if (k + b < cols) std::memcpy(padded, x + k + b, static_cast<size_t>(cols - k - b) * sizeof(X));
        arrange<T>(padded, out + b);
      }
}

template <class T>
void prepare(const void* x, Float type, int64_t cols, int64_t token, int64_t tokens, float* out) {
  out += token * step_cols;
  if (type == Float::f32)
    arrange_all<T>(static_cast<const float*>(x), cols, tokens, out);
  else
    arrange_all<T>(static_cast<const uint16_t*>(x), cols, tokens, out);
}

inline uint64_t sum_of_words(const void* words, int64_t bytes) {
  constexpr int line = 8;
  const uint64_t* word = static_cast<const uint64_t*>(words);
  uint64_t totals[4][line] = {};
  for (int64_t left = bytes / 256; left > 0; --left, word += 4 * line)
    for (int j = 0; j < 4; ++j) {
      __builtin_prefetch(reinterpret_cast<const char*>(word + j * line) + near_bytes);
      for (int i = 0; i < line; ++i) totals[j][i] += word[j * line + i];
    }
  uint64_t total = 0;
  for (int64_t i = 0; i < bytes % 256 / 8; ++i) total += word[i];
  for (const auto& of_line : totals)
    for (uint64_t one : of_line) total += one;
  return total;
}

}  // namespace
}  // namespace gossamer

#include "many_rows.h"

namespace gossamer {
namespace {

// The entries past the group of this ISA are never called.
template <int tokens>
constexpr int in_group = tokens < group ? tokens : group;

#define GOSSAMER_TOKENS(F, T) \
  {F<T, 1>, F<T, in_group<2>>, F<T, in_group<3>>, F<T, in_group<4>>, \
   F<T, in_group<5>>, F<T, in_group<6>>, F<T, in_group<7>>, F<T, in_group<8>>}

constexpr LinearRows linear_rows = {
    {prepare<uint32_t>, prepare<uint16_t>},
    group,
    {GOSSAMER_TOKENS(bitmask_rows, uint32_t), GOSSAMER_TOKENS(bitmask_rows, uint16_t)},
    {GOSSAMER_TOKENS(dense_rows, uint32_t), GOSSAMER_TOKENS(dense_rows, uint16_t)},
    prepare_many,
    panel_tokens,
    {many<uint32_t>, many<uint16_t>},
    sum_of_words,
};

#undef GOSSAMER_TOKENS
#undef GOSSAMER_UNROLL
#undef GOSSAMER_INLINE

}  // namespace
}  // namespace gossamer
