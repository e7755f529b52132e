// Enough of CUDA to run kernels of ours on the CPU, bfloat16 only: a thread each, blocks one after the other. Tests put
// it before a source of src/gossamer/cuda, in which inline assembly has made way for the functions here.
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static

struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x, y, z;
};
thread_local Index threadIdx, blockIdx;
static std::barrier<>* block_barrier;
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __int_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float widen(uint16_t bits) { return __int_as_float((unsigned)bits << 16); }
inline uint16_t narrow(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline unsigned __shfl_xor_sync(unsigned, unsigned value, int by) {
  static unsigned slots[1024];
  auto& barrier = *warp_barriers[threadIdx.x / 32];
  slots[threadIdx.x] = value;
  barrier.arrive_and_wait();
  value = slots[threadIdx.x ^ by];
  barrier.arrive_and_wait();
  return value;
}

template <class Kernel> void launch(unsigned wide, unsigned high, unsigned threads, Kernel kernel) {
  std::barrier<> barrier(threads);
  block_barrier = &barrier;
  warp_barriers.clear();
  for (unsigned i = 0; i < threads; i += 32) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
  std::vector<std::thread> running;
  for (unsigned i = 0; i < threads; ++i)
    running.emplace_back([=, &barrier] {
      threadIdx = {i, 0, 0};
      for (unsigned y = 0; y < high; ++y)
        for (unsigned x = 0; x < wide; ++x) {
          blockIdx = {x, y, 0};
          kernel();
          barrier.arrive_and_wait();
        }
    });
  for (auto& thread : running) thread.join();
}
