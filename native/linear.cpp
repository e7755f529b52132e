#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "isa.h"
#include "parallel.h"

namespace gossamer {
namespace {

const LinearRows& kernels() {
  switch (isa::active()) {
#ifdef GOSSAMER_X86
    case isa::Isa::avx512: return linear_avx512;
    case isa::Isa::avx2: return linear_avx2;
#endif
    default: return linear_scalar;
  }
}

struct X {
  uintptr_t data;
  Float type;
  int64_t row_stride_bytes, tokens, cols;
};

int64_t bytes_of(Float type) { return type == Float::f32 ? 4 : 2; }

// One buffer for each calling thread: a decode step makes hundreds of calls of the same few sizes.
float* scratch(size_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local size_t held = 0;
  if (floats <= held) return buffer.get();
  const size_t bytes = (floats * sizeof(float) + 4095) / 4096 * 4096;
  held = 0;
  buffer.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (!buffer) throw std::bad_alloc();
  held = bytes / sizeof(float);
  return buffer.get();
}

const float* prepared(const X& x, LinearRows::Prepare prepare) {
  float* out = scratch(static_cast<size_t>((x.cols + step_cols - 1) / step_cols * step_cols * x.tokens));
  for (int64_t t = 0; t < x.tokens; ++t)
    prepare(reinterpret_cast<const void*>(x.data + t * x.row_stride_bytes), x.type, x.cols, t, x.tokens, out);
  return out;
}

// Without its x; a dense matrix has no mask and no offsets.
LinearJob job_of(uintptr_t mask, uintptr_t values, uintptr_t offsets, int64_t rows, int64_t cols, int64_t tokens,
                 uintptr_t bias, int bias_type, uintptr_t y, int y_type) {
  return {reinterpret_cast<const uint8_t*>(mask),
          reinterpret_cast<const void*>(values),
          reinterpret_cast<const int64_t*>(offsets),
          rows,
          cols,
          nullptr,
          tokens,
          reinterpret_cast<const void*>(bias),
          static_cast<Float>(bias_type),
          reinterpret_cast<void*>(y),
          static_cast<Float>(y_type)};
}

void check_tokens(int64_t tokens) {
  if (tokens < 1 || tokens > max_tokens) throw std::invalid_argument("tokens must be 1 to 16");
}

// A block of rows stays in the second-level cache from one group of tokens to the next.
constexpr int64_t block_rows = 64;

// What a thread takes at a time of a large matrix: long enough to read at full speed, short enough to end together.
constexpr int64_t step_bytes = int64_t{1} << 18;

// Rows of the matrix, cut into parts for the threads; small ones are not cut further.
template <class Cut, class Body>
void in_steps(int64_t rows, int64_t bytes, int64_t parts, const Cut& cut, const Body& body) {
  if (parts == 1 || bytes < 4 * parts * step_bytes)
    parallel_parts(parts, [&](int64_t i) { body(cut(i), cut(i + 1)); });
  else
    parallel_steps(parts, std::max<int64_t>(block_rows, rows * step_bytes / bytes), cut, body);
}

void run_rows(const LinearJob& job, const LinearRows::Rows* kernel, int64_t group, int64_t begin, int64_t end) {
  const int64_t block = job.tokens > group ? block_rows : end - begin;
  for (; begin < end; begin += block)
    for (int64_t t = 0; t < job.tokens; t += group) {
      LinearJob of_group = job;
      of_group.x += t * step_cols;
      of_group.y = static_cast<char*>(job.y) + t * job.rows * bytes_of(job.y_type);
      kernel[std::min(group, job.tokens - t) - 1](of_group, begin, std::min(end, begin + block));
    }
}

// The row where part i of `parts` starts, when a row costs its values and `row_cost`. Most matrices are even, so the
// search gallops from where an even one would be cut: a plain bisection misses the cache at every step.
int64_t first_row(const int64_t* offsets, int64_t rows, int64_t row_cost, int64_t value_cost, int64_t i,
                  int64_t parts) {
  if (i == 0) return 0;
  if (i == parts) return rows;  // those without cost too
  const auto cost = [=](int64_t row) { return static_cast<double>(offsets[row] * value_cost + row * row_cost); };
  const double wanted = cost(rows) * static_cast<double>(i) / static_cast<double>(parts);
  const auto before = [&](int64_t row) { return cost(row) < wanted; };
  int64_t low = 0, high = rows;  // the answer is in [low, high]
  const int64_t guess = rows * i / parts;
  int64_t step = 1;
  if (before(guess)) {
    for (low = guess + 1; low + step < rows && before(low + step); step *= 2) low += step + 1;
    high = std::min(rows, low + step);
  } else {
    for (high = guess; high - step > 0 && !before(high - step); step *= 2) high -= step;
    low = std::max<int64_t>(0, high - step);
  }
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (before(middle))
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// In the order that LinearRows::many takes; null if x holds Inf or NaN.
const float* prepared_many(const X& x, const LinearRows& isa, int threads) {
  const int64_t panels = (x.tokens + isa.panel - 1) / isa.panel;
  float* out = scratch(static_cast<size_t>(panels * isa.panel * std::max<int64_t>(1, x.cols)));
  std::atomic<bool> finite{true};
  const int64_t steps = std::max<int64_t>(1, (x.cols + step_cols - 1) / step_cols);
  const int64_t parts = std::min(steps, parts_for(x.cols * x.tokens * 4, threads));
  const auto cut = [&](int64_t i) { return i == parts ? x.cols : x.cols * i / parts / step_cols * step_cols; };
  parallel_parts(parts, [&](int64_t i) {
    const void* from = reinterpret_cast<const void*>(x.data);
    if (!isa.prepare_many(from, x.type, x.row_stride_bytes, x.cols, x.tokens, cut(i), cut(i + 1), out)) finite = false;
  });
  return finite ? out : nullptr;
}

void run_many(const LinearJob& job, LinearRows::Rows kernel, int threads) {
  // In bytes that would take as long to read: a value is multiplied by every token, a row has its sums.
  const int64_t value_cost = job.tokens / 4, row_cost = job.cols / 8 + job.tokens * 8;
  const int64_t bytes = job.offsets[job.rows] * value_cost + job.rows * row_cost;
  const int64_t parts = parts_for(bytes, threads);
  in_steps(
      job.rows, bytes, parts,
      [&](int64_t i) { return first_row(job.offsets, job.rows, row_cost, value_cost, i, parts); },
      [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

#ifdef GOSSAMER_X86
bool on_amx(const X& x, Float weights) {
  return weights == Float::bf16 && x.type == Float::bf16 && x.tokens >= amx_tokens && x.cols > 0 &&
         isa::active() == isa::Isa::avx512 && amx_usable();
}

// `job` comes without its x. The work is cut where tiles of rows end, so that none is half empty.
void bitmask_on_amx(LinearJob job, const X& x, int threads) {
  const int64_t padded = (x.cols + step_cols - 1) / step_cols * step_cols;
  float* prepared = scratch(static_cast<size_t>(padded * x.tokens / 2));
  amx_prepare(reinterpret_cast<const void*>(x.data), x.row_stride_bytes, x.cols, x.tokens, prepared);
  job.x = prepared;
  const int64_t row_cost = x.cols / 2;  // its mask, and what an expansion takes whatever the density
  const int64_t parts = parts_for(2 * job.offsets[job.rows] + job.rows * row_cost, threads);
  const auto cut = [&](int64_t i) {
    const int64_t row = first_row(job.offsets, job.rows, row_cost, 2, i, parts);
    return i == parts ? row : row / amx_rows * amx_rows;
  };
  parallel_parts(parts, [&](int64_t i) { amx_bitmask(job, cut(i), cut(i + 1)); });
}
#endif

}  // namespace

void bitmask_linear(uintptr_t mask, uintptr_t values, uintptr_t offsets, int type, int64_t rows, int64_t cols,
                    uintptr_t x, int x_type, int64_t x_row_stride_bytes, int64_t tokens, uintptr_t bias, int bias_type,
                    uintptr_t y, int threads) {
  check_tokens(tokens);
  const LinearRows& isa = kernels();
  const X input{x, static_cast<Float>(x_type), x_row_stride_bytes, tokens, cols};
  LinearJob job = job_of(mask, values, offsets, rows, cols, tokens, bias, bias_type, y, x_type);
  __builtin_prefetch(job.offsets + rows);  // the work is cut by what stands there
  __builtin_prefetch(job.offsets + rows / 2);
#ifdef GOSSAMER_X86
  if (on_amx(input, static_cast<Float>(type))) return bitmask_on_amx(job, input, threads);
#endif
  job.x = prepared(input, isa.prepare[type]);
  const int64_t value_cost = bytes_of(static_cast<Float>(type));
  // A row also costs its mask and the arithmetic on its zeros, which grows with the tokens.
  const int64_t row_cost = (cols + 7) / 8 * (2 + tokens);
  const int64_t bytes = job.offsets[rows] * value_cost + rows * row_cost;
  const int64_t parts = parts_for(bytes, threads);
  in_steps(
      rows, bytes, parts,
      [&](int64_t i) { return first_row(job.offsets, rows, row_cost, value_cost, i, parts); },
      [&](int64_t begin, int64_t end) { run_rows(job, isa.bitmask[type], isa.group, begin, end); });
}

bool bitmask_many(uintptr_t mask, uintptr_t values, uintptr_t offsets, int type, int64_t rows, int64_t cols,
                  uintptr_t x, int x_type, int64_t x_row_stride_bytes, int64_t tokens, uintptr_t bias, int bias_type,
                  uintptr_t y, int threads) {
  const LinearRows& isa = kernels();
  LinearJob job = job_of(mask, values, offsets, rows, cols, tokens, bias, bias_type, y, x_type);
  const int64_t at_once = many_panels * isa.panel;
  for (int64_t t = 0; t < tokens; t += at_once) {
    const X input{x + t * x_row_stride_bytes, job.y_type, x_row_stride_bytes, std::min(tokens - t, at_once), cols};
    LinearJob of_panels = job;
    of_panels.tokens = input.tokens;
    of_panels.y = static_cast<char*>(job.y) + t * rows * bytes_of(job.y_type);
    of_panels.x = prepared_many(input, isa, threads);
    if (!of_panels.x) return false;
    run_many(of_panels, isa.many[type], threads);
  }
  return true;
}

void dense_linear(uintptr_t weight, int type, int64_t rows, int64_t cols, uintptr_t x, int x_type,
                  int64_t x_row_stride_bytes, int64_t tokens, uintptr_t bias, int bias_type, uintptr_t y,
                  int threads) {
  check_tokens(tokens);
  const LinearRows& isa = kernels();
  const X input{x, static_cast<Float>(x_type), x_row_stride_bytes, tokens, cols};
  LinearJob job = job_of(0, weight, 0, rows, cols, tokens, bias, bias_type, y, x_type);
  job.x = prepared(input, isa.prepare[type]);
  const int64_t bytes = rows * cols * bytes_of(static_cast<Float>(type));
  const int64_t parts = std::max<int64_t>(1, std::min(rows, parts_for(bytes, threads)));
  in_steps(
      rows, bytes, parts, [=](int64_t i) { return rows * i / parts; },
      [&](int64_t begin, int64_t end) { run_rows(job, isa.dense[type], isa.group, begin, end); });
}

uint64_t sum_words(uintptr_t buffer, int64_t bytes, int threads) {
  const auto sum = kernels().sum;
  const int64_t lines = bytes / 64;
  std::atomic<uint64_t> total{0};
  parallel_rows(lines, bytes, threads, [&](int64_t begin, int64_t end) {
    total += sum(reinterpret_cast<const char*>(buffer) + begin * 64, (end - begin) * 64);
  });
  return total;
}

}  // namespace gossamer
