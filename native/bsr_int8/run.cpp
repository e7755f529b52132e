#include "run.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "../parallel.h"
#include "common.h"

#ifdef GOSSAMER_X86
#include <cpuid.h>
#endif

namespace gossamer::bsr {
namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
};

constexpr int unset = -1;
std::atomic<int> chosen{unset};

// Worst first.
std::vector<Level> levels() {
  std::vector<Level> found{{"scalar", &scalar_kernels}};
#ifdef GOSSAMER_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return found;
  found.push_back({"avx2", &avx2_kernels});
  unsigned eax = 0, ebx, ecx, edx;  // AVX-VNNI, for compilers whose builtin does not know it
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 16)) found.push_back({"avxvnni", &avxvnni_kernels});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni"))
    found.push_back({"avx512", &avx512_kernels});
#endif
  return found;
}

const std::vector<Level>& known() {
  static const std::vector<Level> found = levels();
  return found;
}

int parse(const std::string& wanted, const std::string& source) {
  std::string valid;
  for (int i = static_cast<int>(known().size()) - 1; i >= 0; --i) {
    if (wanted == known()[static_cast<size_t>(i)].name) return i;
    valid += (valid.empty() ? "" : ", ") + std::string(known()[static_cast<size_t>(i)].name);
  }
  throw std::invalid_argument(source + "=" + wanted + " is not an instruction set this CPU can run; choose one of: " +
                              valid);
}

const Level& active() {
  if (chosen == unset) {
    const char* wanted = std::getenv("GOSSAMER_ISA");
    chosen = wanted && *wanted ? parse(wanted, "GOSSAMER_ISA") : static_cast<int>(known().size()) - 1;
  }
  return known()[static_cast<size_t>(chosen.load())];
}

// What `parts_for` counts is memory traffic; a multiplication by a weight in vector code is worth an eighth of a byte.
constexpr int64_t products_per_byte = 8;

int64_t work(const Weights& a, const Input& x) {
  const int64_t tokens = (x.tokens + 15) / 16 * 16;
  if (x.layout == Layout::rows) return a.windows.starts[a.block_rows()] * 80 * std::max<int64_t>(1, x.tokens / 2);
  // The matrix unit is worth about four of the vector unit.
  if (a.panels.data) return a.block_rows() * 4 * a.cols * tokens / (4 * products_per_byte);
  return a.groups.starts[a.block_rows()] * 16 * tokens / products_per_byte;
}

// Memory for the length of a call, 64-byte aligned. A little is kept per thread: new pages would cost more than what
// fills them.
class Scratch {
  static constexpr size_t most_kept = size_t{4} << 20;
  struct Kept {
    std::unique_ptr<uint8_t[]> data;
    size_t size = 0;
  };
  std::unique_ptr<uint8_t[]> own;
  uint8_t* first;

 public:
  explicit Scratch(size_t size) {
    thread_local Kept kept;
    size += 64;
    if (size > most_kept) {
      own.reset(new uint8_t[size]);
    } else if (kept.size < size) {
      kept.data.reset(new uint8_t[size]);
      kept.size = size;
    }
    first = own ? own.get() : kept.data.get();
  }
  uint8_t* data() const { return first + (64 - reinterpret_cast<uintptr_t>(first) % 64) % 64; }
};

// Does each thread take token blocks from end to end? Not with AMX: there weights are expanded for all tokens at once.
bool by_blocks(const Weights& a, Layout layout, int64_t blocks, int threads) {
  return layout != Layout::rows && !a.panels.data && (blocks % threads == 0 || blocks >= 4 * threads);
}

// Cuts the block rows so that every part has about as many groups, or rows without `starts`, at multiples of `whole`.
int64_t cut(const int64_t* starts, int64_t block_rows, int64_t i, int64_t parts, int64_t whole) {
  if (i == parts) return block_rows;
  int64_t at = block_rows * i / parts;
  if (starts) at = std::lower_bound(starts, starts + block_rows, starts[block_rows] * i / parts) - starts;
  return std::min(block_rows, (at + whole / 2) / whole * whole);
}

using Run = void (*)(const Weights&, const Input&, const Output&, const Range&);

Run runner(const Weights& a, Layout layout) {
  if (layout == Layout::rows) return active().kernels->windows;
  if (!a.panels.data) return active().kernels->blocks;
#ifdef GOSSAMER_X86
  if (amx_usable()) return amx_blocks;
#endif
  throw std::runtime_error("these weights were packed for AMX, which this process cannot use; fix: pack them again");
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> out;
  for (auto level = known().rbegin(); level != known().rend(); ++level) out.emplace_back(level->name);
  return out;
}

std::string isa() { return active().name; }

