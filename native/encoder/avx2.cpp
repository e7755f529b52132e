// AVX2. Lanes are tokens, eight of a vector and sixteen at a time. Attention multiplies integers of 16 bits, as
// ../bsr_int8/avx2.cpp does: keys, and values, are what weights are there.
#include "../bsr_int8/ymm_finish.h"
#include "common.h"

namespace gossamer::encoder {
namespace {

using bsr::set;
using bsr::transpose;

constexpr int64_t half = lanes / 2;

INLINE __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
INLINE __m128i load16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
INLINE void store(void* to, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }

// ---- normalisation --------------------------------------------------------------------------------------------------

struct Two {  // 16 tokens
  __m256 v[2];
};

template <class F>
INLINE Two each(const F& f) {
  return {{f(0), f(1)}};
}

INLINE Two zeros() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }

INLINE Two row(const float* x) {
  return each([&](int64_t i) __attribute__((always_inline)) { return _mm256_loadu_ps(x + half * i); });
}

// Mean and 1 / deviation in one pass: sums of differences from the mean of the first channels, which keep their digits
// where the mean is large beside the deviation.
INLINE void statistics(const Columns& c, int64_t t, float eps, Two& mean, Two& inverse) {
  constexpr int64_t some = 16;
  const int64_t guess = std::min(some, c.channels);
  Two shift = zeros(), sum = zeros(), square = zeros();
  for (int64_t k = 0; k < guess; ++k) {
    const Two x = row(c.x + k * c.width + t);
    for (int i = 0; i < 2; ++i) shift.v[i] = _mm256_add_ps(shift.v[i], x.v[i]);
  }
  for (auto& v : shift.v) v = _mm256_div_ps(v, set(static_cast<float>(guess)));
  for (int64_t k = 0; k < c.channels; ++k) {
    const Two x = row(c.x + k * c.width + t);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256 off = _mm256_sub_ps(x.v[i], shift.v[i]);
      sum.v[i] = _mm256_add_ps(sum.v[i], off);
      square.v[i] = _mm256_fmadd_ps(off, off, square.v[i]);
    }
  }
  const __m256 count = set(static_cast<float>(c.channels));
  for (int i = 0; i < 2; ++i) {
    const __m256 off = _mm256_div_ps(sum.v[i], count);
    const __m256 variance = _mm256_fnmadd_ps(off, off, _mm256_div_ps(square.v[i], count));
    const __m256 positive = _mm256_max_ps(variance, _mm256_setzero_ps());
    mean.v[i] = _mm256_add_ps(shift.v[i], off);
    inverse.v[i] = _mm256_div_ps(set(1.0f), _mm256_sqrt_ps(_mm256_add_ps(positive, set(eps))));
  }
}

void normalise(const Columns& c, const Norm& n, int64_t t) {
  Two mean, inverse;
  statistics(c, t, n.eps, mean, inverse);
  for (int64_t k = 0; k < c.channels; ++k) {
    float* x = c.x + k * c.width + t;
    const __m256 weight = set(n.weight[k]), bias = set(n.bias[k]);
    const Two v = row(x);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256 scaled = _mm256_mul_ps(_mm256_sub_ps(v.v[i], mean.v[i]), inverse.v[i]);
      _mm256_storeu_ps(x + half * i, _mm256_fmadd_ps(scaled, weight, bias));
    }
  }
}

// What is rounded: x times its factor, less the least value.
INLINE Two values(const Columns& c, int64_t k, int64_t t, __m256 least) {
  const __m256 factor = set(c.factors ? c.factors[k] : 1.0f);
  const Two x = row(c.x + k * c.width + t);
  return each([&](int i) __attribute__((always_inline)) { return _mm256_fmsub_ps(x.v[i], factor, least); });
}

