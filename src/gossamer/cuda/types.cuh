// Names and helpers that every kernel uses. NVRTC has no <cstdint>, and our sources include no CUDA header.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

constexpr u32 FULL = 0xffffffffu;  // every lane of a warp

template <int SIZE> struct Unsigned;
template <> struct Unsigned<1> { using type = u8; };
template <> struct Unsigned<2> { using type = u16; };
template <> struct Unsigned<4> { using type = u32; };
template <> struct Unsigned<8> { using type = u64; };

// COUNT values that one load or store moves; lies at a multiple of its size.
template <typename T, int COUNT> struct alignas(sizeof(T) * COUNT) Vector {
  T at[COUNT];
};

__device__ inline bool aligned(const void* p, int bytes) { return (u64)p % bytes == 0; }

__device__ inline i64 clamp(i64 x, i64 low, i64 high) { return x < low ? low : x > high ? high : x; }

// Sum of x over the lanes before this one.
__device__ inline i32 sum_before(i32 x, int lane) {
  i32 sum = x;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const i32 other = __shfl_up_sync(FULL, sum, d);
    if (lane >= d) sum += other;
  }
  return sum - x;
}
