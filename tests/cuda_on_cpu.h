// Enough of CUDA to run the device sources of sparse products on a CPU: a fiber per thread, blocks one after the other.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static

struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim;

struct Meeting {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index index;
  bool done = false;
};

static std::vector<Fiber> fibers;
static std::vector<Meeting> warp_meetings;
static Meeting block_meeting;
static ucontext_t scheduler;
static unsigned current;
static std::function<void()> body;
static uint32_t slots[64][32][8];  // what the lanes of each warp show to each other

inline unsigned warp_of() { return threadIdx.x / 32; }
inline unsigned lane_of() { return threadIdx.x % 32; }
inline void give_way() {
  swapcontext(&fibers[current].context, &scheduler);
}
inline void leave(Meeting& m) {
  if (--m.expected == m.arrived && m.expected) m.arrived = 0, ++m.generation;
}
inline void meet(Meeting& m) {
  const unsigned mine = m.generation;
  if (++m.arrived == m.expected) {
    m.arrived = 0, ++m.generation;
    return;
  }
  while (m.generation == mine) give_way();
}
inline void meet_warp() { meet(warp_meetings[warp_of()]); }
inline void __syncwarp(unsigned) {}  // ours order loads: no lane reads what another wrote
inline void __syncthreads() { meet(block_meeting); }

static void entry_of_fiber() {
  body();
  leave(block_meeting);
  leave(warp_meetings[warp_of()]);
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

static void run_block(unsigned threads) {
  fibers = std::vector<Fiber>(threads);
  warp_meetings.assign(threads / 32, Meeting{32});
  block_meeting = Meeting{(int)threads};
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.stack.reset(new char[1 << 16]);
    f.index = {i, 0, 0};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = 1 << 16;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry_of_fiber, 0);
  }
  for (unsigned left = threads; left;)
    for (current = 0; current < threads; ++current)
      if (!fibers[current].done) {
        threadIdx = fibers[current].index;
        swapcontext(&scheduler, &fibers[current].context);
        left -= fibers[current].done;
      }
}

static void run_grid(const int* grid, int threads, std::function<void()> what) {
  body = std::move(what);
  blockDim = {(unsigned)threads, 1, 1};
  for (int z = 0; z < grid[2]; ++z)
    for (int y = 0; y < grid[1]; ++y)
      for (int x = 0; x < grid[0]; ++x) {
        blockIdx = {(unsigned)x, (unsigned)y, (unsigned)z};
        run_block((threads + 31) / 32 * 32);
      }
}

// A fiber that gave way finds its own index again: run_block sets it before it goes on.
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= (uint32_t)(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}
inline uint32_t exchanged(uint32_t mine, unsigned from) {
  slots[warp_of()][lane_of()][0] = mine;
  meet_warp();
  const uint32_t got = slots[warp_of()][from][0];
  meet_warp();
  return got;
}
inline float __shfl_xor_sync(uint32_t, float x, int mask) {
  return __uint_as_float(exchanged(__float_as_uint(x), lane_of() ^ mask));
}
inline int __shfl_up_sync(uint32_t, int x, int d) { return exchanged(x, lane_of() >= (unsigned)d ? lane_of() - d : lane_of()); }
inline bool __any_sync(uint32_t, bool x) {
  slots[warp_of()][lane_of()][0] = x;
  meet_warp();
  bool any = false;
  for (auto& lane : slots[warp_of()]) any |= lane[0];
  meet_warp();
  return any;
}