// Nothing leaves 0 .. 255, because the scales are of the largest magnitudes; what is not finite has no use for its bytes.
void quantise(const Columns& c, int64_t t) {
  const __m256 least = set(c.least ? *c.least : 0.0f), steps = set(c.least ? 255.0f : 127.0f);
  const __m256 zero = set(c.least ? 0.0f : static_cast<float>(zero_point));
  Two most = zeros();
  for (int64_t k = 0; k < c.channels; ++k) {
    const Two v = values(c, k, t, least);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) most.v[i] = _mm256_max_ps(most.v[i], _mm256_andnot_ps(set(-0.0f), v.v[i]));
  }
  Two inverse;
  for (int i = 0; i < 2; ++i) {
    _mm256_storeu_ps(c.scales + t + half * i, _mm256_div_ps(most.v[i], steps));
    const __m256 real = _mm256_cmp_ps(most.v[i], set(tiny), _CMP_GE_OQ);
    inverse.v[i] = _mm256_and_ps(real, _mm256_div_ps(steps, most.v[i]));
  }
  const auto whole = [&](int64_t k, __m256i (&out)[2]) __attribute__((always_inline)) {
    const Two v = values(c, k, t, least);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) out[i] = _mm256_cvtps_epi32(_mm256_fmadd_ps(v.v[i], inverse.v[i], zero));
  };
  if (c.layout == Layout::t) {
    const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
    for (int64_t k = 0; k < c.channels; k += 2) {
      __m256i a[2], b[2];
      whole(k, a);
      whole(std::min(k + 1, c.channels - 1), b);
      const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(a[0], b[0]), _mm256_packs_epi32(a[1], b[1]));
      const __m256i both = _mm256_permutevar8x32_epi32(packed, order);
      uint8_t* to = c.bytes + k * c.width + t;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(both));
      if (k + 1 < c.channels)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + c.width), _mm256_extracti128_si256(both, 1));
    }
    return;
  }
  for (int64_t k = 0; k < c.channels; k += 4) {
    __m256i v[4][2];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) whole(k + r, v[r]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i low = _mm256_or_si256(v[0][i], _mm256_slli_epi32(v[1][i], 8));
      const __m256i high = _mm256_or_si256(_mm256_slli_epi32(v[2][i], 16), _mm256_slli_epi32(v[3][i], 24));
      store(c.bytes + k * c.width + 4 * (t + half * i), _mm256_or_si256(low, high));
    }
  }
}

void norm(const Columns& c, const Norm* n) {
  for (int64_t t = c.begin; t < c.end; t += lanes) {
    if (n) normalise(c, *n, t);
    if (c.bytes) quantise(c, t);
  }
}

// ---- attention ------------------------------------------------------------------------------------------------------

// For -30 <= x <= 0, less counts as -30, to 1e-5 of the result: it is rounded to 8 bits.
INLINE __m256 exp2(__m256 x) {
  x = _mm256_max_ps(x, set(-30.0f));
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 r = _mm256_sub_ps(x, n);
  __m256 p = set(0.00967675f);
  for (const float c : {0.05550411f, 0.24022651f, 0.69314718f, 1.0f}) p = _mm256_fmadd_ps(p, r, set(c));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}

// Of one head, widened to 16 bits. Keys and values by groups of 16, [4 keys][4 channels] and [4 channels][4 keys], as
// 8 pairs each; queries and weights by four channels, or keys, and 16 queries: pairs of the first two of queries 0-7,
// of 8-15, then of the other two.
struct Wide {
  int64_t quads, fours;    // of channels; of keys
  int32_t *keys, *values;  // [fours][quads][8], [quads][fours][8]
  uint8_t* queries;        // [quads][128]
  int32_t* scores;         // [4 * fours][16]
  uint8_t* weights;        // [fours][128]

  explicit Wide(const Head& h) : quads(h.quads), fours((h.count + 3) / 4) {
    uint8_t* at = reinterpret_cast<uint8_t*>(h.scores);
    const int64_t group = 8 * quads * h.padded;
    keys = reinterpret_cast<int32_t*>(at);
    values = reinterpret_cast<int32_t*>(at + group);
    scores = reinterpret_cast<int32_t*>(at + 2 * group);
    weights = at + 2 * group + 64 * h.padded;
    queries = weights + 32 * h.padded;
  }
};

void widen_keys(const Head& h, const Wide& w) {
  const __m128i turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i zero = _mm256_set1_epi16(zero_point);
  for (int64_t c = 0; c < w.quads; ++c)
    for (int64_t j = 0; j < w.fours; ++j) {
      const int64_t from = 4 * (c * h.padded + 4 * j);
      store(w.keys + 8 * (j * w.quads + c), _mm256_cvtepu8_epi16(load16(h.keys + from)));
      const __m256i turned = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(load16(h.values + from), turn));
      store(w.values + 8 * (c * w.fours + j), _mm256_sub_epi16(turned, zero));
    }
}

