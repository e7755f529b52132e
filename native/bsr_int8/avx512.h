// The pieces of the AVX-512 kernels, with VNNI and with AMX. Lanes are tokens: four surviving channels are interleaved
// byte by byte, so that one vpdpbusd multiplies 16 tokens by 4 weights that are one broadcast. Compiled with
// -fno-tree-pre: GCC's partial redundancy elimination adds register moves and spills to the inner loops.
#pragma once

#include <immintrin.h>

#include "common.h"

#define INLINE inline __attribute__((always_inline))

namespace gossamer::bsr {
namespace {

// The sums of a tile are v[row][i]; lane l of vector i holds tokens place_of(l, i) .. + 3.
template <int NB, bool Quads>
struct Order {
  static constexpr int vectors = NB / 16;
  static constexpr bool natural = Quads || NB == 16;
  static constexpr int place_of(int l, int i) {
    return natural ? 16 * i + 4 * l : NB == 64 ? 16 * l + 4 * i : (l >> 1) * 16 + (l & 1) * 4 + 8 * i;
  }
};

template <int NB>
struct Sums {
  __m512i v[4][NB / 16];
};

INLINE __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }

// 64 tokens: a channel is a cache line. After both unpacks lane l of vector i holds tokens 16 l + 4 i .. + 3.
template <class Off>
INLINE void gather(const uint8_t* x, const Off* o, __m512i (&out)[4]) {
  const __m512i a = load(x + 8 * int64_t{o[0]}), b = load(x + 8 * int64_t{o[1]});
  const __m512i c = load(x + 8 * int64_t{o[2]}), d = load(x + 8 * int64_t{o[3]});
  const __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
  const __m512i cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
  out[0] = _mm512_unpacklo_epi16(ab0, cd0);
  out[1] = _mm512_unpackhi_epi16(ab0, cd0);
  out[2] = _mm512_unpacklo_epi16(ab1, cd1);
  out[3] = _mm512_unpackhi_epi16(ab1, cd1);
}

// Dword 4 l + j of the result takes bytes j, j + 8 of lanes l / 2 and 2 + l / 2 (see below), or of all four lanes.
constexpr auto make_index = [](bool wide) {
  struct { uint8_t at[64]; } index{};
  for (int t = 0; t < 16; ++t)
    for (int j = 0; j < 4; ++j)
      index.at[4 * t + j] = static_cast<uint8_t>(
          wide ? (t / 8) * 16 + (j / 2) * 32 + (t % 8) * 2 + j % 2 : 16 * j + t);
  return index;
};
alignas(64) constexpr auto index16 = make_index(false);
alignas(64) constexpr auto index32 = make_index(true);

INLINE __m256i load32(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
INLINE __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// 32 tokens: channels a and c in one register, b and d in another.
template <class Off>
INLINE void gather(const uint8_t* x, const Off* o, __m512i (&out)[2]) {
  const auto two = [&](int i, int j) __attribute__((always_inline)) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load32(x + 4 * int64_t{o[i]})), load32(x + 4 * int64_t{o[j]}), 1);
  };
  const __m512i ac = two(0, 2), bd = two(1, 3), index = _mm512_load_si512(&index32);
  out[0] = _mm512_permutexvar_epi8(index, _mm512_unpacklo_epi8(ac, bd));
  out[1] = _mm512_permutexvar_epi8(index, _mm512_unpackhi_epi8(ac, bd));
}

// 16 tokens: all four channels in one register.
template <class Off>
INLINE void gather(const uint8_t* x, const Off* o, __m512i (&out)[1]) {
  __m512i all = _mm512_castsi128_si512(load16(x + 2 * int64_t{o[0]}));
  all = _mm512_inserti32x4(all, load16(x + 2 * int64_t{o[1]}), 1);
  all = _mm512_inserti32x4(all, load16(x + 2 * int64_t{o[2]}), 2);
  all = _mm512_inserti32x4(all, load16(x + 2 * int64_t{o[3]}), 3);
  out[0] = _mm512_permutexvar_epi8(_mm512_load_si512(&index16), all);
}

template <int NB, bool Quads, class Off>
INLINE void fetch(const uint8_t* x, const Off* offsets, __m512i (&out)[NB / 16]) {
  if constexpr (Quads) {
    const uint8_t* quad = x + int64_t{*offsets} * (NB / 8);
#pragma GCC unroll 4
    for (int i = 0; i < NB / 16; ++i) out[i] = load(quad + 64 * i);
  } else {
    gather(x, offsets, out);
  }
}

