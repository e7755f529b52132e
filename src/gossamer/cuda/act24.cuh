// The middle of a feed-forward block, and MVUE. `act24`: h = f(z), or f(gate) * up for z = [gate | up]. `act24_back`: the
// gradient of z from that of h. `mvue24`: that, and an unbiased 2:4 estimate of its transpose, compressed (Chmiel et al.,
// 2203.10991; FST, 2404.01847). Macros: BF16; ACT: 0 identity, 1 silu, 2 gelu by tanh; GATED; EXACT (1): the estimate of
// least variance, else the papers' approximation of it; GIVEN (1): uniform numbers are read, else Philox makes them.
#include "pack24.cuh"

constexpr int PITCH = 66;

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// f(x) and f'(x).
__device__ inline void act(float x, float& y, float& slope) {
#if ACT == 1
  const float s = sigmoid(x);
  y = x * s, slope = s * (1.0f + x * (1.0f - s));
#elif ACT == 2
  const float c = 0.7978845608f, inner = c * (x + 0.044715f * x * x * x), t = 2.0f * sigmoid(2.0f * inner) - 1.0f;
  y = 0.5f * x * (1.0f + t);
  slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * c * (1.0f + 3.0f * 0.044715f * x * x);
#else
  y = x, slope = 1.0f;
#endif
}

// A thread makes 8 values of one token. Grid: (tokens, ceil(wide / 8 / 256)), block 256.
extern "C" __global__ void __launch_bounds__(256) act24(const u16* z, u16* h, i64 tokens, i64 wide) {
  const i64 token = blockIdx.x, col = ((i64)blockIdx.y * 256 + threadIdx.x) * 8;
  if (col >= wide) return;
  alignas(16) u16 gate[8], up[8];
  const u16* from = z + token * wide * (1 + GATED) + col;
  *(uint4*)gate = *(const uint4*)from;
  if (GATED) *(uint4*)up = *(const uint4*)(from + wide);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float y, slope;
    act(widen(gate[j]), y, slope);
    gate[j] = narrow(GATED ? y * widen(up[j]) : y);
  }
  *(uint4*)(h + token * wide + col) = *(const uint4*)gate;
}

// The gradients of 8 values of z, of the gate and of up, in the place of that of h and of up.
__device__ inline void back(u16 (&g)[8], const u16 (&a)[8], u16 (&b)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float y, slope;
    act(widen(a[j]), y, slope);
    const float grad = widen(g[j]);
    g[j] = narrow(GATED ? grad * widen(b[j]) * slope : grad * slope);
    if (GATED) b[j] = narrow(grad * y);
  }
}

// 8 values of dh at `token` and `col` -> those of dz, which are stored. `g`: of z or of the gate; `b`: of up.
__device__ inline void back_at(const u16* z, const u16* dh, u16* dz, i64 token, i64 col, i64 wide, u16 (&g)[8],
                               u16 (&b)[8]) {
  alignas(16) u16 a[8];
  const i64 place = token * wide * (1 + GATED) + col;
  *(uint4*)g = *(const uint4*)(dh + token * wide + col);
  if (!ACT) return;
  *(uint4*)a = *(const uint4*)(z + place);
  if (GATED) *(uint4*)b = *(const uint4*)(z + place + wide);
  back(g, a, b);
  *(uint4*)(dz + place) = *(const uint4*)g;
  if (GATED) *(uint4*)(dz + place + wide) = *(const uint4*)b;
}

// Grid and block as of act24.
extern "C" __global__ void __launch_bounds__(256)
    act24_back(const u16* z, const u16* dh, u16* dz, i64 tokens, i64 wide) {
  const i64 token = blockIdx.x, col = ((i64)blockIdx.y * 256 + threadIdx.x) * 8;
  if (col >= wide) return;
  alignas(16) u16 g[8], b[8];
  back_at(z, dh, dz, token, col, wide, g, b);
}