void widen_queries(const Head& h, int64_t query, const Wide& w) {
  const __m256i none = _mm256_setzero_si256(), zero = _mm256_set1_epi16(zero_point);
  for (int64_t c = 0; c < w.quads; ++c)
    for (int i = 0; i < 2; ++i) {
      const __m256i bytes = load(h.queries + 4 * (c * h.padded + query + half * i));
      const __m256 a = _mm256_castsi256_ps(_mm256_sub_epi16(_mm256_unpacklo_epi8(bytes, none), zero));
      const __m256 b = _mm256_castsi256_ps(_mm256_sub_epi16(_mm256_unpackhi_epi8(bytes, none), zero));
      store(w.queries + 128 * c + 32 * i, _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)));
      store(w.queries + 128 * c + 64 + 32 * i, _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)));
    }
}

// Four rows of groups by 16 queries.
INLINE void multiply(const int32_t* groups, const uint8_t* x, int64_t count, __m256i (&sums)[4][2]) {
#pragma GCC unroll 4
  for (auto& s : sums) s[0] = s[1] = _mm256_setzero_si256();
  for (int64_t g = 0; g < count; ++g, groups += 8, x += 128)
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      const __m256i in[2] = {load(x + 64 * p), load(x + 64 * p + 32)};
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m256i pair = _mm256_set1_epi32(groups[2 * r + p]);
        sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(in[0], pair));
        sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(in[1], pair));
      }
    }
}

// Weights of 0 .. 255 for the scores of 16 queries, and the inverse of their sum.
Two softmax(const Wide& w, int64_t count, float scale) {
  __m256i most[2] = {_mm256_set1_epi32(INT32_MIN), _mm256_set1_epi32(INT32_MIN)};
  for (int64_t j = 0; j < w.fours; ++j) {
    __m256i sums[4][2];
    multiply(w.keys + 8 * j * w.quads, w.queries, w.quads, sums);
    for (int r = 0; r < 4 && 4 * j + r < count; ++r)
      for (int i = 0; i < 2; ++i) {
        store(w.scores + (4 * j + r) * lanes + half * i, sums[r][i]);
        most[i] = _mm256_max_epi32(most[i], sums[r][i]);
      }
  }
  __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int64_t j = 0; j < w.fours; ++j)
    for (int i = 0; i < 2; ++i) {
      __m256i v[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        v[r] = _mm256_setzero_si256();
        if (4 * j + r >= count) continue;
        const __m256i score = load(w.scores + (4 * j + r) * lanes + half * i);
        const __m256 x = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(score, most[i])), set(scale));
        v[r] = _mm256_cvtps_epi32(_mm256_mul_ps(exp2(x), set(255.0f)));
        total[i] = _mm256_add_epi32(total[i], v[r]);
      }
      store(w.weights + 128 * j + 32 * i, _mm256_or_si256(v[0], _mm256_slli_epi32(v[1], 16)));
      store(w.weights + 128 * j + 64 + 32 * i, _mm256_or_si256(v[2], _mm256_slli_epi32(v[3], 16)));
    }
  return each([&](int i) __attribute__((always_inline)) {
    return _mm256_div_ps(set(1.0f), _mm256_cvtepi32_ps(total[i]));
  });
}

// 16 tokens of the context from token `first` on, of which `count` exist; they may end in the next block.
struct Target {
  Place here, next;
  int64_t in_here, all;

  Target(const Attention& a, int64_t first, int64_t count) : here(place_t(a.hidden, a.tokens, first)), next(here) {
    const int64_t left = std::min(here.step - first % bsr::block_tokens, lanes);
    all = std::min(count, lanes);
    in_here = std::min(all, left);
    if (in_here == all) return;
    next = place_t(a.hidden, a.tokens, first + left);
    next.at -= left;
  }

