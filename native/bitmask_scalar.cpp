// Plain C++: the fallback everywhere and the only path off x86-64.
#include <cstdint>

namespace gossamer {
namespace {

template <class T>
struct Block {
  static constexpr int lanes = 8;

  static uint64_t nonzero(const T* src, T significant) {
    uint64_t bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= uint64_t{(src[i] & significant) != 0} << i;
    return bits;
  }

  static void compress(const T* src, uint64_t bits, T* dst) {
    for (int i = 0, n = 0; i < lanes; ++i) {
      dst[n] = src[i];
      n += bits >> i & 1;
    }
  }

  static void expand(const T* values, uint64_t bits, T* dst) {
    for (int i = 0, n = 0; i < lanes; ++i) {
      const T set = bits >> i & 1;
      dst[i] = values[n] & static_cast<T>(-set);
      n += static_cast<int>(set);
    }
  }
};

}  // namespace
}  // namespace gossamer

#include "bitmask_rows.h"

const gossamer::BitmaskRow gossamer::bitmask_scalar = gossamer::bitmask_rows;
