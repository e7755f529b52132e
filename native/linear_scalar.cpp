// Plain C++: the fallback everywhere and the only path off x86-64.
#include <cstdint>
#include <cstring>

namespace gossamer {
namespace {

constexpr int lanes = 8, group = 2, most_rows = 1;

struct Vec {
  float lane[lanes];
};

inline Vec zero() { return {}; }

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(x.lane, p, sizeof x.lane);
  return x;
}

inline Vec broadcast(const float* p) {
  Vec x;
  for (float& lane : x.lane) lane = *p;
  return x;
}

inline void store(float* p, const Vec& a) { std::memcpy(p, a.lane, sizeof a.lane); }

inline Vec add(Vec a, const Vec& b) {
  for (int i = 0; i < lanes; ++i) a.lane[i] += b.lane[i];
  return a;
}

inline Vec fma(const Vec& a, const Vec& b, Vec c) {
  for (int i = 0; i < lanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}

inline float sum(const Vec& a) {
  float pairs[4];
  for (int i = 0; i < 4; ++i) pairs[i] = a.lane[i] + a.lane[i + 4];
  return (pairs[0] + pairs[2]) + (pairs[1] + pairs[3]);
}

template <class T>
struct Block {
  static constexpr int cols = 8, vecs = 1;
  struct Raw {
    T lane[cols];
  };

  static Raw read(const T* p) {
    Raw x;
    std::memcpy(x.lane, p, sizeof x.lane);
    return x;
  }

  static Raw read(const T* p, int64_t n) {
    Raw x = {};
    if (n > 0) std::memcpy(x.lane, p, static_cast<size_t>(n < cols ? n : cols) * sizeof(T));
    return x;
  }

  static Raw expand(const Raw& x, uint64_t bits) {
    Raw out;
    for (int i = 0, n = 0; i < cols; ++i) {
      const T set = bits >> i & 1;
      out.lane[i] = static_cast<T>(x.lane[n] & static_cast<T>(-set));
      n += static_cast<int>(set);
    }
    return out;
  }

  static void widen(const Raw& x, Vec* w) {
    uint32_t bits[cols];
    for (int i = 0; i < cols; ++i) bits[i] = uint32_t{x.lane[i]} << (32 - 8 * sizeof(T));
    std::memcpy(w->lane, bits, sizeof bits);
  }

  static constexpr int column(int i) { return i; }
};

}  // namespace
}  // namespace gossamer

#define GOSSAMER_UNROLL  // without vector registers it would be a thousand operations, and minutes of compilation
#include "many_plain.h"
#include "linear_rows.h"

const gossamer::LinearRows gossamer::linear_scalar = gossamer::linear_rows;