void set_isa(const std::string& name) { chosen = parse(name, "set_isa: name"); }

void product(const Weights& a, const Input& x, const Output& out, int threads) {
  const Run run = runner(a, x.layout);
  const bool rows = x.layout == Layout::rows;
  const int64_t columns = rows ? x.tokens : blocks_of(x.tokens), block_rows = a.block_rows();
  const int64_t* starts = rows ? a.windows.starts : a.panels.data ? nullptr : a.groups.starts;
  const int64_t parts = parts_for(work(a, x), threads);
  // Rows first: then a thread reads each of its weights once for all tokens. Few rows are shared out with the tokens.
  const int64_t down = std::max<int64_t>(1, std::min(parts, block_rows / panel_rows));
  const int64_t across = std::max<int64_t>(1, std::min(columns, parts / down));
  parallel_parts(down * across, [&](int64_t i) {
    const int64_t r = i % down, t = i / down;
    run(a, x, out, {cut(starts, block_rows, r, down, panel_rows), cut(starts, block_rows, r + 1, down, panel_rows),
                    columns * t / across, columns * (t + 1) / across});
  });
}

void quantise(const Raw& x, Layout layout, float inverse, int zero, uint8_t* out, int64_t stride, float* scales,
              int threads) {
  const auto run = active().kernels->quantise;
  const int64_t count = layout == Layout::rows ? x.tokens : blocks_of(x.tokens);
  parallel_rows(count, x.tokens * x.channels * 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) run(x, layout, b, inverse, zero, out, stride, scales);
  });
}

void linear(const Weights& a, const Raw& x, Layout layout, uint8_t* scratch, int64_t stride, float* scales,
            const float* bias, void* y, int threads) {
  const Output out{y, x.type, Layout::rows, a.rows, 1.0f, 0, bias, nullptr, Type::f32, 0, Function::none};
  const Input in{scratch, layout, x.tokens, stride, 128, 1.0f, scales, nullptr, 0};
  const int64_t blocks = blocks_of(x.tokens);
  if (blocks == 0) return;
  if (!by_blocks(a, layout, blocks, threads)) {
    quantise(x, layout, 0.0f, 128, scratch, stride, scales, threads);
    return product(a, in, out, threads);
  }
  // What a thread quantised is still in its cache when it is multiplied, and while it multiplies, its next tokens come
  // closer.
  const auto quantise_block = active().kernels->quantise;
  const Run run = runner(a, layout);
  const int64_t block_bytes = block_start(layout, a.cols, 1), item = x.type == Type::f32 ? 4 : 2;
  const int64_t parts = std::min<int64_t>(parts_for(work(a, in), threads), blocks);
  parallel_parts(parts, [&](int64_t i) {
    for (int64_t b = blocks * i / parts; b < blocks * (i + 1) / parts; ++b) {
      const int64_t first = b * block_tokens, count = std::min(block_tokens, x.tokens - first);
      const int64_t next = std::min(block_tokens, x.tokens - first - count);
      const char* here = static_cast<const char*>(x.data) + first * x.stride * item;
      const Raw raw{here, x.type, count, x.channels, x.stride};
      quantise_block(raw, layout, 0, 0.0f, 128, scratch + i * block_bytes, stride, scales + first);
      const bool more = b + 1 < blocks * (i + 1) / parts && x.stride == x.channels;
      const Input one{scratch + i * block_bytes, layout, count, stride, 128, 1.0f, scales + first,
                      more ? here + block_tokens * x.stride * item : nullptr, next * x.stride * item};
      Output to = out;
      to.data = static_cast<char*>(y) + first * a.rows * item;
      run(a, one, to, {0, a.block_rows(), 0, 1});
    }
  });
}

void linear(const Weights& a, const Raw& x, const float* bias, void* y, int threads) {
  const Layout own = a.block == 4 || a.panels.data ? Layout::q : Layout::t;
  const Layout layout = x.tokens <= few_tokens ? Layout::rows : own;
  const int64_t stride = (a.cols + row_padding + 63) / 64 * 64, scales = (x.tokens * 4 + 63) / 64 * 64;
  const bool alone = by_blocks(a, layout, blocks_of(x.tokens), threads);
  const int64_t held = alone ? std::min(x.tokens, block_tokens * threads) : x.tokens;
  const int64_t past = 15 * 4 * block_tokens;  // quads after the last one that a matrix unit reads
  const int64_t size = layout == Layout::rows ? held * stride : block_start(layout, a.cols, blocks_of(held)) + past;
  const Scratch scratch(static_cast<size_t>(scales + size));
  linear(a, x, layout, scratch.data() + scales, stride, reinterpret_cast<float*>(scratch.data()), bias, y, threads);
}

}  // namespace gossamer::bsr