// ---- functions -----------------------------------------------------------------------------------------------------

INLINE __m512 set(float v) { return _mm512_set1_ps(v); }

// For x <= 87, to 2 units in the last place.
INLINE __m512 exponential(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, set(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, set(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, set(1.42860677e-6f), r);
  __m512 p = set(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, set(c));
  return _mm512_scalef_ps(p, n);
}

INLINE __m512 reciprocal(__m512 d) {
  const __m512 r = _mm512_rcp14_ps(d);
  return _mm512_mul_ps(r, _mm512_fnmadd_ps(d, r, set(2.0f)));
}

INLINE __m512 over_one_plus_exp(__m512 v, __m512 exponent) {
  const __m512 e = exponential(_mm512_min_ps(exponent, set(87.0f)));
  return _mm512_mul_ps(v, reciprocal(_mm512_add_ps(e, set(1.0f))));
}

// Abramowitz and Stegun 7.1.26: the error function to 1.5e-7.
INLINE __m512 gelu(__m512 v) {
  const __m512 z = _mm512_mul_ps(_mm512_abs_ps(v), set(0.70710678f));
  const __m512 t = reciprocal(_mm512_fmadd_ps(z, set(0.3275911f), set(1.0f)));
  __m512 p = set(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = _mm512_fmadd_ps(p, t, set(c));
  const __m512 square = _mm512_max_ps(_mm512_mul_ps(_mm512_mul_ps(z, z), set(-1.0f)), set(-100.0f));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), exponential(square));
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(v));
  const __m512 both = _mm512_mask_mov_ps(_mm512_sub_ps(set(2.0f), tail), negative, tail);
  return _mm512_mul_ps(_mm512_mul_ps(v, set(0.5f)), both);
}

INLINE __m512 gelu_tanh(__m512 v) {
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(v, v), v);
  const __m512 u = _mm512_fmadd_ps(cube, set(0.044715f), v);
  return over_one_plus_exp(v, _mm512_mul_ps(u, set(-2.0f * 0.79788456f)));
}

template <int N>
INLINE void apply_to(Function function, __m512 (&v)[N]) {
  switch (function) {
    case Function::none: return;
    case Function::relu:
      for (auto& e : v) e = _mm512_max_ps(_mm512_setzero_ps(), e);
      return;
    case Function::gelu:
      for (auto& e : v) e = gelu(e);
      return;
    case Function::gelu_tanh:
      for (auto& e : v) e = gelu_tanh(e);
      return;
    case Function::silu:
      for (auto& e : v) e = over_one_plus_exp(e, _mm512_sub_ps(_mm512_setzero_ps(), e));
  }
}

