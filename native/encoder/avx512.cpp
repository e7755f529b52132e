// AVX-512 with VNNI. Lanes are tokens everywhere: normalisation, softmax and their sums need no step across lanes.
#include <immintrin.h>

#include "common.h"

#define INLINE inline __attribute__((always_inline))

namespace gossamer::encoder {
namespace {

INLINE __m512 set(float v) { return _mm512_set1_ps(v); }

INLINE __mmask16 first_lanes(int64_t count) {
  return count >= lanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// ---- normalisation --------------------------------------------------------------------------------------------------

// v[i]: 16 floats of 0 .. 255 once rounded, tokens in order.
template <int V>
INLINE void store_row(uint8_t* to, const __m512i (&v)[V]) {
  if constexpr (V == 4) {
    const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(turn, packed));
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + lanes * i), _mm512_cvtepi32_epi8(v[i]));
  }
}

// What is rounded: x times its factor, less the least value.
template <int V>
INLINE void values(const Columns& c, int64_t k, int64_t t, __m512 (&v)[V]) {
  const __m512 factor = set(c.factors ? c.factors[k] : 1.0f), least = set(c.least ? *c.least : 0.0f);
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i)
    v[i] = _mm512_fmsub_ps(_mm512_loadu_ps(c.x + k * c.width + t + lanes * i), factor, least);
}

template <int V>
INLINE void whole(const Columns& c, int64_t k, int64_t t, const __m512 (&inverse)[V], __m512 zero, __m512i (&out)[V]) {
  __m512 v[V];
  values<V>(c, k, t, v);
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) out[i] = _mm512_cvtps_epi32(_mm512_fmadd_ps(v[i], inverse[i], zero));
}

// Nothing leaves 0 .. 255, because `most` is the largest magnitude; what is not finite has no use for its bytes.
template <int V>
void quantise(const Columns& c, int64_t t, const __m512 (&most)[V]) {
  const __m512 steps = set(c.least ? 255.0f : 127.0f), zero = set(c.least ? 0.0f : static_cast<float>(zero_point));
  __m512 inverse[V];
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) {
    _mm512_storeu_ps(c.scales + t + lanes * i, _mm512_div_ps(most[i], steps));
    const __mmask16 real = _mm512_cmp_ps_mask(most[i], set(tiny), _CMP_GE_OQ);
    inverse[i] = _mm512_maskz_div_ps(real, steps, most[i]);
  }
  if (c.layout == Layout::t) {
    for (int64_t k = 0; k < c.channels; ++k) {
      __m512i v[V];
      whole<V>(c, k, t, inverse, zero, v);
      store_row<V>(c.bytes + k * c.width + t, v);
    }
    return;
  }
  for (int64_t k = 0; k < c.channels; k += 4) {
    __m512i v[4][V];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) whole<V>(c, k + r, t, inverse, zero, v[r]);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      const __m512i low = _mm512_or_si512(v[0][i], _mm512_slli_epi32(v[1][i], 8));
      const __m512i high = _mm512_or_si512(_mm512_slli_epi32(v[2][i], 16), _mm512_slli_epi32(v[3][i], 24));
      _mm512_storeu_si512(c.bytes + k * c.width + 4 * (t + lanes * i), _mm512_or_si512(low, high));
    }
  }
}

template <int V>
INLINE void row(const float* x, __m512 (&v)[V]) {
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) v[i] = _mm512_loadu_ps(x + lanes * i);
}

