// A transformer encoder on int8 (BERT's: normalised after each residual), activations in the blocked layouts of
// ../bsr_int8/bsr.h from the embeddings to the last layer.
//
// The residual is float32 in the layout t. What products read is uint8 with a scale per token: symmetric (zero point
// 128) after a normalisation and after attention, and from the least value of the activation function on (zero point 0)
// after that. Queries, keys and values are uint8 with zero point 128 in the layout q; their calibrated scales are part
// of the weights' scales.
#pragma once

#include <cstdint>
#include <vector>

#include "../bsr_int8/bsr.h"

namespace gossamer::encoder {

constexpr int64_t lanes = 16;  // tokens of a vector
constexpr int64_t query_lanes = 2 * lanes;  // queries that attention takes at a time

struct Norm {
  const float* weight;
  const float* bias;
  float eps;
};

struct Linear {
  bsr::Weights weights;
  const float* bias;
  const float* factors;  // [cols], of the input before it is rounded; null: all one
  // What the weights read.
  bsr::Layout layout() const { return weights.panels.data || weights.block == 4 ? bsr::Layout::q : bsr::Layout::t; }
};

struct Layer {
  Linear qkv, out, up, down;
  Norm attention_norm, output_norm;
  const float* score_scale;  // [heads], of (query + 128) (key + 128) before softmax, times log2 e
  const float* value_scale;  // [hidden]
  bsr::Function function;
  float least;               // the least value of the function; what it leaves of products is part of down's bias
};

// Tables are bfloat16 [rows][hidden].
struct Embeddings {
  const uint16_t *words, *positions, *types;
  int64_t word_rows, position_rows, type_rows;
  int64_t pad;  // RoBERTa: positions count the tokens that are not this one, from pad + 1 on; else -1
  Norm norm;
};

struct Model {
  int64_t hidden, heads, intermediate;
  Embeddings embeddings;
  std::vector<Layer> layers;
};

struct Token {
  int64_t word, position, type;
};

// Tokens begin .. end of one block; begin is a multiple of `lanes`, end too or the width of the block.
struct Columns {
  float* x;              // of the block, layout t
  int64_t channels, width, begin, end;
  uint8_t* bytes;        // of the block, or null
  bsr::Layout layout;
  float* scales;         // of the block's tokens
  const float* factors;  // as of Linear
  const float* least;    // x is at least this, which becomes 0; null: x may have any sign, and 0 becomes 128
};

struct Attention {
  const uint8_t* qkv;    // layout q, 3 * hidden channels
  int64_t tokens, hidden, head_size;
  const float *score_scale, *value_scale;
  float* context;        // layout t
};

// Bytes of scratch memory for sentences of up to `length` tokens.
inline int64_t attention_scratch(int64_t head_size, int64_t length) {
  const int64_t padded = (length + query_lanes - 1) / query_lanes * query_lanes;
  const int64_t bytes = 3 * head_size, scores = 5 * query_lanes, wide = 4 * head_size;  // per token; wide: AVX2
  return padded * (bytes + scores + wide) + 32 * head_size + 64;
}

struct Kernels {
  // Normalises x in place (unless the norm is null), then writes it as bytes with a scale per token.
  void (*norm)(const Columns&, const Norm*);
  // One head of the sentence of tokens first .. first + count.
  void (*attend)(const Attention&, int64_t first, int64_t count, int64_t head, uint8_t* scratch);
  // The sums of the rows of up to 16 tokens, to the columns from `begin` on.
  void (*embed)(const Embeddings&, const Token* tokens, int64_t count, const Columns&);
  // Row-major from columns and back: row i is that of column begin + i, null where there is none.
  void (*to_rows)(const Columns&, float* const* rows);
  void (*from_rows)(const Columns&, const float* const* rows);
};

extern const Kernels scalar_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;

}  // namespace gossamer::encoder
