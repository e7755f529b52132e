// Row-major floats to quantised activations: four tokens become the bytes of dwords, one for each channel, then the
// dwords of 16 channels are turned.
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

// The largest magnitudes of up to four tokens at once, as these are short chains. They pass over NaN; see `Odd`.
template <Type T>
class Largest {
  const Raw& x;
  int64_t at[4];
  __m512 most[4][2];

 public:
  INLINE Largest(const Raw& x, int64_t token, int64_t count) : x(x) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      at[t] = (token + std::min<int64_t>(t, std::max<int64_t>(0, count - 1))) * x.stride;
      most[t][0] = most[t][1] = _mm512_setzero_ps();
    }
  }

  // 32 channels; Whole says that all exist.
  template <bool Whole>
  INLINE void add(int64_t k) {
    constexpr int larger_magnitude = 0xb;
    const int64_t left = x.channels - k;
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const __m512 a = load_floats<T, Whole>(x, at[t] + k, left);
      const __m512 b = load_floats<T, Whole>(x, at[t] + k + 16, left - 16);
      most[t][0] = _mm512_range_ps(most[t][0], a, larger_magnitude);
      most[t][1] = _mm512_range_ps(most[t][1], b, larger_magnitude);
    }
  }

  // From channel k on, a multiple of 32.
  INLINE void rest(int64_t k) {
    for (; k + 32 <= x.channels; k += 32) add<true>(k);
    if (k < x.channels) add<false>(k);
  }

  INLINE void finish(float (&out)[4]) const {
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const float value = _mm512_reduce_max_ps(_mm512_max_ps(most[t][0], most[t][1]));
      out[t] = value < INFINITY ? value : std::nanf("");
    }
  }
};

// Bits that only a NaN leaves in what `to_bytes` makes of a token within its range. To compare every number with itself
// where the largest is looked for takes longer.
class Odd {
  __m512i seen = _mm512_castps_si512(set(rounder));

 public:
  INLINE void add(__m512i a, __m512i b) { seen = _mm512_ternarylogic_epi32(seen, a, b, 0xfe); }

  INLINE bool any() const {
    return _mm512_cmpgt_epu32_mask(_mm512_xor_si512(seen, _mm512_castps_si512(set(rounder))), _mm512_set1_epi32(255));
  }
};

template <Type T>
bool has_nan(const Raw& x, int64_t token) {
  for (int64_t k = 0; k < x.channels; k += 16) {
    const __m512 v = load_floats<T, false>(x, token * x.stride + k, x.channels - k);
    if (_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q)) return true;
  }
  return false;
}

// See to_byte: the low byte of each dword. Within dynamic range nothing can leave 0 .. 255 but what has no finite
// scale, and that is not used.
template <bool Dynamic>
INLINE __m512i to_bytes(__m512 v, __m512 inverse, __m512 base) {
  v = _mm512_fmadd_ps(v, inverse, base);
  if constexpr (!Dynamic) v = _mm512_max_ps(_mm512_min_ps(v, set(rounder + 255.0f)), set(rounder));
  return _mm512_castps_si512(v);
}

// 16 channels of four tokens: bytes of dword c are channel c of the tokens. `at`: where they begin in x.
template <Type T, bool Dynamic, bool Whole>
INLINE __m512i pack(const Raw& x, const int64_t (&at)[4], int64_t k, const __m512 (&inverse)[4], __m512 base,
                    Odd& odd) {
  __m512i q[4];
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) {
    __m512 v = load_floats<T, Whole>(x, at[t] + k, x.channels - k);
    asm("" : "+v"(v));  // in a register: multiplied in memory it would cost a copy of the other factor
    q[t] = to_bytes<Dynamic>(v, inverse[t], base);
  }
  if constexpr (Dynamic) {
    odd.add(q[0], q[1]);
    odd.add(q[2], q[3]);
  }
  __m512i all = _mm512_slli_epi32(q[0], 24);
#pragma GCC unroll 4
  for (int t = 1; t < 4; ++t) all = _mm512_shrdi_epi32(all, q[t], 8);
  return all;
}