  INLINE void store(float* context, int64_t channel, const Two& v) const {
    float *to = context + here.at + channel * here.step, *after = context + next.at + channel * next.step;
    if (in_here == lanes) {
      _mm256_storeu_ps(to, v.v[0]);
      _mm256_storeu_ps(to + half, v.v[1]);
      return;
    }
    alignas(32) float held[lanes];
    _mm256_store_ps(held, v.v[0]);
    _mm256_store_ps(held + half, v.v[1]);
    for (int64_t i = 0; i < in_here; ++i) to[i] = held[i];
    for (int64_t i = in_here; i < all; ++i) after[i] = held[i];
  }
};

void attend(const Attention& a, int64_t first, int64_t count, int64_t head, uint8_t* scratch) {
  const Head h = head_of(a, count, scratch);
  gather_head(a, first, head, h);
  const Wide w(h);
  widen_keys(h, w);
  for (int64_t query = 0; query < count; query += lanes) {
    widen_queries(h, query, w);
    const Two inverse = softmax(w, count, a.score_scale[head]);
    const Target to(a, first + query, count - query);
    for (int64_t c = 0; c < w.quads; ++c) {
      __m256i sums[4][2];
      multiply(w.values + 8 * c * w.fours, w.weights, w.fours, sums);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const int64_t channel = head * a.head_size + 4 * c + r;
        const __m256 scale = set(a.value_scale[channel]);
        to.store(a.context, channel, each([&](int i) __attribute__((always_inline)) {
          return _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][i]), inverse.v[i]), scale);
        }));
      }
    }
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// of(i, k): 8 channels from k on of token i. How many channels that is; the others are the caller's.
template <class Row>
INLINE int64_t turn_in(const Columns& c, const Row& of) {
  int64_t k = 0;
  for (; k + 8 <= c.channels; k += 8)
    for (int64_t t = 0; t < lanes; t += 8) {
      __m256 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = of(t + i, k);
      transpose(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(c.x + (k + i) * c.width + c.begin + t, r[i]);
    }
  return k;
}

void embed(const Embeddings& e, const Token* tokens, int64_t count, const Columns& c) {
  const auto wide = [](const uint16_t* from) __attribute__((always_inline)) { return bsr::widen(load16(from)); };
  const int64_t done = turn_in(c, [&](int64_t i, int64_t k) __attribute__((always_inline)) {
    if (i >= count) return _mm256_setzero_ps();
    const Token& t = tokens[i];
    const __m256 two = _mm256_add_ps(wide(e.words + t.word * c.channels + k), wide(e.types + t.type * c.channels + k));
    return _mm256_add_ps(two, wide(e.positions + t.position * c.channels + k));
  });
  for (int64_t k = done; k < c.channels; ++k)
    for (int64_t t = 0; t < lanes; ++t) {
      float& to = c.x[k * c.width + c.begin + t];
      to = 0;
      if (t < count)
        to = bsr::from_bf16(e.words[tokens[t].word * c.channels + k]) +
             bsr::from_bf16(e.types[tokens[t].type * c.channels + k]) +
             bsr::from_bf16(e.positions[tokens[t].position * c.channels + k]);
    }
}

void from_rows(const Columns& c, const float* const* rows) {
  const int64_t done = turn_in(c, [&](int64_t i, int64_t k) __attribute__((always_inline)) {
    return rows[i] ? _mm256_loadu_ps(rows[i] + k) : _mm256_setzero_ps();
  });
  for (int64_t k = done; k < c.channels; ++k)
    for (int64_t t = 0; t < lanes; ++t) c.x[k * c.width + c.begin + t] = rows[t] ? rows[t][k] : 0.0f;
}

void to_rows(const Columns& c, float* const* rows) {
  int64_t k = 0;
  for (; k + 8 <= c.channels; k += 8)
    for (int64_t t = 0; t < lanes; t += 8) {
      __m256 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(c.x + (k + i) * c.width + c.begin + t);
      transpose(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        if (rows[t + i]) _mm256_storeu_ps(rows[t + i] + k, r[i]);
    }
  for (; k < c.channels; ++k)
    for (int64_t t = 0; t < lanes; ++t)
      if (rows[t]) rows[t][k] = c.x[k * c.width + c.begin + t];
}

}  // namespace

const Kernels avx2_kernels{norm, attend, embed, to_rows, from_rows};

}  // namespace gossamer::encoder
