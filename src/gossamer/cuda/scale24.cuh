// A product of matrices of 8 bits, [tokens, rows] in bfloat16, times a scale for each of its tokens and rows, in place.
// Macro: BF16 (1).
#include "pack24.cuh"

// A thread takes 8 values of one token. `bias`: null or [rows]. Grid: (tokens, ceil(rows / 8 / 256)), block 256.
extern "C" __global__ void __launch_bounds__(256)
    scale24(u16* d, const float* token_scales, const float* row_scales, const u16* bias, i64 tokens, i64 rows) {
  const i64 token = blockIdx.x, row = ((i64)blockIdx.y * 256 + threadIdx.x) * 8;
  if (row >= rows) return;
  const float scale = token_scales[token];
  alignas(16) u16 v[8], b[8] = {};
  alignas(16) float s[8];
  uint4* at = (uint4*)(d + token * rows + row);
  *(uint4*)v = *at;
  ((uint4*)s)[0] = ((const uint4*)(row_scales + row))[0], ((uint4*)s)[1] = ((const uint4*)(row_scales + row))[1];
  if (bias) *(uint4*)b = *(const uint4*)(bias + row);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = narrow(widen(v[i]) * (scale * s[i]) + widen(b[i]));
  *at = *(const uint4*)v;
}