// Mean and 1 / deviation in one pass: sums of differences from the mean of the first channels, which keep their digits
// where the mean is large beside the deviation.
template <int V>
INLINE void statistics(const Columns& c, int64_t t, float eps, __m512 (&mean)[V], __m512 (&inverse)[V]) {
  constexpr int64_t some = 16;
  const int64_t guess = std::min(some, c.channels);
  __m512 v[V], shift[V], square[V];
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) shift[i] = mean[i] = square[i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < guess; ++k) {
    row<V>(c.x + k * c.width + t, v);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) shift[i] = _mm512_add_ps(shift[i], v[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) shift[i] = _mm512_div_ps(shift[i], set(static_cast<float>(guess)));
  for (int64_t k = 0; k < c.channels; ++k) {
    row<V>(c.x + k * c.width + t, v);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      v[i] = _mm512_sub_ps(v[i], shift[i]);
      mean[i] = _mm512_add_ps(mean[i], v[i]);
      square[i] = _mm512_fmadd_ps(v[i], v[i], square[i]);
    }
  }
  const __m512 count = set(static_cast<float>(c.channels));
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) {
    const __m512 off = _mm512_div_ps(mean[i], count);
    const __m512 variance = _mm512_fnmadd_ps(off, off, _mm512_div_ps(square[i], count));
    const __m512 positive = _mm512_max_ps(variance, _mm512_setzero_ps());
    mean[i] = _mm512_add_ps(shift[i], off);
    inverse[i] = _mm512_div_ps(set(1.0f), _mm512_sqrt_ps(_mm512_add_ps(positive, set(eps))));
  }
}

template <int V>
void normalise(const Columns& c, const Norm& n, int64_t t) {
  __m512 mean[V], inverse[V], v[V];
  statistics<V>(c, t, n.eps, mean, inverse);
  for (int64_t k = 0; k < c.channels; ++k) {
    float* x = c.x + k * c.width + t;
    row<V>(x, v);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      const __m512 scaled = _mm512_mul_ps(_mm512_sub_ps(v[i], mean[i]), inverse[i]);
      _mm512_storeu_ps(x + lanes * i, _mm512_fmadd_ps(scaled, set(n.weight[k]), set(n.bias[k])));
    }
  }
}

template <int V>
void columns(const Columns& c, const Norm* n, int64_t t) {
  if (n) normalise<V>(c, *n, t);
  if (!c.bytes) return;
  __m512 most[V], v[V];
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) most[i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < c.channels; ++k) {
    values<V>(c, k, t, v);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) most[i] = _mm512_max_ps(most[i], _mm512_abs_ps(v[i]));
  }
  quantise<V>(c, t, most);
}

void norm(const Columns& c, const Norm* n) {
  int64_t t = c.begin;
  for (; t + 4 * lanes <= c.end; t += 4 * lanes) columns<4>(c, n, t);
  for (; t + 2 * lanes <= c.end; t += 2 * lanes) columns<2>(c, n, t);
  for (; t < c.end; t += lanes) columns<1>(c, n, t);
}

// ---- attention ------------------------------------------------------------------------------------------------------

// For x <= 0, to 1e-5 of the result: it is rounded to 8 bits.
INLINE __m512 exp2(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 p = set(0.00967675f);
  for (const float c : {0.05550411f, 0.24022651f, 0.69314718f, 1.0f}) p = _mm512_fmadd_ps(p, r, set(c));
  return _mm512_scalef_ps(p, n);
}

INLINE __m512i broadcast(const uint8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return _mm512_set1_epi32(four);
}

// Signs of queries and values, the tails' zeros, and values by four tokens.
INLINE void prepare(const Head& h) {
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(zero_point));
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int64_t c = 0; c < h.quads; ++c)
    for (int64_t t = 0; t < h.padded; t += lanes) {
      const int64_t at = 4 * (c * h.padded + t);
      const __mmask16 real = first_lanes(h.count - t);
      const __m512i q = _mm512_maskz_loadu_epi32(real, h.queries + at);
      const __m512i v = _mm512_maskz_xor_epi32(real, _mm512_loadu_si512(h.values + at), sign);
      _mm512_storeu_si512(h.queries + at, _mm512_maskz_xor_epi32(real, q, sign));
      _mm512_storeu_si512(h.keys + at, _mm512_maskz_loadu_epi32(real, h.keys + at));
      _mm512_storeu_si512(h.values + at, _mm512_shuffle_epi8(v, turn));
    }
}

constexpr int tile = 8;  // keys, or channels, at a time: with two vectors of queries 16 sums

