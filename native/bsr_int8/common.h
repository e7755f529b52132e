// What the kernels of all instruction sets have in common, and the end of a tile in plain code.
// Everything here is static, because each translation unit is compiled for its own instruction set.
#pragma once

#include <cmath>
#include <cstring>

#include "bsr.h"

namespace gossamer::bsr {
namespace {

// Where block b of a t or q activation with this many channels starts, in elements.
inline int64_t block_start(Layout layout, int64_t channels, int64_t b) {
  return b * block_tokens * (layout == Layout::q ? (channels + 3) / 4 * 4 : channels);
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Rounds to nearest, ties to even; a NaN stays one.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float load_float(const void* base, Type type, int64_t i) {
  return type == Type::f32 ? static_cast<const float*>(base)[i] : from_bf16(static_cast<const uint16_t*>(base)[i]);
}

// Not std::fmin: a NaN becomes the bound, as in the vector instructions.
inline int saturate(float value, int low, int high) {
  value = value < static_cast<float>(high) ? value : static_cast<float>(high);
  value = value > static_cast<float>(low) ? value : static_cast<float>(low);
  return static_cast<int>(std::nearbyintf(value));
}

// Nothing happens between the product and its rounding to bytes: then their scales are one.
inline bool plain_bytes(const Output& out) {
  return (out.type == Type::u8 || out.type == Type::s8) && out.layout != Layout::rows && !out.residual &&
         out.function == Function::none;
}

// To bytes of a u8 or s8 output.
inline void requantise(const Output& out, const float* v, int64_t count, uint8_t* bytes) {
  const bool done = plain_bytes(out);
  const float scale = done ? 1.0f : out.inverse_scale, zero = done ? 0.0f : static_cast<float>(out.zero);
  const int low = out.type == Type::u8 ? 0 : -128, high = low + 255;
  for (int64_t t = 0; t < count; ++t) bytes[t] = static_cast<uint8_t>(saturate(std::fma(v[t], scale, zero), low, high));
}

template <class F>
inline void each(float* v, int64_t count, const F& f) {
  for (int64_t t = 0; t < count; ++t) v[t] = f(v[t]);
}

inline void apply(Function function, float* v, int64_t count) {
  switch (function) {
    case Function::none: return;
    case Function::relu: return each(v, count, [](float x) { return x <= 0 ? 0.0f : x; });
    case Function::gelu:
      return each(v, count, [](float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)); });
    case Function::gelu_tanh:
      return each(v, count, [](float x) {
        return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
      });
    case Function::silu: return each(v, count, [](float x) { return x / (1.0f + std::exp(-x)); });
  }
}

// Where output (row, token) lies, in elements.
inline int64_t place(Layout layout, int64_t rows, int64_t stride, int64_t tokens, int64_t row, int64_t token) {
  if (layout == Layout::rows) return token * stride + row;
  const int64_t b = token / block_tokens, t = token % block_tokens, width = width_of(tokens, b);
  const int64_t start = block_start(layout, rows, b);
  return layout == Layout::t ? start + row * width + t : start + (row / 4 * width + t) * 4 + row % 4;
}

// `step` elements apart.
inline void store(const Output& out, int64_t at, int64_t step, const float* v, int64_t count) {
  if (out.type == Type::f32) {
    float* to = static_cast<float*>(out.data) + at;
    for (int64_t t = 0; t < count; ++t) to[t * step] = v[t];
  } else if (out.type == Type::bf16) {
    uint16_t* to = static_cast<uint16_t*>(out.data) + at;
    for (int64_t t = 0; t < count; ++t) to[t * step] = to_bf16(v[t]);
  } else {
    uint8_t bytes[block_tokens] = {}, *to = static_cast<uint8_t*>(out.data) + at;
    requantise(out, v, count, bytes);
    if (step == 1) std::memcpy(to, bytes, static_cast<size_t>(count));
    else for (int64_t t = 0; t < count; ++t) to[t * step] = bytes[t];
  }
}

// The end of a tile where no vector code does it: `sums` [4][width] of a block row and the tokens from `token` on.
inline void finish_tile(const Weights& a, const Input& x, const Output& out, int64_t block_row, int64_t token,
                        int64_t width, const int32_t* sums) {
  const int64_t count = std::min(width, x.tokens - token);
  for (int64_t row = 4 * block_row; row < std::min(a.rows, 4 * block_row + 4); ++row, sums += width) {
    float v[block_tokens] = {};
    float bias = out.bias ? out.bias[row] : 0.0f, scale = x.token_scale ? a.scale[row] : a.scale[row] * x.scale;
    if (plain_bytes(out)) {
      scale *= out.inverse_scale;
      bias = std::fma(bias, out.inverse_scale, static_cast<float>(out.zero));
    }
    const int32_t zero = x.zero * a.sums[row];
    // The order of operations is that of the vector code: the same bits.
    if (x.token_scale)
      for (int64_t t = 0; t < count; ++t)
        v[t] = std::fma(static_cast<float>(sums[t] - zero) * x.token_scale[token + t], scale, bias);
    else
      for (int64_t t = 0; t < count; ++t) v[t] = std::fma(static_cast<float>(sums[t] - zero), scale, bias);
    const int64_t at = place(out.layout, a.rows, out.stride, x.tokens, row, token);
    const int64_t step = out.layout == Layout::rows ? out.stride : out.layout == Layout::t ? 1 : 4;
    if (out.residual) {
      const int64_t from = place(out.layout, a.rows, out.residual_stride, x.tokens, row, token);
      const int64_t stride = out.layout == Layout::rows ? out.residual_stride : 1;
      for (int64_t t = 0; t < count; ++t) v[t] += load_float(out.residual, out.residual_type, from + t * stride);
    }
    apply(out.function, v, count);
    store(out, at, step, v, count);
  }
}

inline int64_t offset_at(const Groups& g, int64_t i) {
  return g.wide ? static_cast<const uint32_t*>(g.offsets)[i] : static_cast<const uint16_t*>(g.offsets)[i];
}

// Channels from..from + count of token t, as float32.
inline void load_floats(const Raw& x, int64_t t, int64_t from, int64_t count, float* out) {
  const int64_t at = t * x.stride + from;
  if (x.type == Type::f32) std::memcpy(out, static_cast<const float*>(x.data) + at, static_cast<size_t>(4 * count));
  else for (int64_t k = 0; k < count; ++k) out[k] = from_bf16(static_cast<const uint16_t*>(x.data)[at + k]);
}

constexpr int64_t piece = 256;  // channels at a time

// Of token t of x: its largest magnitude, NaN if any element is NaN or infinite. Bits of magnitudes order as integers.
inline float magnitude(const Raw& x, int64_t t) {
  uint32_t most = 0;
  for (int64_t from = 0; from < x.channels; from += piece) {
    const int64_t count = std::min(piece, x.channels - from);
    float v[piece];
    uint32_t bits[piece];
    load_floats(x, t, from, count, v);
    std::memcpy(bits, v, static_cast<size_t>(4 * count));
    for (int64_t k = 0; k < count; ++k) most = std::max(most, bits[k] & 0x7fffffffu);
  }
  float value;
  std::memcpy(&value, &most, 4);
  return most >= 0x7f800000u ? std::nanf("") : value;
}

// The scale of a token and its inverse; a token of zeros has scale 0, one that is not finite has scale NaN.
inline float scale_of(float magnitude, float* inverse) {
  const float scale = magnitude / 127.0f;
  *inverse = magnitude >= 1e-36f ? 127.0f / magnitude : 0.0f;
  return scale;
}

// 1.5 * 2^23: the sum of it and less than 2^22 is rounded to a whole number, to nearest, ties to even, whose bits are
// the last ones of the float.
constexpr float rounder = 12582912.0f;

// round(v * inverse + zero), saturating, without a rounding in between; a NaN becomes 255.
inline uint8_t to_byte(float v, float inverse, int zero) {
  float sum = std::fma(v, inverse, rounder + static_cast<float>(zero));
  sum = sum < rounder + 255.0f ? sum : rounder + 255.0f;
  sum = sum > rounder ? sum : rounder;
  return static_cast<uint8_t>(sum - rounder);
}

// See Kernels::quantise.
inline void quantise_plain(const Raw& x, Layout layout, int64_t b, float inverse, int zero, uint8_t* out,
                           int64_t stride, float* scales) {
  const bool dynamic = inverse == 0, rows = layout == Layout::rows, quads = layout == Layout::q;
  const int64_t token = rows ? b : b * block_tokens, width = rows ? 1 : width_of(x.tokens, b);
  const int64_t padded = quads ? (x.channels + 3) / 4 * 4 : x.channels;
  out += rows ? b * stride : block_start(layout, x.channels, b);
  for (int64_t t = 0; t < width; ++t) {
    const bool real = token + t < x.tokens;
    if (dynamic && real) scales[token + t] = scale_of(magnitude(x, token + t), &inverse);
    for (int64_t from = 0; from < padded; from += piece) {
      const int64_t count = std::min(piece, padded - from);
      float v[piece] = {};
      uint8_t bytes[piece] = {};
      if (real) load_floats(x, token + t, from, std::min(count, x.channels - from), v);
      for (int64_t k = 0; k < count; ++k) bytes[k] = to_byte(v[k], inverse, zero);
      if (quads)
        for (int64_t k = 0; k < count; k += 4) std::memcpy(out + ((from + k) / 4 * width + t) * 4, bytes + k, 4);
      else
        for (int64_t k = 0; k < count; ++k) out[(from + k) * width + t] = bytes[k];
    }
  }
}

}  // namespace
}  // namespace gossamer::bsr
