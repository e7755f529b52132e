// Quantising where there is no AVX-512: 16 tokens by 32 channels at a time become bytes and are turned.
#pragma once

#include "ymm_finish.h"

namespace gossamer::bsr {
namespace {

constexpr int64_t turned_tokens = 16, turned_channels = 32;

template <Type T>
INLINE __m256 load8(const void* base, int64_t at) {
  if constexpr (T == Type::f32) return _mm256_loadu_ps(static_cast<const float*>(base) + at);
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(base) + at)));
}

// See `magnitude` in common.h.
template <Type T>
INLINE float largest(const Raw& x, int64_t t) {
  const __m256i rest = _mm256_set1_epi32(0x7fffffff);
  const auto bits = [&](int64_t k) __attribute__((always_inline)) {
    return _mm256_and_si256(_mm256_castps_si256(load8<T>(x.data, t * x.stride + k)), rest);
  };
  __m256i most[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  int64_t k = 0;
  for (; k + 32 <= x.channels; k += 32)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) most[i] = _mm256_max_epi32(most[i], bits(k + 8 * i));
  for (; k + 8 <= x.channels; k += 8) most[0] = _mm256_max_epi32(most[0], bits(k));
  alignas(32) uint32_t found[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(found), _mm256_max_epi32(_mm256_max_epi32(most[0], most[1]),
                                                                         _mm256_max_epi32(most[2], most[3])));
  const int64_t left = x.channels - k;
  float last[8] = {};
  uint32_t last_bits[8];
  if (left > 0) load_floats(x, t, k, left, last);
  std::memcpy(last_bits, last, sizeof last);
  uint32_t top = 0;
  for (int i = 0; i < 8; ++i) top = std::max({top, found[i], last_bits[i] & 0x7fffffffu});
  float value;
  std::memcpy(&value, &top, 4);
  return top >= 0x7f800000u ? std::nanf("") : value;
}

// See `to_byte` in common.h; as int32.
INLINE __m256i to_bytes(__m256 v, __m256 inverse, __m256 zero) {
  const __m256 sum = _mm256_min_ps(_mm256_fmadd_ps(v, inverse, zero), set(rounder + 255.0f));
  return _mm256_and_si256(_mm256_castps_si256(_mm256_max_ps(sum, set(rounder))), _mm256_set1_epi32(255));
}

// 32 channels of a token from `k` on: dword j of lane l is channels 8 j + 4 l .. + 3.
template <Type T>
INLINE __m256i bytes32(const void* base, int64_t at, __m256 inverse, __m256 zero) {
  __m256i q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) q[i] = to_bytes(load8<T>(base, at + 8 * i), inverse, zero);
  return _mm256_packus_epi16(_mm256_packus_epi32(q[0], q[1]), _mm256_packus_epi32(q[2], q[3]));
}

INLINE void store_lanes(uint8_t* low, uint8_t* high, __m256i v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_extracti128_si256(v, 1));
}

// 16 tokens of 32 channels to [channel][width], `step` = width: four rounds of interleaving turn 16 by 16 bytes.
INLINE void turn_t(__m256i (&v)[16], uint8_t* to, int64_t step) {
  __m256i w[16];
#pragma GCC unroll 2
  for (int round = 0; round < 2; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      w[2 * i] = _mm256_unpacklo_epi8(v[i], v[i + 8]);
      w[2 * i + 1] = _mm256_unpackhi_epi8(v[i], v[i + 8]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      v[2 * i] = _mm256_unpacklo_epi8(w[i], w[i + 8]);
      v[2 * i + 1] = _mm256_unpackhi_epi8(w[i], w[i + 8]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    uint8_t* low = to + (8 * (i / 4) + i % 4) * step;
    store_lanes(low, low + 4 * step, v[i]);
  }
}

// 16 tokens of 32 channels to [quad of channels][width][4], `step` = 4 * width.
INLINE void turn_q(const __m256i (&v)[16], uint8_t* to, int64_t step) {
#pragma GCC unroll 4
  for (int t = 0; t < 16; t += 4) {
    const __m256i ab0 = _mm256_unpacklo_epi32(v[t], v[t + 1]), ab1 = _mm256_unpackhi_epi32(v[t], v[t + 1]);
    const __m256i cd0 = _mm256_unpacklo_epi32(v[t + 2], v[t + 3]), cd1 = _mm256_unpackhi_epi32(v[t + 2], v[t + 3]);
    uint8_t* quad = to + 4 * t;
    store_lanes(quad, quad + step, _mm256_unpacklo_epi64(ab0, cd0));
    store_lanes(quad + 2 * step, quad + 3 * step, _mm256_unpackhi_epi64(ab0, cd0));
    store_lanes(quad + 4 * step, quad + 5 * step, _mm256_unpacklo_epi64(ab1, cd1));
    store_lanes(quad + 6 * step, quad + 7 * step, _mm256_unpackhi_epi64(ab1, cd1));
  }
}

// Channels from..from + count of token t, zeros after them.
INLINE const float* last_channels(const Raw& x, int64_t t, int64_t from, int64_t count, float (&held)[32]) {
  std::fill(held, held + 32, 0.0f);
  if (count > 0) load_floats(x, t, from, count, held);
  return held;
}

template <Type T>
void quantise_rows(const Raw& x, int64_t t, float inverse, int zero, uint8_t* out, float* scales) {
  if (inverse == 0) scales[t] = scale_of(largest<T>(x, t), &inverse);
  const __m256 times = set(inverse), plus = set(rounder + static_cast<float>(zero));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t k = 0; k < x.channels; k += turned_channels) {
    const int64_t count = std::min(turned_channels, x.channels - k);
    float held[32];
    const __m256i q = count == turned_channels
                          ? bytes32<T>(x.data, t * x.stride + k, times, plus)
                          : bytes32<Type::f32>(last_channels(x, t, k, count, held), 0, times, plus);
    alignas(32) uint8_t bytes[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), _mm256_permutevar8x32_epi32(q, order));
    std::memcpy(out + k, bytes, static_cast<size_t>(count));
  }
}