template <int V>
INLINE void scores(const Head& h, int64_t query, __m512i (&most)[V]) {
#pragma GCC unroll 2
  for (int i = 0; i < V; ++i) most[i] = _mm512_set1_epi32(INT32_MIN);
  for (int64_t j = 0; j < h.count; j += tile) {
    __m512i sums[tile][V];
#pragma GCC unroll 8
    for (int r = 0; r < tile; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) sums[r][i] = _mm512_setzero_si512();
    for (int64_t c = 0; c < h.quads; ++c) {
      const uint8_t* keys = h.keys + 4 * (c * h.padded + j);
      __m512i q[V];
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) q[i] = _mm512_loadu_si512(h.queries + 4 * (c * h.padded + query + lanes * i));
#pragma GCC unroll 8
      for (int r = 0; r < tile; ++r) {
        const __m512i key = broadcast(keys + 4 * r);
#pragma GCC unroll 2
        for (int i = 0; i < V; ++i) sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], key, q[i]);
      }
    }
    const int64_t real = h.count - j;
#pragma GCC unroll 8
    for (int r = 0; r < tile; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) {
        _mm512_storeu_si512(h.scores + (j + r) * query_lanes + lanes * i, sums[r][i]);
        if (r < real) most[i] = _mm512_max_epi32(most[i], sums[r][i]);
      }
  }
}

// Weights of 0 .. 255, and the inverse of their sum.
template <int V>
INLINE void softmax(const Head& h, float scale, const __m512i (&most)[V], __m512 (&inverse)[V]) {
  const __m512 factor = set(scale);
  __m512i total[V];
#pragma GCC unroll 2
  for (int i = 0; i < V; ++i) total[i] = _mm512_setzero_si512();
  for (int64_t j = 0; j < h.count; j += 4) {
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) {
      __m512i w[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m512i score = _mm512_loadu_si512(h.scores + (j + r) * query_lanes + lanes * i);
        const __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(score, most[i])), factor);
        w[r] = _mm512_cvtps_epi32(_mm512_mul_ps(exp2(x), set(255.0f)));
        if (j + r >= h.count) w[r] = _mm512_setzero_si512();
        total[i] = _mm512_add_epi32(total[i], w[r]);
      }
      const __m512i low = _mm512_or_si512(w[0], _mm512_slli_epi32(w[1], 8));
      const __m512i high = _mm512_or_si512(_mm512_slli_epi32(w[2], 16), _mm512_slli_epi32(w[3], 24));
      _mm512_storeu_si512(h.weights + j * query_lanes + 4 * lanes * i, _mm512_or_si512(low, high));
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < V; ++i) inverse[i] = _mm512_div_ps(set(1.0f), _mm512_cvtepi32_ps(total[i]));
}

// 16 tokens of the context from token `first` on, of which `count` exist; they may end in the next block.
struct Target {
  Place here, next;
  __mmask16 here_mask, next_mask;

  Target(const Attention& a, int64_t first, int64_t count) : here(place_t(a.hidden, a.tokens, first)), next(here) {
    const int64_t left = here.step - first % bsr::block_tokens;
    here_mask = first_lanes(std::min(count, left));
    next_mask = static_cast<__mmask16>(first_lanes(count) & ~here_mask);
    if (!next_mask) return;
    next = place_t(a.hidden, a.tokens, first + left);
    next.at -= left;
  }

  INLINE void store(float* context, int64_t channel, __m512 v) const {
    _mm512_mask_storeu_ps(context + here.at + channel * here.step, here_mask, v);
    if (next_mask) _mm512_mask_storeu_ps(context + next.at + channel * next.step, next_mask, v);
  }
};

