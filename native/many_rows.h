// Many tokens by a bitmask matrix: only what is stored is multiplied. Part of linear_rows.h, which see.
//
// x comes transposed, [panels][cols][panel_tokens] float32, so that a weight meets the tokens of a panel as whole
// registers: one broadcast and a few multiplications a non-zero, none a zero. Columns are worked off in blocks whose x
// fits a first-level cache, rows in tiles whose non-zeros are spelled out (value, place of its x) once for all panels.
// A translation unit also defines
//   Vec broadcast(const float*); void store(float*, Vec);
//   int64_t places(uint64_t bits, uint16_t first, uint16_t each, uint16_t* out);
//                                                // first + each * j for every bit j that is set; may write 64
//   void turn(const float (*square)[side], int cols, float* to, int64_t stride);
//                                                // transposed, so many columns of it
namespace gossamer {
namespace {

constexpr int panel_vecs = 4, panel_tokens = panel_vecs * lanes;
constexpr int64_t block_bytes = 32768;
constexpr int64_t block_cols = block_bytes / (panel_tokens * int64_t{sizeof(float)});
constexpr int spelled_rows = 64;  // a tile
constexpr int unrolled = 4;       // non-zeros
static_assert(block_cols * panel_tokens <= 65536 && block_cols % 64 == 0);

// The non-zeros of a tile in a block of columns; those of a row are filled up to a multiple of four.
struct Spelled {
  static constexpr int64_t room = spelled_rows * block_cols + 64;  // up to 64 are written ahead of their time
  float values[room];
  uint16_t places[room];  // in floats, from the block of x
  int32_t begin[spelled_rows + 1];
};

template <class T>
struct RowsLeft {
  const uint8_t* mask[spelled_rows];
  const T* values[spelled_rows];
  const T* end;  // of all values
};

// Adds the n non-zeros to the sums of one row.
template <int vecs>
GOSSAMER_INLINE void add_row(const float* x, const float* values, const uint16_t* places, int64_t n, float* sums) {
  Vec even[vecs], odd[vecs];
  GOSSAMER_UNROLL
  for (int v = 0; v < vecs; ++v) even[v] = load(sums + v * lanes), odd[v] = zero();
  for (int64_t i = 0; i < n; i += unrolled) {
    uint64_t at;  // of four at once: loads are what this loop waits for
    std::memcpy(&at, places + i, sizeof at);
    GOSSAMER_UNROLL
    for (int j = 0; j < unrolled; ++j, at >>= 16) {
      const Vec w = broadcast(values + i + j);
      const float* here = x + static_cast<uint16_t>(at);
      GOSSAMER_UNROLL
      for (int v = 0; v < vecs; ++v) (j % 2 ? odd : even)[v] = fma(w, load(here + v * lanes), (j % 2 ? odd : even)[v]);
    }
  }
  GOSSAMER_UNROLL
  for (int v = 0; v < vecs; ++v) store(sums + v * lanes, add(even[v], odd[v]));
}

template <int vecs>
void add_tile(const float* x, const Spelled& tile, int rows, float (*sums)[panel_tokens]) {
  for (int r = 0; r < rows; ++r) {
    const int32_t begin = tile.begin[r];
    if (const int32_t n = tile.begin[r + 1] - begin)
      add_row<vecs>(x, tile.values + begin, tile.places + begin, n, sums[r]);
  }
}

using AddTile = void (*)(const float*, const Spelled&, int, float (*)[panel_tokens]);
constexpr AddTile add_tiles[panel_vecs] = {add_tile<1>, add_tile<2>, add_tile<3>, add_tile<4>};

inline float widened(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Constant bounds, which compilers turn into one register.
template <class T>
GOSSAMER_INLINE void widen(const T* from, float* to) {
  T row[side];
  std::memcpy(row, from, sizeof row);
  for (int j = 0; j < side; ++j) to[j] = widened(row[j]);
}

// The next `cols` columns of a tile's rows, which are then left behind.
template <class T>
void spell(RowsLeft<T>& left, int rows, int64_t cols, Spelled& tile) {
  int32_t n = 0;
  for (int r = 0; r < rows; ++r) {
    tile.begin[r] = n;
    const int32_t first = n;
    for (int64_t k = 0; k < cols; k += 64) {
      const uint64_t bits = cols - k < 64 ? bits_of_tail(left.mask[r], cols - k) : bits_of_step(left.mask[r]);
      left.mask[r] += 8;
      n += static_cast<int32_t>(places(bits, static_cast<uint16_t>(k * panel_tokens), panel_tokens, tile.places + n));
    }
    const T* values = left.values[r];
    const int32_t count = n - first;
    left.values[r] += count;
    for (int32_t i = 0; i < count * int32_t{sizeof(T)}; i += line_bytes)  // of the next block
      __builtin_prefetch(reinterpret_cast<const char*>(left.values[r]) + i + line_bytes);
    int32_t i = 0;
    for (; i < count && left.end - (values + i) >= side; i += side) widen(values + i, tile.values + first + i);
    for (; i < count; ++i) tile.values[first + i] = widened(values[i]);
    for (; n % unrolled; ++n) tile.values[n] = 0, tile.places[n] = 0;
  }
  tile.begin[rows] = n;
}

inline void put(float value, float& y) { y = value; }
inline void put(float value, uint16_t& y) { y = to_bf16(value); }

template <class Y>
GOSSAMER_INLINE void put_row(const float* sums, const float* bias, int n, Y* y) {
  Y row[side];
  for (int j = 0; j < side; ++j) put(sums[j] + bias[j], row[j]);
  if (n == side)
    std::memcpy(y, row, sizeof row);
  else
    std::memcpy(y, row, static_cast<size_t>(n) * sizeof(Y));
}

// The sums are [panels][rows of the tile][panel_tokens], y is [tokens][rows].
template <class Y>
void finish_tile(const LinearJob& job, int64_t row, int rows, const float (*sums)[spelled_rows][panel_tokens]) {
  alignas(64) float square[side][side], turned[side][side], bias[spelled_rows] = {};
  if (job.bias)
    for (int r = 0; r < rows; ++r) bias[r] = to_float(job.bias, job.bias_type, row + r);
  for (int64_t t = 0; t < job.tokens; t += side)
    for (int r = 0; r < rows; r += side) {
      for (int i = 0; i < side; ++i)
        std::memcpy(square[i], sums[t / panel_tokens][r + i] + t % panel_tokens, sizeof square[i]);
      turn(square, side, turned[0], side);
      const int wide = rows - r < side ? rows - r : side;
      Y* y = static_cast<Y*>(job.y) + t * job.rows + row + r;
      for (int64_t i = 0; i < side && t + i < job.tokens; ++i, y += job.rows) put_row(turned[i], bias + r, wide, y);
    }
}

// A square of x, widened and padded with zeros.
template <class X>
GOSSAMER_INLINE void read_square(const char* x, int64_t row_stride_bytes, int64_t rows, int64_t cols,
                                 float (*square)[side]) {
  for (int64_t i = 0; i < side; ++i, x += row_stride_bytes)
    if (i < rows && cols >= side) {
      widen(reinterpret_cast<const X*>(x), square[i]);
    } else {
      X padded[side] = {};
      if (i < rows) std::memcpy(padded, x, static_cast<size_t>(cols) * sizeof(X));
      widen(padded, square[i]);
    }
}

GOSSAMER_INLINE bool finite(const float (*square)[side]) {
  uint32_t bits[side * side], special = 0;
  std::memcpy(bits, square, sizeof bits);
  for (const uint32_t one : bits) special |= (one & 0x7f800000) == 0x7f800000;
  return !special;
}

template <class X>
bool turn_cols(const char* x, int64_t row_stride_bytes, int64_t cols, int64_t tokens, int64_t begin, int64_t end,
               float* out) {
  alignas(64) float square[side][side];
  bool all_finite = true;
  for (int64_t t = 0; t < tokens; t += side)
    for (int64_t k = begin; k < end; k += side) {
      const char* from = x + t * row_stride_bytes + k * int64_t{sizeof(X)};
      read_square<X>(from, row_stride_bytes, tokens - t, end - k, square);
      all_finite &= finite(square);
      float* to = out + (t / panel_tokens * cols + k) * panel_tokens + t % panel_tokens;
      turn(square, end - k < side ? static_cast<int>(end - k) : side, to, panel_tokens);
    }
  return all_finite;
}

// Columns [begin, end) of x into the order that `many` takes.
bool prepare_many(const void* x, Float type, int64_t row_stride_bytes, int64_t cols, int64_t tokens, int64_t begin,
                  int64_t end, float* out) {
  const char* from = static_cast<const char*>(x);
  return (type == Float::f32 ? turn_cols<float> : turn_cols<uint16_t>)(from, row_stride_bytes, cols, tokens, begin, end,
                                                                      out);
}

// job.x is as prepare_many leaves it, of at most many_panels.
template <class T>
void many(const LinearJob& job, int64_t begin, int64_t end) {
  alignas(64) Spelled tile;
  alignas(64) float sums[many_panels][spelled_rows][panel_tokens];
  RowsLeft<T> left;
  left.end = static_cast<const T*>(job.values) + job.offsets[job.rows];
  for (; begin < end; begin += spelled_rows) {
    const int rows = static_cast<int>(end - begin < spelled_rows ? end - begin : spelled_rows);
    for (int r = 0; r < rows; ++r) {
      left.mask[r] = job.mask + (begin + r) * ((job.cols + 7) / 8);
      left.values[r] = static_cast<const T*>(job.values) + job.offsets[begin + r];
    }
    std::memset(sums, 0, (job.tokens + panel_tokens - 1) / panel_tokens * sizeof sums[0]);
    for (int64_t k = 0; k < job.cols; k += block_cols) {
      spell(left, rows, job.cols - k < block_cols ? job.cols - k : block_cols, tile);
      const float* x = job.x + k * panel_tokens;
      for (int64_t p = 0, tokens = job.tokens; tokens > 0; ++p, tokens -= panel_tokens, x += job.cols * panel_tokens)
        add_tiles[(tokens < panel_tokens ? tokens - 1 : panel_tokens - 1) / lanes](x, tile, rows, sums[p]);
    }
    (job.y_type == Float::f32 ? finish_tile<float> : finish_tile<uint16_t>)(job, begin, rows, sums);
  }
}

}  // namespace
}  // namespace gossamer
