// The row loops that every ISA shares. A translation unit first defines, in the anonymous namespace,
//   template <class T> struct Block {           // T = uint8_t, uint16_t, uint32_t, uint64_t
//     static constexpr int lanes;               // elements a step, a multiple of 8 up to 64
//     static uint64_t nonzero(const T* src, T significant);
//     static void compress(const T* src, uint64_t bits, T* dst);      // may write all lanes
//     static void expand(const T* values, uint64_t bits, T* dst);     // may read all lanes
//   };
// Everything here is anonymous too: were it shared, the linker could keep the AVX-512 copy for every CPU.
// No #pragma once and no std:: templates that are not inlined away, for the same reason.
#include <cstdint>
#include <cstring>

#include "bitmask.h"

namespace gossamer {
namespace {

template <class T>
uint64_t load_bits(const uint8_t* mask) {
  uint64_t bits = 0;
  std::memcpy(&bits, mask, Block<T>::lanes / 8);
  return bits;
}

// The last, partial step of a row: padding bits are dropped, not trusted.
inline uint64_t load_tail(const uint8_t* mask, int64_t cols) {
  uint64_t bits = 0;
  std::memcpy(&bits, mask, (cols + 7) / 8);
  return bits & ((uint64_t{1} << cols) - 1);
}

template <class T>
T* put(const T* src, uint64_t bits, T* out, T* end) {
  const int64_t n = __builtin_popcountll(bits);
  const int64_t room = end - out;
  if (room >= Block<T>::lanes) {
    Block<T>::compress(src, bits, out);
    return out + n;
  }
  if (room <= 0) return out;
  T packed[Block<T>::lanes];
  Block<T>::compress(src, bits, packed);
  const int64_t kept = n < room ? n : room;
  std::memcpy(out, packed, kept * sizeof(T));
  return out + kept;
}

template <class T>
const T* take(const T* values, const T* end, uint64_t bits, T* dst) {
  const int64_t n = __builtin_popcountll(bits);
  const int64_t room = end - values;
  if (room >= Block<T>::lanes) {
    Block<T>::expand(values, bits, dst);
    return values + n;
  }
  T packed[Block<T>::lanes] = {};
  if (room > 0) std::memcpy(packed, values, room * sizeof(T));
  Block<T>::expand(packed, bits, dst);
  return values + (n < room ? n : room);
}

template <class T>
int64_t count_row(const void* row, int64_t cols, uint64_t significant) {
  constexpr int lanes = Block<T>::lanes;
  const T* src = static_cast<const T*>(row);
  int64_t n = 0;
  for (; cols >= lanes; cols -= lanes, src += lanes)
    n += __builtin_popcountll(Block<T>::nonzero(src, static_cast<T>(significant)));
  for (int64_t i = 0; i < cols; ++i) n += (src[i] & static_cast<T>(significant)) != 0;
  return n;
}

template <class T>
void pack_row(const void* row, int64_t cols, uint64_t significant, uint8_t* mask, void* out, void* out_end) {
  constexpr int lanes = Block<T>::lanes;
  const T* src = static_cast<const T*>(row);
  T* next = static_cast<T*>(out);
  T* end = static_cast<T*>(out_end);
  for (; cols >= lanes; cols -= lanes, src += lanes, mask += lanes / 8) {
    const uint64_t bits = Block<T>::nonzero(src, static_cast<T>(significant));
    std::memcpy(mask, &bits, lanes / 8);
    next = put<T>(src, bits, next, end);
  }
  if (cols == 0) return;
  T tail[lanes] = {};
  std::memcpy(tail, src, cols * sizeof(T));
  const uint64_t bits = Block<T>::nonzero(tail, static_cast<T>(significant));
  std::memcpy(mask, &bits, (cols + 7) / 8);
  put<T>(tail, bits, next, end);
}

template <class T>
void store(const T* lanes_of, int64_t n, T* dst) {
  std::memcpy(dst, lanes_of, n * sizeof(T));
}

inline void store(const uint16_t* bf16, int64_t n, uint32_t* f32) {
  for (int64_t i = 0; i < n; ++i) f32[i] = uint32_t{bf16[i]} << 16;
}

template <class T, class Out = T>
void unpack_row(const uint8_t* mask, const void* row_values, const void* values_end, int64_t cols, void* row) {
  constexpr int lanes = Block<T>::lanes;
  const T* values = static_cast<const T*>(row_values);
  const T* end = static_cast<const T*>(values_end);
  Out* dst = static_cast<Out*>(row);
  T block[lanes];
  for (; cols >= lanes; cols -= lanes, mask += lanes / 8, dst += lanes) {
    values = take<T>(values, end, load_bits<T>(mask), block);
    store(block, lanes, dst);
  }
  if (cols == 0) return;
  take<T>(values, end, load_tail(mask, cols), block);
  store(block, cols, dst);
}

inline int64_t popcount_row(const uint8_t* mask, int64_t bytes) {
  int64_t n = 0;
  uint64_t bits = 0;
  for (; bytes >= 8; bytes -= 8, mask += 8) {
    std::memcpy(&bits, mask, 8);
    n += __builtin_popcountll(bits);
  }
  if (bytes == 0) return n;
  bits = 0;
  std::memcpy(&bits, mask, bytes);
  return n + __builtin_popcountll(bits);
}

constexpr BitmaskRow bitmask_rows = {
    {count_row<uint8_t>, count_row<uint16_t>, count_row<uint32_t>, count_row<uint64_t>},
    {pack_row<uint8_t>, pack_row<uint16_t>, pack_row<uint32_t>, pack_row<uint64_t>},
    {unpack_row<uint8_t>, unpack_row<uint16_t>, unpack_row<uint32_t>, unpack_row<uint64_t>},
    unpack_row<uint16_t, uint32_t>,
    popcount_row,
};

}  // namespace
}  // namespace gossamer
