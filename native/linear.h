// y = x A^T + bias, A [rows, cols] either a bitmask matrix or dense; float32 accumulation throughout.
#pragma once

#include <cstdint>

namespace gossamer {

constexpr int max_tokens = 16;
constexpr int max_group = 8;  // tokens that one pass over a row takes
constexpr int many_panels = 2;
constexpr int64_t step_cols = 64;  // x is padded with zeros to a multiple of this

enum class Float : int { f32, bf16 };  // what tensors hold; the index of the tables below

// What the kernel of a range of rows needs for a group of tokens. x is [padded cols / step][tokens][step] float32, in
// the order that LinearRows::prepare leaves it in, from the first token of the group on; y is [tokens, rows], likewise;
// bias [rows] or null.
struct LinearJob {
  const uint8_t* mask;
  const void* values;
  const int64_t* offsets;
  int64_t rows, cols;
  const float* x;
  int64_t tokens;  // of all groups
  const void* bias;
  Float bias_type;
  void* y;
  Float y_type;
};

// The kernels of one ISA; the first index is the type of the weights, the second the tokens of a group - 1.
struct LinearRows {
  using Rows = void (*)(const LinearJob& job, int64_t begin, int64_t end);
  using Prepare = void (*)(const void* x, Float type, int64_t cols, int64_t token, int64_t tokens, float* out);

  Prepare prepare[2];
  int group;  // tokens a pass, at most max_group
  Rows bitmask[2][max_group];
  Rows dense[2][max_group];
  // For many tokens; x is [panels of tokens][cols][panel], padded with anything finite. Is what was prepared finite?
  bool (*prepare_many)(const void* x, Float type, int64_t row_stride_bytes, int64_t cols, int64_t tokens,
                       int64_t begin_col, int64_t end_col, float* out);
  int panel;  // tokens
  Rows many[2];  // of at most many_panels
  uint64_t (*sum)(const void* words, int64_t bytes);
};

extern const LinearRows linear_scalar;
#ifdef GOSSAMER_X86
extern const LinearRows linear_avx2;
extern const LinearRows linear_avx512;

// The same where the CPU has AMX, of bfloat16 weights by bfloat16 x with y in bfloat16. x is
// [padded cols / 2][tokens][2] bfloat16, in the order that amx_prepare leaves it in. Call amx_usable() before.
bool amx_usable();
void amx_prepare(const void* x, int64_t row_stride_bytes, int64_t cols, int64_t tokens, void* out);
void amx_bitmask(const LinearJob& job, int64_t begin, int64_t end);
#endif

constexpr int64_t amx_tokens = 3;  // from so many tokens on AMX is faster
constexpr int64_t amx_rows = 16;   // that it takes at a time

// Pointers come from Python as integers, types as Float. x [tokens <= 16, cols] with a row stride in bytes.
void bitmask_linear(uintptr_t mask, uintptr_t values, uintptr_t offsets, int type, int64_t rows, int64_t cols,
                    uintptr_t x, int x_type, int64_t x_row_stride_bytes, int64_t tokens, uintptr_t bias, int bias_type,
                    uintptr_t y, int threads);
void dense_linear(uintptr_t weight, int type, int64_t rows, int64_t cols, uintptr_t x, int x_type,
                  int64_t x_row_stride_bytes, int64_t tokens, uintptr_t bias, int bias_type, uintptr_t y, int threads);

// The same for any number of tokens, without multiplying zeros: false where x holds Inf or NaN, which a zero does not
// take away, and y is not to be used.
bool bitmask_many(uintptr_t mask, uintptr_t values, uintptr_t offsets, int type, int64_t rows, int64_t cols,
                  uintptr_t x, int x_type, int64_t x_row_stride_bytes, int64_t tokens, uintptr_t bias, int bias_type,
                  uintptr_t y, int threads);

// The sum of a buffer's 64-bit words, modulo 2^64: reads memory as fast as it can be read.
uint64_t sum_words(uintptr_t buffer, int64_t bytes, int threads);

}  // namespace gossamer
