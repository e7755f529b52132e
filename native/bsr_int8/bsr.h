// Block-sparse int8 products: y = f((x A^T) * scales + bias + residual), A of int8 blocks of 4 outputs by 1 or 4
// inputs.
//
// Activations are uint8 with a zero point, in one of three layouts:
//   t     by token blocks, channel major: block b is [channels][width] from byte 64 * b * channels on;
//   q     the same with four channels of a token side by side: [ceil(channels / 4)][width][4];
//   rows  [tokens][stride], readable for 128 bytes from every channel on.
// A token block has 64 tokens, the last one is 16, 32 or 64 wide; what lies past the last token is read and not used.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gossamer::bsr {

constexpr int64_t block_tokens = 64;
constexpr int64_t few_tokens = 4;    // up to which windows are faster than blocks of 16 tokens
constexpr int64_t row_padding = 128;  // bytes after the last channel of a row that may be read, as in activation.py

enum class Layout : int { t, q, rows };
enum class Function : int { none, relu, gelu, gelu_tanh, silu };
enum class Type : int { f32, bf16, u8, s8 };

// Groups of 16 weights, [4 rows][4 columns] each. With blocks of one column a group has four offsets, else one.
// An offset is the channel (t) or channel / 4 (q) times 8 bytes or 32 bytes: times 8 it is an address of width 64.
struct Groups {
  const int8_t* data;
  const void* offsets;    // uint16, or uint32 where `wide`
  const int64_t* starts;  // [block rows + 1]
  bool wide;
};

// Groups of 16 columns that lie within 128 channels, for few tokens: weights [4 rows][16 columns], channels from
// `base` on.
struct Windows {
  const int8_t* data;
  const uint8_t* index;   // [groups][16], < 128
  const uint32_t* base;   // [groups]
  const int64_t* starts;  // [block rows + 1]
};

// For matrix units, which multiply zeros, too, in tiles of 16 rows by 64 channels of x in the layout q, which is read
// for 15 quads past its end. Stored without the zeros, chunks of 64 channels of a panel one after the other, in each of
// them its block rows: for each the channels that it has, bit by bit, then the weights of its four rows, row by row.
struct Panels {
  const int8_t* data;     // int64 [panels], where each one's values start, from `data` on; uint64 [panels][chunks][8];
                          // values, readable for 64 bytes past the last one. Null where there are groups instead
  int64_t chunks;
};

constexpr int64_t panel_rows = 8;  // block rows

struct Weights {
  int64_t rows, cols;
  int block;             // columns of a block: 1 or 4
  Groups groups;
  Panels panels;
  Windows windows;
  const float* scale;    // per row, padded with zeros to whole tiles
  const int32_t* sums;   // of each row's weights, padded alike
  int64_t block_rows() const { return (rows + 3) / 4; }
};

struct Input {
  const uint8_t* data;
  Layout layout;
  int64_t tokens, stride;      // stride: bytes between tokens, for rows
  int zero;
  float scale;
  const float* token_scale;    // one per token, instead of `scale`; or null
  const char* ahead;           // memory that the caller reads next, to be fetched meanwhile; or null
  int64_t ahead_bytes;
};

struct Output {
  void* data;
  Type type;
  Layout layout;               // f32 and bf16: rows; f32, u8 and s8: t; u8 and s8: q and rows
  int64_t stride;              // elements between tokens, for rows
  float inverse_scale;         // of u8 and s8
  int zero;
  const float* bias;           // [rows] or null
  const void* residual;        // f32 or bf16 in rows, f32 in t, as `layout` says; or null
  Type residual_type;
  int64_t residual_stride;
  Function function;
};

// Half-open ranges of 4-row block rows and of token blocks (tokens, where the input's layout is rows).
struct Range {
  int64_t row_begin, row_end, token_begin, token_end;
};

// Row-major floats in, quantised activations out: symmetric per token (zero point 128), or with a given scale.
struct Raw {
  const void* data;
  Type type;                   // f32 or bf16
  int64_t tokens, channels, stride;
};

struct Kernels {
  void (*blocks)(const Weights&, const Input&, const Output&, const Range&);   // layouts t and q
  void (*windows)(const Weights&, const Input&, const Output&, const Range&);  // layout rows
  // Token block b, or token b where the layout is rows. `scales` per token is written if `inverse` is 0.
  void (*quantise)(const Raw&, Layout, int64_t b, float inverse, int zero, uint8_t* out, int64_t stride, float* scales);
};

// The same as Kernels::blocks from panels; range rows are multiples of a panel's. Call amx_usable() before.
void amx_blocks(const Weights&, const Input&, const Output&, const Range&);
bool amx_usable();

extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avxvnni_kernels;
extern const Kernels avx512_kernels;

inline int64_t width_of(int64_t tokens, int64_t b) {
  const int64_t left = tokens - b * block_tokens;
  return left <= 16 ? 16 : left <= 32 ? 32 : 64;
}

inline int64_t blocks_of(int64_t tokens) { return (tokens + block_tokens - 1) / block_tokens; }

}  // namespace gossamer::bsr