// 16 tokens from `token` on to `out`, those of a block that is `width` wide.
template <Type T>
void quantise_part(const Raw& x, bool quads, int64_t token, float inverse, int zero, uint8_t* out, int64_t width,
                   float* scales) {
  const int64_t real = std::clamp<int64_t>(x.tokens - token, 0, turned_tokens);
  float times[turned_tokens];
  std::fill(times, times + turned_tokens, inverse);
  if (inverse == 0)
    for (int64_t t = 0; t < real; ++t) scales[token + t] = scale_of(largest<T>(x, token + t), &times[t]);
  const __m256 plus = set(rounder + static_cast<float>(zero));
  const int64_t padded = quads ? (x.channels + 3) / 4 * 4 : x.channels, step = quads ? 4 * width : width;
  for (int64_t k = 0; k < padded; k += turned_channels) {
    const bool whole = k + turned_channels <= x.channels;
    __m256i v[turned_tokens];
    for (int t = 0; t < turned_tokens; ++t) {
      float held[32];
      if (whole && t < real) v[t] = bytes32<T>(x.data, (token + t) * x.stride + k, set(times[t]), plus);
      else
        v[t] = bytes32<Type::f32>(last_channels(x, token + t, k, t < real ? std::min<int64_t>(32, x.channels - k) : 0,
                                                held), 0, set(times[t]), plus);
    }
    uint8_t* to = out + (quads ? k / 4 : k) * step;
    if (k + turned_channels <= padded) {
      quads ? turn_q(v, to, step) : turn_t(v, to, step);
    } else {
      alignas(32) uint8_t turned[turned_tokens * turned_channels];
      const int64_t own = quads ? 4 * turned_tokens : turned_tokens, lines = (padded - k) / (quads ? 4 : 1);
      quads ? turn_q(v, turned, own) : turn_t(v, turned, own);
      for (int64_t i = 0; i < lines; ++i) std::memcpy(to + i * step, turned + i * own, static_cast<size_t>(own));
    }
  }
}

template <Type T>
void quantise_as(const Raw& x, Layout layout, int64_t b, float inverse, int zero, uint8_t* out, int64_t stride,
                 float* scales) {
  if (layout == Layout::rows) return quantise_rows<T>(x, b, inverse, zero, out + b * stride, scales);
  const bool quads = layout == Layout::q;
  const int64_t width = width_of(x.tokens, b);
  out += block_start(layout, x.channels, b);
  for (int64_t t = 0; t < width; t += turned_tokens)
    quantise_part<T>(x, quads, b * block_tokens + t, inverse, zero, out + t * (quads ? 4 : 1), width, scales);
}

// See Kernels::quantise.
void quantise(const Raw& x, Layout layout, int64_t b, float inverse, int zero, uint8_t* out, int64_t stride,
              float* scales) {
  (x.type == Type::f32 ? quantise_as<Type::f32> : quantise_as<Type::bf16>)(x, layout, b, inverse, zero, out, stride,
                                                                           scales);
}

}  // namespace
}  // namespace gossamer::bsr
