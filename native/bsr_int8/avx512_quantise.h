// Row-major floats to quantised activations: 16 tokens by 64 channels at a time, packed to bytes, turned as dwords,
// then (layout t) as bytes.
#pragma once

namespace gossamer::bsr {
namespace {

// `left`: channels from here on that exist; Whole says that all 16 do.
template <Type T, bool Whole>
INLINE __m512 load_floats(const Raw& x, int64_t at, int64_t left) {
  const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
  if constexpr (T == Type::f32) {
    const float* from = static_cast<const float*>(x.data) + at;
    return Whole ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(mask, from);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x.data) + at;
    return widen(Whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                       : _mm256_maskz_loadu_epi16(mask, from));
  }
}

// Bits of magnitudes order as integers do, NaN last.
template <Type T>
inline float vector_magnitude(const Raw& x, int64_t token) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i most[4];
  for (auto& m : most) m = _mm512_setzero_si512();
  const int64_t at = token * x.stride;
  int64_t k = 0;
  for (; k + 64 <= x.channels; k += 64)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i bits = _mm512_castps_si512(load_floats<T, true>(x, at + k + 16 * i, 16));
      most[i] = _mm512_max_epi32(most[i], _mm512_and_si512(bits, mask));
    }
  for (; k < x.channels; k += 16) {
    const __m512i bits = _mm512_castps_si512(load_floats<T, false>(x, at + k, x.channels - k));
    most[0] = _mm512_max_epi32(most[0], _mm512_and_si512(bits, mask));
  }
  const __m512i all = _mm512_max_epi32(_mm512_max_epi32(most[0], most[1]), _mm512_max_epi32(most[2], most[3]));
  const int32_t bits = _mm512_reduce_max_epi32(all);
  float value;
  std::memcpy(&value, &bits, 4);
  return bits >= 0x7f800000 ? std::nanf("") : value;
}

// Within dynamic range nothing can leave 0 .. 255 but what has no finite scale, and that is not used.
template <bool Dynamic>
INLINE __m512i to_whole(__m512 v, __m512 inverse, __m512 zero) {
  v = _mm512_fmadd_ps(v, inverse, zero);
  if constexpr (!Dynamic) v = _mm512_max_ps(_mm512_min_ps(v, set(255.0f)), set(0.0f));
  return _mm512_cvtps_epi32(v);
}

// 64 channels of one token as bytes; dword i of lane l has channels 16 i + 4 l .. + 3.
template <Type T, bool Dynamic, bool Whole>
INLINE __m512i pack(const Raw& x, int64_t token, int64_t k, __m512 inverse, __m512 zero) {
  const int64_t left = x.channels - k, at = token * x.stride + k;
  __m512i q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    q[i] = to_whole<Dynamic>(load_floats<T, Whole>(x, at + 16 * i, left - 16 * i), inverse, zero);
  return _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
}

// 16 x 16 dwords, in place.
INLINE void turn(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 g + j] lane l: column 4 l + j of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

constexpr auto make_split = [] {
  struct { uint8_t at[64]; } index{};
  for (int t = 0; t < 16; ++t)
    for (int j = 0; j < 4; ++j) index.at[16 * j + t] = static_cast<uint8_t>(4 * t + j);
  return index;
};
alignas(64) constexpr auto split_index = make_split();