INLINE __m256i narrow(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

INLINE __m512 widen(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// ---- the end of a tile ----------------------------------------------------------------------------------------------

constexpr int64_t line_rows = 4;  // block rows whose outputs of a token are a cache line of float32

// These rows by the tokens of a block, as lanes of 4 rows of one token; becomes whole cache lines of row-major output.
struct Stage {
  alignas(64) float lanes[line_rows][4][4][16];  // [block row][vector][token in lane][lane, row]
};

// What follows the products. The two that layers have most are code without questions: the sparser the rows, the more
// of the time it takes. `any` asks.
enum class End { any, bytes, floats };

inline End end_of(const Input& x, const Output& out) {
  if (plain_bytes(out)) return x.token_scale ? End::any : End::bytes;
  const bool floats = out.layout == Layout::rows && (out.type == Type::f32 || out.type == Type::bf16);
  return floats && x.token_scale && !out.residual && out.function == Function::none ? End::floats : End::any;
}

// Of 32 rows: where their sums begin, what these are multiplied by, and what is added. In memory, whence a broadcast
// takes no shuffle; 16 rows at a time, as for four it would take longer than the rest of their end.
struct Terms {
  alignas(64) int32_t from[4 * panel_rows];
  alignas(64) float scale[4 * panel_rows], bias[4 * panel_rows];
  bool small;  // to bytes: nothing can be so large that its conversion fails
};

template <int NB, bool Quads, End E = End::any>
class Finish {
  using At = Order<NB, Quads>;
  static constexpr int V = At::vectors;

  const Weights& a;
  const Input& x;
  const Output& out;
  const int64_t b, token, left, end;
  alignas(64) float scales[NB];  // of the tokens, in the order of the sums
  Terms terms;
  int64_t panel = -1;  // whose terms these are
  int64_t held = -1;   // which four block rows are staged and not yet written
  Stage stages[2];     // in turn

 public:
  // Block rows before `end` come, in order.
  Finish(const Weights& a, const Input& x, const Output& out, int64_t b, int64_t end)
      : a(a), x(x), out(out), b(b), token(b * block_tokens), left(std::min<int64_t>(NB, x.tokens - token)), end(end) {
    if (!x.token_scale) return;
    for (int i = 0; i < V; ++i)
      for (int e = 0; e < 16; ++e) {
        const int t = At::place_of(e / 4, i) + e % 4;
        scales[16 * i + e] = t < left ? x.token_scale[token + t] : 0.0f;
      }
  }

  // The sums of a block row begin here: what the zero point of x adds, taken off.
  INLINE void start(int64_t row, Sums<NB>& s) {
    if (row / panel_rows != panel) find_terms(row / panel_rows);
    const int32_t* from = terms.from + 4 * (row % panel_rows);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) s.v[r][i] = _mm512_set1_epi32(from[r]);
  }

  INLINE void tile(int64_t row, const Sums<NB>& s) {
    if (to_bytes()) return bytes(row, s);
    __m512 v[4][V];
    affine(row, s, v);
    if (E == End::floats) return turn(row, v);
    if (out.layout == Layout::rows) return rows(row, v);
    const int64_t real = std::min<int64_t>(4, a.rows - 4 * row);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if (r >= real) break;
      if (out.residual) add_t(static_cast<const float*>(out.residual) + t_place(4 * row + r), v[r]);
      apply_to(out.function, v[r]);
      if (out.layout == Layout::q) continue;
      if (out.type == Type::f32) store_t(static_cast<float*>(out.data) + t_place(4 * row + r), v[r]);
      else store_t(static_cast<uint8_t*>(out.data) + t_place(4 * row + r), v[r]);
    }
    if (out.layout == Layout::q)
      store_q(static_cast<uint8_t*>(out.data) + block_start(Layout::q, a.rows, b) + row * NB * 4, v);
  }

  // The row-major lines that `flush` is going to write come closer, two side by side of an eighth of the tokens with
  // every block row: a store that misses the second-level cache takes longer than a product.
  INLINE void expect(int64_t row) const {
    if (out.layout != Layout::rows) return;
    const int64_t item = out.type == Type::f32 ? 4 : out.type == Type::bf16 ? 2 : 1, some = NB / panel_rows;
    const int64_t from = row % panel_rows * some, to = std::min<int64_t>(from + some, left);
    const char* at = static_cast<const char*>(out.data) + (token * out.stride + row / panel_rows * 32) * item;
    for (int64_t t = from; t < to; ++t) {
      _mm_prefetch(at + t * out.stride * item, _MM_HINT_T1);
      _mm_prefetch(at + t * out.stride * item + 16 * item, _MM_HINT_T1);
    }
  }

  // Staged rows are written while the next four block rows are made, a vector of tokens after each: stores that miss
  // the first-level cache, all at once, fill the store buffer, and the products wait.
  INLINE void flush(int64_t row) {
    if (E == End::bytes || out.layout != Layout::rows) return;
    if (held >= 0 || row + 1 == end) write_due(row);
    if (row % line_rows == line_rows - 1) held = row / line_rows;
  }

 private:
  // A function of its own: inlined it would take registers from the loop over groups.
  __attribute__((noinline)) void write_due(int64_t row) {
    if (held >= 0) write_staged(held, row % line_rows);
    if (row + 1 != end) return;
    for (int64_t i = row % line_rows + 1; held >= 0 && i < V; ++i) write_staged(held, i);
    for (int64_t i = 0; i < V; ++i) write_staged(row / line_rows, i);
  }

  // Vector i of four staged block rows.
  void write_staged(int64_t which, int64_t i) {
    if (i >= V) return;
    const int64_t first = 16 * which, count = std::min<int64_t>(16, a.rows - first);
    const float* from = stages[which % 2].lanes[0][i][0];
    const int64_t near = i * At::place_of(0, 1);
    if (out.type == Type::f32 && !out.residual && left == NB && count == 16) {
      const int64_t stride = out.stride;  // that vectors are stored says nothing about
      float* to = static_cast<float*>(out.data) + (token + near) * stride + first;
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, from += 16, to += stride) {
        __m512 v[4];
        join(from, v);
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) _mm512_storeu_ps(to + At::place_of(l, 0) * stride, v[l]);
      }
      return;
    }
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    for (int64_t j = 0; j < 4; ++j) {
      __m512 v[4];
      join(from + 16 * j, v);
      for (int l = 0; l < 4; ++l)
        if (const int64_t t = near + At::place_of(l, 0) + j; t < left) write_row(out, token + t, first, mask, v[l]);
    }
  }

  // Four tokens' 16 outputs: lane l of what four block rows staged is rows of token l.
  static INLINE void join(const float* from, __m512 (&v)[4]) {
    const auto two = [from](int row, int lane) __attribute__((always_inline)) {
      const float* first = from + 256 * row + 4 * lane;
      const __m512d low = _mm512_castpd256_pd512(_mm256_castps_pd(_mm256_load_ps(first)));
      return _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(_mm256_load_ps(first + 256)), 1));
    };
    const __m512 ab01 = two(0, 0), ab23 = two(0, 2), cd01 = two(2, 0), cd23 = two(2, 2);
    v[0] = _mm512_shuffle_f32x4(ab01, cd01, 0x88);
    v[1] = _mm512_shuffle_f32x4(ab01, cd01, 0xdd);
    v[2] = _mm512_shuffle_f32x4(ab23, cd23, 0x88);
    v[3] = _mm512_shuffle_f32x4(ab23, cd23, 0xdd);
  }

  INLINE bool per_token() const { return E == End::any ? x.token_scale != nullptr : E == End::floats; }

  INLINE __m512 floats(const __m512i& sum, int i) const {
    const __m512 v = _mm512_cvtepi32_ps(sum);
    return per_token() ? _mm512_mul_ps(v, _mm512_load_ps(scales + 16 * i)) : v;
  }

  INLINE bool to_bytes() const { return E == End::bytes || (E == End::any && plain_bytes(out)); }

  void find_terms(int64_t next) {
    panel = next;
    terms.small = to_bytes() && !per_token();
    for (int64_t i = 0; i < 4 * panel_rows; i += 16) {
      const int64_t row = 4 * panel_rows * next + i, count = std::clamp<int64_t>(a.rows - row, 0, 16);
      const auto real = static_cast<__mmask16>((1u << count) - 1);
      const __m512i sums = _mm512_maskz_loadu_epi32(real, a.sums + row);
      __m512 scale = _mm512_maskz_loadu_ps(real, a.scale + row), bias = _mm512_setzero_ps();
      if (out.bias) bias = _mm512_maskz_loadu_ps(real, out.bias + row);
      if (!per_token()) scale = _mm512_mul_ps(scale, set(x.scale));
      if (to_bytes()) {
        scale = _mm512_mul_ps(scale, set(out.inverse_scale));
        bias = _mm512_fmadd_ps(bias, set(out.inverse_scale), set(static_cast<float>(out.zero)));
        const __m512 sum = set(static_cast<float>(a.cols) * 255 * 127 * 2);
        const __m512 most = _mm512_fmadd_ps(scale, sum, _mm512_abs_ps(bias));
        terms.small = terms.small && _mm512_cmp_ps_mask(most, set(1 << 30), _CMP_LT_OQ) == 0xffff;
      }
      _mm512_store_si512(terms.from + i, _mm512_mullo_epi32(sums, _mm512_set1_epi32(-x.zero)));
      _mm512_store_ps(terms.scale + i, scale);
      _mm512_store_ps(terms.bias + i, bias);
    }
  }

  INLINE void affine(int64_t row, const Sums<NB>& s, __m512 (&v)[4][V]) {
    const float *scale = terms.scale + 4 * (row % panel_rows), *bias = terms.bias + 4 * (row % panel_rows);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) v[r][i] = _mm512_fmadd_ps(floats(s.v[r][i], i), set(scale[r]), set(bias[r]));
  }

  // Nothing but scales, bias and rounding: one multiplication less. The packs saturate below, and above, too, where
  // nothing can be so large that its conversion fails.
  INLINE void bytes(int64_t row, const Sums<NB>& s) {
    const bool u8 = out.type == Type::u8;
    if (terms.small) u8 ? bytes<true, true>(row, s) : bytes<true, false>(row, s);
    else u8 ? bytes<false, true>(row, s) : bytes<false, false>(row, s);
  }

  template <bool Small, bool U8>
  INLINE void bytes(int64_t row, const Sums<NB>& s) {
    const float *scale = terms.scale + 4 * (row % panel_rows), *bias = terms.bias + 4 * (row % panel_rows);
    const auto whole = [&](int r, int i) __attribute__((always_inline)) {
      __m512 v = _mm512_fmadd_ps(floats(s.v[r][i], i), set(scale[r]), set(bias[r]));
      if constexpr (!Small) v = _mm512_max_ps(_mm512_min_ps(v, set(U8 ? 255.0f : 127.0f)), set(U8 ? 0.0f : -128.0f));
      return _mm512_cvtps_epi32(v);
    };
    if (out.layout == Layout::q) {
      uint8_t* to = static_cast<uint8_t*>(out.data) + block_start(Layout::q, a.rows, b) + row * NB * 4;
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) store_quads<U8>(to, i, {whole(0, i), whole(1, i), whole(2, i), whole(3, i)});
      return;
    }
    uint8_t* to = static_cast<uint8_t*>(out.data) + t_place(4 * row);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if (4 * row + r >= a.rows) return;
      __m512i q[V];
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) q[i] = whole(r, i);
      store_bytes<U8>(to + r * NB, q);
    }
  }

  int64_t t_place(int64_t m) const { return block_start(Layout::t, a.rows, b) + m * NB; }

  INLINE void add_t(const float* residual, __m512 (&v)[V]) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      __m512 other = _mm512_castps128_ps512(_mm_loadu_ps(residual + At::place_of(0, i)));
      other = _mm512_insertf32x4(other, _mm_loadu_ps(residual + At::place_of(1, i)), 1);
      other = _mm512_insertf32x4(other, _mm_loadu_ps(residual + At::place_of(2, i)), 2);
      other = _mm512_insertf32x4(other, _mm_loadu_ps(residual + At::place_of(3, i)), 3);
      v[i] = _mm512_add_ps(v[i], other);
    }
  }

  INLINE void store_t(float* to, const __m512 (&v)[V]) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      _mm_storeu_ps(to + At::place_of(0, i), _mm512_castps512_ps128(v[i]));
      _mm_storeu_ps(to + At::place_of(1, i), _mm512_extractf32x4_ps(v[i], 1));
      _mm_storeu_ps(to + At::place_of(2, i), _mm512_extractf32x4_ps(v[i], 2));
      _mm_storeu_ps(to + At::place_of(3, i), _mm512_extractf32x4_ps(v[i], 3));
    }
  }

  // The bounds before the conversion, which makes of everything out of range the least integer.
  INLINE __m512i whole(__m512 v, float low, float high) {
    const __m512 scaled = _mm512_fmadd_ps(v, set(out.inverse_scale), set(static_cast<float>(out.zero)));
    return _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(scaled, set(high)), set(low)));
  }

  INLINE void store_t(uint8_t* to, const __m512 (&v)[V]) {
    const bool u8 = out.type == Type::u8;
    __m512i q[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) q[i] = whole(v[i], u8 ? 0.0f : -128.0f, u8 ? 255.0f : 127.0f);
    u8 ? store_bytes<true>(to, q) : store_bytes<false>(to, q);
  }

  template <bool U8>
  static INLINE __m128i saturate(__m512i v) {
    return U8 ? _mm512_cvtusepi32_epi8(_mm512_max_epi32(v, _mm512_setzero_si512())) : _mm512_cvtsepi32_epi8(v);
  }

  template <bool U8>
  static INLINE __m512i pack(__m512i q0, __m512i q1, __m512i q2, __m512i q3) {
    const __m512i lo = _mm512_packs_epi32(q0, q1), hi = _mm512_packs_epi32(q2, q3);
    return U8 ? _mm512_packus_epi16(lo, hi) : _mm512_packs_epi16(lo, hi);
  }

  // The packs undo the order that the unpacks left.
  template <bool U8>
  INLINE void store_bytes(uint8_t* to, const __m512i (&q)[V]) {
    if constexpr (NB == 64 && !At::natural) {
      _mm512_storeu_si512(to, pack<U8>(q[0], q[1], q[2], q[3]));
    } else if constexpr (NB == 32 && !At::natural) {
      const __m128i one = saturate<U8>(q[0]), two = saturate<U8>(q[1]);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi64(one, two));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi64(one, two));
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * i), saturate<U8>(q[i]));
    }
  }

  INLINE void store_q(uint8_t* to, const __m512 (&v)[4][V]) {
    const bool u8 = out.type == Type::u8;
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      __m512i q[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) q[r] = whole(v[r][i], u8 ? 0.0f : -128.0f, u8 ? 255.0f : 127.0f);
      u8 ? store_quads<true>(to, i, q) : store_quads<false>(to, i, q);
    }
  }

  // Vector i of four rows: packed, then turned in each lane.
  template <bool U8>
  INLINE void store_quads(uint8_t* to, int i, const __m512i (&q)[4]) {
    const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i all = _mm512_shuffle_epi8(pack<U8>(q[0], q[1], q[2], q[3]), turn);
    if constexpr (At::natural) {
      _mm512_storeu_si512(to + 64 * i, all);
    } else {
      const auto lane = [&](int l) { return reinterpret_cast<__m128i*>(to + 4 * At::place_of(l, i)); };
      _mm_storeu_si128(lane(0), _mm512_castsi512_si128(all));
      _mm_storeu_si128(lane(1), _mm512_extracti32x4_epi32(all, 1));
      _mm_storeu_si128(lane(2), _mm512_extracti32x4_epi32(all, 2));
      _mm_storeu_si128(lane(3), _mm512_extracti32x4_epi32(all, 3));
    }
  }

  INLINE void rows(int64_t row, __m512 (&v)[4][V]) {
    const bool plain = !out.residual && out.type != Type::u8 && out.type != Type::s8;
    if (plain && out.function != Function::none)
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) apply_to(out.function, v[r]);
    turn(row, v);
  }

  // 4 rows by 4 tokens turned in each lane.
  INLINE void turn(int64_t row, const __m512 (&v)[4][V]) {
    float(&to)[4][4][16] = stages[row / line_rows % 2].lanes[row % line_rows];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      const __m512 a0 = _mm512_unpacklo_ps(v[0][i], v[1][i]), a1 = _mm512_unpackhi_ps(v[0][i], v[1][i]);
      const __m512 b0 = _mm512_unpacklo_ps(v[2][i], v[3][i]), b1 = _mm512_unpackhi_ps(v[2][i], v[3][i]);
      const auto pair = [](__m512 p, __m512 q, bool high) __attribute__((always_inline)) {
        const __m512d one = _mm512_castps_pd(p), two = _mm512_castps_pd(q);
        return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(one, two) : _mm512_unpacklo_pd(one, two));
      };
      _mm512_store_ps(to[i][0], pair(a0, b0, false));
      _mm512_store_ps(to[i][1], pair(a0, b0, true));
      _mm512_store_ps(to[i][2], pair(a1, b1, false));
      _mm512_store_ps(to[i][3], pair(a1, b1, true));
    }
  }

 public:
  // 16 outputs of one token.
  static INLINE void write_row(const Output& out, int64_t t, int64_t first, __mmask16 mask, __m512 value) {
    const bool bytes = out.type == Type::u8 || out.type == Type::s8;
    if (out.residual || bytes) {
      if (out.residual) {
        const int64_t at = t * out.residual_stride + first;
        value = _mm512_add_ps(
            value, out.residual_type == Type::f32
                       ? _mm512_maskz_loadu_ps(mask, static_cast<const float*>(out.residual) + at)
                       : widen(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(out.residual) + at)));
      }
      __m512 one[1] = {value};
      apply_to(out.function, one);
      value = one[0];
    }
    const int64_t at = t * out.stride + first;
    if (out.type == Type::f32) return _mm512_mask_storeu_ps(static_cast<float*>(out.data) + at, mask, value);
    if (out.type == Type::bf16)
      return _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out.data) + at, mask, narrow(value));
    const bool u8 = out.type == Type::u8;
    const __m512 scaled = _mm512_fmadd_ps(value, set(out.inverse_scale), set(static_cast<float>(out.zero)));
    const __m512 bound = _mm512_max_ps(_mm512_min_ps(scaled, set(u8 ? 255.0f : 127.0f)), set(u8 ? 0.0f : -128.0f));
    _mm512_mask_cvtepi32_storeu_epi8(static_cast<uint8_t*>(out.data) + at, mask, _mm512_cvtps_epi32(bound));
  }
};

}  // namespace
}  // namespace gossamer::bsr