// Lane l of four lines, `step` bytes apart, together in register l. From memory it takes half the shuffles.
INLINE void load_lanes(const uint8_t* from, int64_t step, __m512i (&r)[4]) {
  const auto two = [from, step](int line, int lane) __attribute__((always_inline)) {
    const uint8_t* at = from + step * line + 16 * lane;
    return _mm512_inserti64x4(_mm512_castsi256_si512(load32(at)), load32(at + step), 1);
  };
  const __m512i ab01 = two(0, 0), ab23 = two(0, 2), cd01 = two(2, 0), cd23 = two(2, 2);
  r[0] = _mm512_shuffle_i32x4(ab01, cd01, 0x88);
  r[1] = _mm512_shuffle_i32x4(ab01, cd01, 0xdd);
  r[2] = _mm512_shuffle_i32x4(ab23, cd23, 0x88);
  r[3] = _mm512_shuffle_i32x4(ab23, cd23, 0xdd);
}

// 4 x 4 dwords in each lane, in place.
INLINE void turn_dwords(__m512i* r) {
  const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  r[0] = _mm512_unpacklo_epi64(a, c);
  r[1] = _mm512_unpackhi_epi64(a, c);
  r[2] = _mm512_unpacklo_epi64(b, d);
  r[3] = _mm512_unpackhi_epi64(b, d);
}

// What `pack` made of 16 channels of all 64 tokens of a block, [NB / 4][64 bytes], to the layout t, in place.
INLINE void arrange_lines(uint8_t* chunk) {
  __m512i lanes[4][4];  // [i][l], lane h: tokens 16 h + 4 i .. + 3 of channels 4 l .. + 3
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) load_lanes(chunk + 64 * i, 256, lanes[i]);
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) {
    __m512i r[4] = {lanes[0][l], lanes[1][l], lanes[2][l], lanes[3][l]};
    turn_dwords(r);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(chunk + 64 * (4 * l + j), r[j]);
  }
}

// Where the dwords of register i of a narrow block's lane of four channels come from: a register has 4 / parts
// channels, each of them `parts` lanes.
template <int parts>
struct Places {
  alignas(64) int32_t at[parts][16];
  constexpr Places() : at{} {
    for (int i = 0; i < parts; ++i)
      for (int a = 0; a < 4; ++a)
        for (int d = 0; d < 4; ++d) at[i][4 * a + d] = 16 * (a % parts) + 4 * d + 4 / parts * i + a / parts;
  }
};

// The same of blocks of 16 or 32.
template <int NB>
INLINE void arrange_narrow(uint8_t* chunk) {
  constexpr int parts = NB / 16;  // of a channel: 16 tokens
  static constexpr Places<parts> places;
  __m512i r[parts][4];
#pragma GCC unroll 2
  for (int h = 0; h < parts; ++h) load_lanes(chunk + 256 * h, 64, r[h]);
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l)
#pragma GCC unroll 2
    for (int i = 0; i < parts; ++i) {
      const __m512i from = _mm512_load_si512(places.at[i]);
      _mm512_storeu_si512(chunk + 64 * (parts * l + i), _mm512_permutex2var_epi32(r[0][l], from, r[parts - 1][l]));
    }
}

template <int NB>
INLINE void arrange_t(uint8_t* chunk) {
  if constexpr (NB == 64) arrange_lines(chunk);
  else arrange_narrow<NB>(chunk);
}

// To the layout q.
template <int NB>
INLINE void arrange_q(uint8_t* chunk) {
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i r[NB / 16][4];
#pragma GCC unroll 4
  for (int h = 0; h < NB / 16; ++h) load_lanes(chunk + 256 * h, 64, r[h]);
#pragma GCC unroll 4
  for (int h = 0; h < NB / 16; ++h)
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) _mm512_storeu_si512(chunk + 4 * NB * l + 64 * h, _mm512_shuffle_epi8(r[h][l], turn));
}

