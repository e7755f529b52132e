// What many_rows.h asks for, in plain C++. Anonymous, as everything that is compiled for one ISA.
#include <cstdint>

namespace gossamer {
namespace {

constexpr int side = 16;

inline int64_t places(uint64_t bits, uint16_t first, uint16_t each, uint16_t* out) {
  int64_t n = 0;
  for (; bits; bits &= bits - 1) out[n++] = static_cast<uint16_t>(first + each * __builtin_ctzll(bits));
  return n;
}

inline void turn(const float (*square)[side], int cols, float* to, int64_t stride) {
  for (int k = 0; k < cols; ++k)
    for (int t = 0; t < side; ++t) to[k * stride + t] = square[t][k];
}

}  // namespace
}  // namespace gossamer