// Philox-4x32-10 (Salmon et al., SC 2011).
__device__ inline uint4 philox(u64 counter, u64 key) {
  u32 x = counter, y = counter >> 32, z = 0, w = 0, low = key, high = key >> 32;
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    const u32 a = __umulhi(0xd2511f53u, x), b = 0xd2511f53u * x, c = __umulhi(0xcd9e8d57u, z), d = 0xcd9e8d57u * z;
    x = c ^ y ^ low, y = d, z = a ^ w ^ high, w = b;
    low += 0x9e3779b9u, high += 0xbb67ae85u;
  }
  return {x, y, z, w};
}

__device__ inline float uniform01(u32 bits) { return (float)(bits >> 10) * 0x1p-22f; }

#if EXACT
// Two of four, i with probability p_i = min(1, 2 a_i / sum of a) by a systematic sample, divided by it: one number u
// points into the first half of the magnitudes laid end to end and as far into the second. No more than the sum of the
// others counts of any magnitude: such a one is kept for certain and as it is, all others become half the sum.
__device__ inline Pair estimate(const Four& v, float u) {
  constexpr float MOST = 0x1p124f;  // four of them have a sum
  float g[4], a[4], c[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) g[i] = widen(v[i]), a[i] = fabsf(g[i]), c[i] = fminf(a[i], MOST);
  const float low = c[0] + c[1], high = c[2] + c[3];
  const float end0 = fminf(c[0], c[1] + high + TINY), end1 = end0 + fminf(c[1], c[0] + high + TINY);
  const float end2 = end1 + fminf(c[2], c[3] + low + TINY), end3 = end2 + fminf(c[3], c[2] + low + TINY);
  const float half = 0.5f * end3, t = fminf(u, 1.0f - 0x1p-22f) * half;  // so that t + half does not round to the end
#pragma unroll
  for (int i = 0; i < 4; ++i) g[i] = copysignf(a[i] <= half ? half : a[i], g[i]);  // NaN stays
  int at[2];
  u16 kept[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const float x = k ? t + half : t;
    const bool past0 = x >= end0, past1 = x >= end1, past2 = x >= end2;
    at[k] = past2 ? 3 : past1 ? 2 : past0 ? 1 : 0;
    kept[k] = plain_zero(narrow(past2 ? g[3] : past1 ? g[2] : past0 ? g[1] : g[0]));
  }
  // Where both point at the same, nothing else is left: a zero beside it.
  const bool before = at[0] == at[1] && at[0] == 3, after = at[0] == at[1] && at[0] != 3;
  const u32 one = before ? 0 : kept[0], two = after ? 0 : kept[1];
  return {one | two << 16, (u32)(at[0] - before | (at[1] + after) << 2)};
}
#else
// Of weights a with sum `whole`: the one that holds u * whole.
__device__ inline int draw(const float (&a)[4], float whole, float u) {
  const float x = u * whole, one = a[0], two = one + a[1], three = two + a[2];
  return x < one ? 0 : x < two ? 1 : x < three ? 2 : 3;
}

// Two of four, drawn by magnitude and divided by their probability: first i by a_i / S, then j by a_j / (S - a_i).
__device__ inline Pair estimate(const Four& v, float u, float u2) {
  float g[4], a[4];
  float most = TINY;
#pragma unroll
  for (int i = 0; i < 4; ++i) g[i] = widen(v[i]), most = fmaxf(most, fabsf(g[i]));
  const float inverse = __fdividef(1.0f, most);  // so that sums neither over- nor underflow
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = fabsf(g[i]) * inverse;
  const float rest[4] = {a[1] + a[2] + a[3], a[0] + a[2] + a[3], a[0] + a[1] + a[3], a[0] + a[1] + a[2]};
  const float whole = a[0] + rest[0], share = __fdividef(1.0f, fmaxf(whole, TINY));
  float odds[4], sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) odds[i] = rest[i] > 0 ? __fdividef(a[i], rest[i]) : 0.0f, sum += odds[i];
  const int first = draw(a, whole, u);
  float left[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) left[i] = i == first ? 0.0f : a[i];
  int second = draw(left, left[0] + left[1] + left[2] + left[3], u2);
  if (second == first) second = first == 0 ? 1 : 0;  // nothing else is left: a zero
  u16 kept[2];
  const int low = first < second ? first : second, high = first < second ? second : first;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int i = k ? high : low;
    float value = 0, weight = 0, odd = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j == i) value = g[j], weight = a[j], odd = odds[j];
    const float p = weight * share * (1.0f + sum - odd);
    kept[k] = p > 0 ? plain_zero(narrow(__fdividef(value, p))) : 0;
  }
  return {(u32)kept[0] | (u32)kept[1] << 16, (u32)(low | high << 2)};
}
#endif

