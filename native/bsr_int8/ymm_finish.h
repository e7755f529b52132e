// The end of products where there is no AVX-512: 8 outputs by 16 tokens at a time, as in finish_tile to the bit, but for
// the functions.
#pragma once

#include <immintrin.h>

#include "common.h"

#define INLINE inline __attribute__((always_inline))

namespace gossamer::bsr {
namespace {

INLINE __m256 set(float v) { return _mm256_set1_ps(v); }

// For -87 <= x <= 87, to 2 units in the last place; less counts as -87.
INLINE __m256 exponential(__m256 x) {
  x = _mm256_max_ps(x, set(-87.0f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, set(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, set(0.693145752f), x);
  r = _mm256_fnmadd_ps(n, set(1.42860677e-6f), r);
  __m256 p = set(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm256_fmadd_ps(p, r, set(c));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

INLINE __m256 over_one_plus_exp(__m256 v, __m256 exponent) {
  return _mm256_div_ps(v, _mm256_add_ps(exponential(_mm256_min_ps(exponent, set(87.0f))), set(1.0f)));
}

// Abramowitz and Stegun 7.1.26: the error function to 1.5e-7.
INLINE __m256 gelu(__m256 v) {
  const __m256 z = _mm256_mul_ps(_mm256_andnot_ps(set(-0.0f), v), set(0.70710678f));
  const __m256 t = _mm256_div_ps(set(1.0f), _mm256_fmadd_ps(z, set(0.3275911f), set(1.0f)));
  __m256 p = set(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = _mm256_fmadd_ps(p, t, set(c));
  const __m256 tail = _mm256_mul_ps(_mm256_mul_ps(p, t), exponential(_mm256_xor_ps(_mm256_mul_ps(z, z), set(-0.0f))));
  const __m256 both = _mm256_blendv_ps(_mm256_sub_ps(set(2.0f), tail), tail, v);  // by the sign of v
  return _mm256_mul_ps(_mm256_mul_ps(v, set(0.5f)), both);
}

INLINE __m256 gelu_tanh(__m256 v) {
  const __m256 cube = _mm256_mul_ps(_mm256_mul_ps(v, v), v);
  const __m256 u = _mm256_fmadd_ps(cube, set(0.044715f), v);
  return over_one_plus_exp(v, _mm256_mul_ps(u, set(-2.0f * 0.79788456f)));
}

INLINE __m256 applied(Function function, __m256 v) {
  switch (function) {
    case Function::none: return v;
    case Function::relu: return _mm256_max_ps(_mm256_setzero_ps(), v);
    case Function::gelu: return gelu(v);
    case Function::gelu_tanh: return gelu_tanh(v);
    case Function::silu: return over_one_plus_exp(v, _mm256_xor_ps(v, set(-0.0f)));
  }
  return v;
}

INLINE __m256 widen(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// To bfloat16, to nearest, ties to even; a NaN stays one.
INLINE __m128i narrow(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet),
                                       _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

// Vector i of eight becomes lane i of each.
INLINE void transpose(__m256 (&v)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

constexpr int tile_rows = 8, tile_tokens = 16;

struct Tile {  // outputs by tokens
  alignas(32) int32_t sums[tile_rows][tile_tokens];
};

class Finish {
  const Weights& a;
  const Input& x;
  const Output& out;
  const int64_t token, count;  // of which real
  const bool done;             // nothing happens between a product and its rounding to bytes
  const float most, least;     // of bytes
  alignas(32) float scales[tile_tokens] = {};
  alignas(32) float values[tile_rows][tile_tokens];

 public:
  // `token`: the first of up to 16.
  Finish(const Weights& a, const Input& x, const Output& out, int64_t token)
      : a(a), x(x), out(out), token(token), count(std::min<int64_t>(tile_tokens, x.tokens - token)),
        done(plain_bytes(out)), most(out.type == Type::u8 ? 255.0f : 127.0f),
        least(out.type == Type::u8 ? 0.0f : -128.0f) {
    if (x.token_scale) std::copy(x.token_scale + token, x.token_scale + token + count, scales);
  }

  // Of block rows row and row + 1, or of the first alone.
  void operator()(int64_t row, bool both, const Tile& tile) {
    const int64_t first = 4 * row, many = rows_of(row, both);
    affine(first, many, tile);
    if (out.layout == Layout::rows) return to_rows(first, many);
    if (out.layout == Layout::t)
      for (int64_t r = 0; r < many; ++r) to_t(first + r, values[r]);
    else
      for (int64_t r = 0; r < many; r += 4) to_q(row + r / 4, values + r);
  }

  // Of the same block rows and one token, row by row, to row-major output.
  INLINE void row_of(int64_t t, int64_t row, bool both, const int32_t* sums) const {
    const int64_t first = 4 * row, many = rows_of(row, both);
    const Terms terms = terms_of(first, many);
    const __m256i whole = _mm256_sub_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(sums)), terms.zeros);
    __m256 v = _mm256_cvtepi32_ps(whole);
    if (x.token_scale) v = _mm256_mul_ps(v, set(x.token_scale[t]));
    write_row(t, first, many, _mm256_fmadd_ps(v, terms.scale, terms.bias));
  }

 private:
  struct Terms {  // of eight outputs
    __m256i zeros;
    __m256 scale, bias;
  };

  INLINE int64_t rows_of(int64_t row, bool both) const { return std::min<int64_t>(both ? 8 : 4, a.rows - 4 * row); }

  // Zeros past the last real row.
  INLINE Terms terms_of(int64_t first, int64_t many) const {
    const __m256i rows = real(many), sums = _mm256_maskload_epi32(a.sums + first, rows);
    Terms found{_mm256_mullo_epi32(sums, _mm256_set1_epi32(x.zero)), _mm256_maskload_ps(a.scale + first, rows),
                out.bias ? _mm256_maskload_ps(out.bias + first, rows) : _mm256_setzero_ps()};
    if (!x.token_scale) found.scale = _mm256_mul_ps(found.scale, set(x.scale));
    if (done) {
      found.scale = _mm256_mul_ps(found.scale, set(out.inverse_scale));
      found.bias = _mm256_fmadd_ps(found.bias, set(out.inverse_scale), set(static_cast<float>(out.zero)));
    }
    return found;
  }

  static INLINE __m256i real(int64_t many) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(many)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  INLINE void affine(int64_t first, int64_t many, const Tile& tile) {
    alignas(32) int32_t zeros[tile_rows];
    alignas(32) float scale[tile_rows], bias[tile_rows];
    const Terms terms = terms_of(first, many);
    _mm256_store_si256(reinterpret_cast<__m256i*>(zeros), terms.zeros);
    _mm256_store_ps(scale, terms.scale);
    _mm256_store_ps(bias, terms.bias);
    const int64_t padded = (many + 3) / 4 * 4;
    for (int64_t r = 0; r < padded; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < tile_tokens; i += 8) {
        const __m256i sum = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile.sums[r] + i));
        __m256 v = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(zeros[r])));
        if (x.token_scale) v = _mm256_mul_ps(v, _mm256_load_ps(scales + i));
        _mm256_store_ps(values[r] + i, _mm256_fmadd_ps(v, set(scale[r]), set(bias[r])));
      }
  }

  void to_rows(int64_t first, int64_t many) const {
    const bool plain = out.type == Type::f32 && !out.residual && out.function == Function::none && many == tile_rows;
    for (int64_t from = 0; from < count; from += 8) {
      __m256 v[8];
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) v[r] = _mm256_load_ps(values[r] + from);
      transpose(v);
      if (plain && from + 8 <= count) {
        float* to = static_cast<float*>(out.data) + (token + from) * out.stride + first;
#pragma GCC unroll 8
        for (int t = 0; t < 8; ++t, to += out.stride) _mm256_storeu_ps(to, v[t]);
      } else {
        alignas(32) float turned[8][8];
#pragma GCC unroll 8
        for (int t = 0; t < 8; ++t) _mm256_store_ps(turned[t], v[t]);
        for (int64_t t = 0; t < std::min<int64_t>(8, count - from); ++t)
          write_row(token + from + t, first, many, _mm256_load_ps(turned[t]));
      }
    }
  }

  // Outputs first .. + many of one token.
  void write_row(int64_t t, int64_t first, int64_t many, __m256 v) const {
    const __m256i rows = real(many);
    const auto bytes = [many](int64_t item) { return static_cast<size_t>(many * item); };
    if (out.residual) {
      const int64_t at = t * out.residual_stride + first;
      __m256 other;
      if (out.residual_type == Type::f32) {
        other = _mm256_maskload_ps(static_cast<const float*>(out.residual) + at, rows);
      } else {
        alignas(16) uint16_t halves[8] = {};
        std::memcpy(halves, static_cast<const uint16_t*>(out.residual) + at, bytes(2));
        other = widen(_mm_load_si128(reinterpret_cast<const __m128i*>(halves)));
      }
      v = _mm256_add_ps(v, other);
    }
    v = applied(out.function, v);
    const int64_t at = t * out.stride + first;
    if (out.type == Type::f32) return _mm256_maskstore_ps(static_cast<float*>(out.data) + at, rows, v);
    alignas(16) uint8_t held[16];
    const bool half = out.type == Type::bf16;
    _mm_store_si128(reinterpret_cast<__m128i*>(held), half ? narrow(v) : packed(whole(v), _mm256_setzero_si256()));
    if (half) std::memcpy(static_cast<uint16_t*>(out.data) + at, held, bytes(2));
    else std::memcpy(static_cast<uint8_t*>(out.data) + at, held, bytes(1));
  }

  // What of a float becomes a byte. A NaN becomes the upper bound.
  INLINE __m256i whole(__m256 v) const {
    if (!done) v = _mm256_fmadd_ps(v, set(out.inverse_scale), set(static_cast<float>(out.zero)));
    return _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(v, set(most)), set(least)));
  }