// A quad of channels of all tokens of the block, [tokens / 16][16][4], to up to four rows of the layout t.
template <int NB>
INLINE void split(const uint8_t* quad, uint8_t* out, int64_t channels) {
  const __m512i index = _mm512_load_si512(&split_index);
  __m512i v[NB / 16], rows[NB / 16];
#pragma GCC unroll 4
  for (int i = 0; i < NB / 16; ++i) v[i] = _mm512_permutexvar_epi8(index, _mm512_load_si512(quad + 64 * i));
  if constexpr (NB == 64) {
    const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    rows[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    rows[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    rows[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    rows[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
  } else if constexpr (NB == 32) {
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    rows[0] = _mm512_permutex2var_epi64(v[0], low, v[1]);
    rows[1] = _mm512_permutex2var_epi64(v[0], high, v[1]);
  } else {
    rows[0] = v[0];
  }
  const int64_t bytes = std::min<int64_t>(4, channels) * NB;
#pragma GCC unroll 4
  for (int i = 0; i < NB / 16; ++i) {
    const int64_t left = bytes - 64 * i;
    if (left >= 64) _mm512_storeu_si512(out + 64 * i, rows[i]);
    else if (left > 0) _mm512_mask_storeu_epi8(out + 64 * i, (uint64_t{1} << left) - 1, rows[i]);
  }
}

// 16 tokens by 64 channels, to where each of the 16 quads of channels of these tokens goes.
template <Type T, bool Dynamic, bool Whole, class To>
INLINE void tile(const Raw& x, int64_t token, int64_t count, int64_t k, const float* inverses, int zero, const To& to) {
  const __m512 base = set(static_cast<float>(zero));
  __m512i r[16];
  if (count >= 16) {
#pragma GCC unroll 16
    for (int64_t t = 0; t < 16; ++t) r[t] = pack<T, Dynamic, Whole>(x, token + t, k, set(inverses[t]), base);
  } else {
    for (int64_t t = 0; t < 16; ++t)
      r[t] = t < count ? pack<T, Dynamic, Whole>(x, token + t, k, set(inverses[t]), base)
                       : _mm512_set1_epi8(static_cast<char>(zero));
  }
  turn(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(to(4 * (i % 4) + i / 4), r[i]);
}

template <int NB, Type T, bool Dynamic>
void quantise_block(const Raw& x, Layout layout, int64_t b, float inverse, int zero, uint8_t* out, float* scales) {
  const int64_t first = b * block_tokens, left = x.tokens - first;
  float inverses[NB];
  for (int64_t t = 0; t < NB; ++t) {
    inverses[t] = inverse;
    if (Dynamic && t < left) scales[first + t] = scale_of(vector_magnitude<T>(x, first + t), &inverses[t]);
  }
  alignas(64) uint8_t quads[16][NB / 16][64];
  for (int64_t k = 0; k < x.channels; k += 64) {
    for (int64_t g = 0; g < NB / 16; ++g) {
      const auto to = [&](int q) __attribute__((always_inline)) { return quads[q][g]; };
      const int64_t token = first + 16 * g, count = left - 16 * g;
      if (k + 64 <= x.channels)
        tile<T, Dynamic, true>(x, token, count, k, inverses + 16 * g, zero, to);
      else
        tile<T, Dynamic, false>(x, token, count, k, inverses + 16 * g, zero, to);
    }
    const int64_t count = std::min<int64_t>(16, (x.channels - k + 3) / 4);
    uint8_t* to = out + k * NB;
    if (layout == Layout::q)
      std::memcpy(to, quads, static_cast<size_t>(count * 4 * NB));
    else
      for (int64_t q = 0; q < count; ++q) split<NB>(quads[q][0], to + 4 * q * NB, x.channels - k - 4 * q);
  }
}

template <Type T, bool Dynamic>
void quantise_token(const Raw& x, int64_t token, float inverse, int zero, uint8_t* out, float* scales) {
  if (Dynamic) scales[token] = scale_of(vector_magnitude<T>(x, token), &inverse);
  const __m512 factor = set(inverse), base = set(static_cast<float>(zero));
  for (int64_t k = 0; k < x.channels; k += 16) {
    const int64_t left = x.channels - k, at = token * x.stride + k;
    const __m512i q = to_whole<Dynamic>(load_floats<T, false>(x, at, left), factor, base);
    const __mmask16 some = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    _mm512_mask_cvtusepi32_storeu_epi8(out + k, some, q);
  }
}

template <Type T, bool Dynamic>
void quantise_as(const Raw& x, Layout layout, int64_t b, float inverse, int zero, uint8_t* out, int64_t stride,
                 float* scales) {
  if (layout == Layout::rows) return quantise_token<T, Dynamic>(x, b, inverse, zero, out + b * stride, scales);
  out += block_start(layout, x.channels, b);
  const int64_t width = width_of(x.tokens, b);
  const auto run = width == 64   ? quantise_block<64, T, Dynamic>
                   : width == 32 ? quantise_block<32, T, Dynamic>
                                 : quantise_block<16, T, Dynamic>;
  run(x, layout, b, inverse, zero, out, scales);
}

void quantise(const Raw& x, Layout layout, int64_t b, float inverse, int zero, uint8_t* out, int64_t stride,
              float* scales) {
  const bool wide = x.type == Type::f32;
  const auto run = inverse == 0 ? (wide ? quantise_as<Type::f32, true> : quantise_as<Type::bf16, true>)
                                : (wide ? quantise_as<Type::f32, false> : quantise_as<Type::bf16, false>);
  run(x, layout, b, inverse, zero, out, stride, scales);
}

}  // namespace
}  // namespace gossamer::bsr