// dz from dh and z, [tokens, wide], and with GATED [tokens, 2 wide]; ACT 0 has dz = dh and writes none. `out`: the
// estimate of dz^T [wide, tokens]. `seed`: one number. A block takes 64 tokens by 64 columns (of gate and of up), 64
// threads for each. Grid: (wide / 64, tokens / 64), block 64 (1 + GATED).
extern "C" __global__ void __launch_bounds__(64 * (1 + GATED))
    mvue24(const u16* z, const u16* dh, u16* dz, u8* out, const u64* seed, const float* uniforms, i64 tokens, i64 wide) {
  __shared__ __align__(16) u16 tiles[1 + GATED][64 * PITCH];
  const i64 top = (i64)blockIdx.y * 64, left = (i64)blockIdx.x * 64, stride = wide * (1 + GATED);
#pragma unroll 4
  for (int j = 0; j < 8 / (1 + GATED); ++j) {
    const int i = threadIdx.x + 64 * (1 + GATED) * j;
    alignas(16) u16 g[8], b[8];
    back_at(z, dh, dz, top + i / 8, left + i % 8 * 8, wide, g, b);
    const int to = i / 8 * PITCH + i % 8 * 8;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      ((u32*)(tiles[0] + to))[k] = ((const u32*)g)[k];
      if (GATED) ((u32*)(tiles[GATED] + to))[k] = ((const u32*)b)[k];
    }
  }
  __syncthreads();
  const int part = threadIdx.x / 64, unit = threadIdx.x % 64;
  const int from = unit / 32 * 32, line = unit / 8 % 4 * 16 + unit % 8;
  const i64 row = part * wide + left + line;
  const u16* tile = tiles[part] + from * PITCH + line;
  const u64 key = GIVEN ? 0 : *seed;
  constexpr int DRAWN = EXACT ? 4 : 2;  // groups of four that one turn of Philox serves
  Unit packed = {};
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int turn = 0; turn < 8 / DRAWN; ++turn) {
      const i64 group = ((row + 8 * half) * tokens + top + from) / 4 + turn * DRAWN;
      float u[8];
      if (GIVEN) {
#pragma unroll
        for (int i = 0; i < 2 * DRAWN; ++i) u[i] = uniforms[2 * group + i];
      } else {
        const uint4 bits = philox(group, key);
        const float made[4] = {uniform01(bits.x), uniform01(bits.y), uniform01(bits.z), uniform01(bits.w)};
#pragma unroll
        for (int i = 0; i < 4; ++i) u[EXACT ? 2 * i : i] = made[i];
      }
#pragma unroll
      for (int k = 0; k < DRAWN; ++k) {
        Four v;
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = tile[(4 * (turn * DRAWN + k) + i) * PITCH + 8 * half];
#if EXACT
        packed.put(half, turn * DRAWN + k, estimate(v, u[2 * k]));
#else
        packed.put(half, turn * DRAWN + k, estimate(v, u[2 * k], u[2 * k + 1]));
#endif
      }
    }
  packed.store<true>(out, row, top + from, stride, tokens);
}