template <int V>
void queries(const Attention& a, const Head& h, int64_t first, int64_t query, int64_t head) {
  __m512i most[V];
  __m512 inverse[V];
  scores<V>(h, query, most);
  softmax<V>(h, a.score_scale[head], most, inverse);
  const Target to[2] = {{a, first + query, h.count - query}, {a, first + query + lanes * (V - 1), h.count - query - lanes * (V - 1)}};
  for (int64_t d = 0; d < a.head_size; d += tile) {
    __m512i sums[tile][V];
#pragma GCC unroll 8
    for (int r = 0; r < tile; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) sums[r][i] = _mm512_setzero_si512();
    const uint8_t* values = h.values + d * h.padded;
    for (int64_t j = 0; j < h.count; j += 4, values += 16) {
      __m512i w[V];
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) w[i] = _mm512_loadu_si512(h.weights + j * query_lanes + 4 * lanes * i);
#pragma GCC unroll 8
      for (int r = 0; r < tile; ++r) {
        const __m512i value = broadcast(values + r / 4 * 4 * h.padded + 4 * (r % 4));
#pragma GCC unroll 2
        for (int i = 0; i < V; ++i) sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], w[i], value);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < tile; ++r) {
      const int64_t channel = head * a.head_size + d + r;
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) {
        const __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][i]), inverse[i]);
        to[i].store(a.context, channel, _mm512_mul_ps(v, set(a.value_scale[channel])));
      }
    }
  }
}

void attend(const Attention& a, int64_t first, int64_t count, int64_t head, uint8_t* scratch) {
  const Head h = head_of(a, count, scratch);
  gather_head(a, first, head, h);
  prepare(h);
  for (int64_t query = 0; query < count; query += query_lanes)
    if (count - query > lanes) queries<2>(a, h, first, query, head);
    else queries<1>(a, h, first, query, head);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// 16 x 16 floats, in place.
INLINE void turn(__m512 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto low = [](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_shuffle_ps(a, b, 0x44); };
  const auto high = [](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_shuffle_ps(a, b, 0xee); };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  // Lane l of r[4 g + j]: column 4 l + j of rows 4 g .. + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

INLINE __m512 widen(const uint16_t* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

// row(i, k, mask): 16 channels from k on of token i.
template <class Row>
INLINE void turn_in(const Columns& c, const Row& of) {
  for (int64_t k = 0; k < c.channels; k += 16) {
    const __mmask16 mask = first_lanes(c.channels - k);
    __m512 r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = of(i, k, mask);
    turn(r);
    const int64_t real = std::min<int64_t>(16, c.channels - k);
    for (int64_t i = 0; i < real; ++i) _mm512_storeu_ps(c.x + (k + i) * c.width + c.begin, r[i]);
  }
}

void embed(const Embeddings& e, const Token* tokens, int64_t count, const Columns& c) {
  turn_in(c, [&](int i, int64_t k, __mmask16 mask) __attribute__((always_inline)) {
    if (i >= count) return _mm512_setzero_ps();
    const Token& t = tokens[i];
    const __m512 two = _mm512_add_ps(widen(e.words + t.word * c.channels + k, mask),
                                     widen(e.types + t.type * c.channels + k, mask));
    return _mm512_add_ps(two, widen(e.positions + t.position * c.channels + k, mask));
  });
}

void from_rows(const Columns& c, const float* const* rows) {
  turn_in(c, [&](int i, int64_t k, __mmask16 mask) __attribute__((always_inline)) {
    return rows[i] ? _mm512_maskz_loadu_ps(mask, rows[i] + k) : _mm512_setzero_ps();
  });
}

void to_rows(const Columns& c, float* const* rows) {
  for (int64_t k = 0; k < c.channels; k += 16) {
    const int64_t real = std::min<int64_t>(16, c.channels - k);
    __m512 r[16];
    for (int64_t i = 0; i < 16; ++i)
      r[i] = i < real ? _mm512_loadu_ps(c.x + (k + i) * c.width + c.begin) : _mm512_setzero_ps();
    turn(r);
    for (int64_t i = 0; i < 16; ++i)
      if (rows[i]) _mm512_mask_storeu_ps(rows[i] + k, first_lanes(real), r[i]);
  }
}

}  // namespace

const Kernels avx512_kernels{norm, attend, embed, to_rows, from_rows};

}  // namespace gossamer::encoder