  // Bytes, u8 or s8, of 16 integers within their range.
  INLINE __m128i packed(__m256i low, __m256i high) const {
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    const __m128i one = _mm256_castsi256_si128(both), two = _mm256_extracti128_si256(both, 1);
    return out.type == Type::u8 ? _mm_packus_epi16(one, two) : _mm_packs_epi16(one, two);
  }

  INLINE __m128i bytes_of(const float* v) const { return packed(whole(_mm256_load_ps(v)), whole(_mm256_load_ps(v + 8))); }

  void to_t(int64_t m, float* v) const {
    const int64_t at = place(Layout::t, a.rows, 0, x.tokens, m, token);
    if (!done)
#pragma GCC unroll 2
      for (int i = 0; i < tile_tokens; i += 8) {
        __m256 y = _mm256_load_ps(v + i);
        if (out.residual) y = _mm256_add_ps(y, _mm256_loadu_ps(static_cast<const float*>(out.residual) + at + i));
        y = applied(out.function, y);
        if (out.type == Type::f32) _mm256_storeu_ps(static_cast<float*>(out.data) + at + i, y);
        else _mm256_store_ps(v + i, y);
      }
    if (out.type != Type::f32)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint8_t*>(out.data) + at), bytes_of(v));
  }

  // Four rows, whose bytes lie side by side.
  void to_q(int64_t row, float (*v)[tile_tokens]) const {
    uint8_t* to = static_cast<uint8_t*>(out.data) + place(Layout::q, a.rows, 0, x.tokens, 4 * row, token);
    __m128i q[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if (out.function != Function::none)
        for (int i = 0; i < tile_tokens; i += 8)
          _mm256_store_ps(v[r] + i, applied(out.function, _mm256_load_ps(v[r] + i)));
      q[r] = bytes_of(v[r]);
    }
    const __m128i ab0 = _mm_unpacklo_epi8(q[0], q[1]), ab1 = _mm_unpackhi_epi8(q[0], q[1]);
    const __m128i cd0 = _mm_unpacklo_epi8(q[2], q[3]), cd1 = _mm_unpackhi_epi8(q[2], q[3]);
    __m128i* lines = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(lines, _mm_unpacklo_epi16(ab0, cd0));
    _mm_storeu_si128(lines + 1, _mm_unpackhi_epi16(ab0, cd0));
    _mm_storeu_si128(lines + 2, _mm_unpacklo_epi16(ab1, cd1));
    _mm_storeu_si128(lines + 3, _mm_unpackhi_epi16(ab1, cd1));
  }
};

}  // namespace
}  // namespace gossamer::bsr