// Four tokens, to `to` [whole chunks of 16 channels][64 bytes], `step` bytes apart, and `last`, the chunk after these.
// The next four are looked at meanwhile, where there are `more`: they come from afar, and their loads need not wait for
// the work on these. Was anything odd?
template <Type T, bool Dynamic>
INLINE bool quantise_four(const Raw& x, int64_t token, const float (&factors)[4], int zero, uint8_t* to, int64_t step,
                          uint8_t* last, bool more, Largest<T>& next) {
  // Tokens past the last one are the last one again, as if all were there, times 0.
  const int64_t count = std::min<int64_t>(4, x.tokens - token);
  const __m512 base = set(rounder + static_cast<float>(zero));
  if (count <= 0) {
    const __m512i none = _mm512_set1_epi8(static_cast<char>(zero));
    for (int64_t k = 0; k + 16 <= x.channels; k += 16, to += step) _mm512_storeu_si512(to, none);
    _mm512_storeu_si512(last, none);
    return false;
  }
  Odd odd;
  int64_t at[4];
  __m512 inverses[4];
#pragma GCC unroll 4
  for (int64_t t = 0; t < 4; ++t) {
    at[t] = (token + std::min(t, count - 1)) * x.stride;
    inverses[t] = set(factors[t]);
  }
  int64_t k = 0;
  for (; k + 32 <= x.channels; k += 32, to += 2 * step) {
    _mm512_storeu_si512(to, pack<T, Dynamic, true>(x, at, k, inverses, base, odd));
    _mm512_storeu_si512(to + step, pack<T, Dynamic, true>(x, at, k + 16, inverses, base, odd));
    if (Dynamic && more) next.template add<true>(k);
  }
  if (Dynamic && more) next.rest(k);
  if (k + 16 <= x.channels) {
    _mm512_storeu_si512(to, pack<T, Dynamic, true>(x, at, k, inverses, base, odd));
    k += 16;
  }
  if (k < x.channels) _mm512_storeu_si512(last, pack<T, Dynamic, false>(x, at, k, inverses, base, odd));
  return Dynamic && odd.any();
}

// Four tokens at a time, so that the second look at them finds them in the first-level cache; then 16 channels.
template <int NB, Type T, bool Dynamic>
void quantise_block(const Raw& given, Layout layout, int64_t b, float inverse, int zero, uint8_t* out, float* scales) {
  const Raw x = given;  // that bytes are stored through `out` says nothing about
  const int64_t first = b * block_tokens, whole = x.channels / 16 * 16;
  alignas(64) uint8_t last[16 * NB];  // the channels after whole chunks
  const auto count = [&](int64_t token) { return std::clamp<int64_t>(x.tokens - token, 0, 4); };
  float most[4] = {};
  if (Dynamic) {
    Largest<T> largest(x, first, count(first));
    largest.rest(0);
    largest.finish(most);
  }
  for (int64_t g = 0; g < NB / 4; ++g) {
    const int64_t token = first + 4 * g, real = count(token), after = count(token + 4);
    float factors[4] = {};
    for (int64_t t = 0; t < real; ++t) {
      factors[t] = inverse;
      if (Dynamic) scales[token + t] = scale_of(most[t], &factors[t]);
    }
    const bool more = after > 0 && g + 1 < NB / 4;
    Largest<T> next(x, more ? token + 4 : token, after);
    if (quantise_four<T, Dynamic>(x, token, factors, zero, out + 64 * g, 16 * NB, last + 64 * g, more, next))
      for (int64_t t = 0; t < real; ++t)
        if (has_nan<T>(x, token + t)) scales[token + t] = std::nanf("");
    if (Dynamic && more) next.finish(most);
  }
  const auto arrange = layout == Layout::q ? arrange_q<NB> : arrange_t<NB>;
  for (int64_t k = 0; k < whole; k += 16) arrange(out + k * NB);
  if (whole == x.channels) return;
  arrange(last);
  const int64_t rest = x.channels - whole, kept = layout == Layout::q ? (rest + 3) / 4 * 4 : rest;
  std::memcpy(out + whole * NB, last, static_cast<size_t>(kept * NB));
}

template <Type T, bool Dynamic>
void quantise_token(const Raw& x, int64_t token, float inverse, int zero, uint8_t* out, float* scales) {
  if (Dynamic) {
    Largest<T> largest(x, token, 1);
    float most[4];
    largest.rest(0);
    largest.finish(most);
    scales[token] = scale_of(most[0], &inverse);
  }
  Odd odd;
  const __m512 factor = set(inverse), base = set(rounder + static_cast<float>(zero));
  for (int64_t k = 0; k < x.channels; k += 16) {
    const int64_t left = x.channels - k, at = token * x.stride + k;
    const __m512i q = to_bytes<Dynamic>(load_floats<T, false>(x, at, left), factor, base);
    const __mmask16 some = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    if (Dynamic) odd.add(q, q);
    _mm512_mask_cvtepi32_storeu_epi8(out + k, some, q);
  }
  if (Dynamic && odd.any() && has_nan<T>(x, token)) scales[token] = std::nanf("");
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
