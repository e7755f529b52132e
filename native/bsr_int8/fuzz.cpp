// Random matrices, sizes, layouts and epilogues on every instruction set, in memory of exactly the size that is
// promised: all must agree with the scalar code. Built with sanitizers by tests/sanitize_bsr.sh; arguments: rounds,
// seed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common.h"
#include "pack.h"
#include "run.h"

using namespace gossamer::bsr;

namespace {

std::mt19937 random_bits;

int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }

// On the heap, so that the sanitizer sees what is read or written past its end.
template <class T>
using Memory = std::vector<T>;

struct Matrix {
  int64_t rows, cols;
  int block;
  Memory<int64_t> starts{0};
  Memory<int32_t> columns;
  Memory<int8_t> data;
  Blocks blocks() const {
    return {static_cast<int64_t>(starts.size()) - 1, cols, block, starts.data(), columns.data(), data.data()};
  }
};

Matrix random_matrix() {
  const int64_t wide = below(10);
  const int64_t cols = wide < 2 ? 8192 + below(200) : wide < 4 ? 700 + below(900) : below(300);
  Matrix a{below(80), cols, below(2) ? 1 : 4, {0}, {}, {}};
  const int64_t across = (a.cols + a.block - 1) / a.block, keep = below(11);
  for (int64_t row = 0; row < (a.rows + 3) / 4; ++row) {
    for (int64_t c = 0; c < across; ++c) {
      if (below(10) >= keep) continue;
      a.columns.push_back(static_cast<int32_t>(c));
      for (int64_t r = 0; r < 4; ++r)
        for (int64_t j = 0; j < a.block; ++j)
          a.data.push_back(
              4 * row + r < a.rows && c * a.block + j < a.cols ? static_cast<int8_t>(below(255) - 127) : 0);
    }
    a.starts.push_back(static_cast<int64_t>(a.columns.size()));
  }
  return a;
}

struct Packed {
  Memory<int64_t> groups, windows;
  Memory<int8_t> group_data, window_data, panels;
  Memory<uint16_t> narrow;
  Memory<uint32_t> wide, base;
  Memory<uint8_t> index;
  Memory<float> scale;
  Memory<int32_t> sums;
  Weights weights;
};

Packed pack(const Matrix& a, bool panels) {
  const Blocks b = a.blocks();
  check(b);
  Packed p{};
  p.groups.resize(a.starts.size());
  p.windows.resize(a.starts.size());
  count_groups(b, p.groups.data());
  count_windows(b, p.windows.data());
  const auto many = static_cast<size_t>(p.groups.back()), few = static_cast<size_t>(p.windows.back());
  const bool wide = a.cols >= 8192;
  void* offsets = nullptr;
  if (panels) {
    p.panels.resize(static_cast<size_t>(panel_bytes(b)));
    fill_panels(b, p.panels.data());
  } else {
    p.group_data.resize(16 * many + 1);
    p.narrow.resize(many * 4 + 1);
    p.wide.resize(many * 4 + 1);
    offsets = wide ? static_cast<void*>(p.wide.data()) : p.narrow.data();
    fill_groups(b, p.groups.data(), wide, p.group_data.data(), offsets);
  }
  p.window_data.resize(64 * few + 1);
  p.index.resize(16 * few + 1);
  p.base.resize(few + 1);
  fill_windows(b, p.windows.data(), p.window_data.data(), p.index.data(), p.base.data());
  const auto padded = static_cast<size_t>((a.rows + 15) / 16 * 16);
  p.sums.resize(padded);
  p.scale.resize(padded);
  if (!p.sums.empty()) sum_rows(b, p.sums.data());
  for (int64_t r = 0; r < a.rows; ++r) p.scale[static_cast<size_t>(r)] = 0.001f * static_cast<float>(below(100));
  p.weights = {a.rows, a.cols, a.block,
               {p.group_data.data(), offsets, p.groups.data(), wide},
               {panels ? p.panels.data() : nullptr, (a.cols + 63) / 64},
               {p.window_data.data(), p.index.data(), p.base.data(), p.windows.data()},
               p.scale.data(), p.sums.data()};
  return p;
}

int64_t stride_of(int64_t channels) { return (channels + 128 + 63) / 64 * 64; }

size_t elements(Layout layout, int64_t tokens, int64_t channels) {
  if (layout == Layout::rows) return static_cast<size_t>(tokens * stride_of(channels));
  const int64_t last = blocks_of(tokens) - 1;
  const int64_t padded = tokens ? last * block_tokens + width_of(tokens, last) : 0;
  if (layout == Layout::t) return static_cast<size_t>(padded * channels);
  return static_cast<size_t>(padded * ((channels + 3) / 4) * 4 + (tokens ? 15 * 4 * 64 : 0));
}

float random_float() {
  switch (below(40)) {
    case 0: return 0.0f;
    case 1: return 1e30f;
    case 2: return -1e-39f;
    case 3: return below(20) ? 1.0f : std::nanf("");
    case 4: return below(20) ? -1.0f : HUGE_VALF;
    default: return static_cast<float>(below(2001) - 1000) * 0.003f;
  }
}

Memory<uint8_t> random_floats(size_t count, Type type) {
  Memory<uint8_t> out(count * (type == Type::f32 ? 4 : 2));
  for (size_t i = 0; i < count; ++i) {
    const float v = random_float();
    const uint16_t half = to_bf16(v);
    if (type == Type::f32) std::memcpy(out.data() + 4 * i, &v, 4);
    else std::memcpy(out.data() + 2 * i, &half, 2);
  }
  return out;
}

size_t item(Type type) { return type == Type::f32 ? 4 : type == Type::bf16 ? 2 : 1; }

void require(bool yes, const char* what) {
  if (yes) return;
  std::fprintf(stderr, "%s differs\n", what);
  std::abort();
}

// Approximated functions may differ in the last bits, or by one step of rounding.
bool near(const Memory<uint8_t>& one, const Memory<uint8_t>& two, const Output& out, int64_t rows, int64_t tokens) {
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = place(out.layout, rows, out.stride, tokens, row, token);
      if (out.type == Type::u8 || out.type == Type::s8) {
        const uint8_t a = one[static_cast<size_t>(at)], b = two[static_cast<size_t>(at)];
        if (std::abs(static_cast<int8_t>(a - b)) > (out.function == Function::none ? 0 : 1)) return false;
      } else {
        const float a = load_float(one.data(), out.type, at), b = load_float(two.data(), out.type, at);
        if (std::isnan(a) != std::isnan(b) && out.function == Function::none) return false;
        const float step = out.type == Type::f32 ? 1e-5f : 8e-3f;
        const float slack = out.function == Function::none ? 0.0f : 1e-5f + std::fabs(a) * step;
        if (std::isfinite(a) && std::isfinite(b) && std::fabs(a - b) > slack) return false;
      }
    }
  return true;
}

void one_round() {
  const Matrix a = random_matrix();
  const int64_t tokens = below(3) == 0 ? below(6) : below(300), pad = below(3);
  const int threads = static_cast<int>(1 + below(4));
  const Type type = below(2) ? Type::f32 : Type::bf16;
  const auto count = static_cast<size_t>(tokens * (a.cols + pad));
  const Memory<uint8_t> x = random_floats(count, type);
  const Raw raw{x.data(), type, tokens, a.cols, a.cols + pad};

  const Layout own = a.block == 4 ? Layout::q : Layout::t;
  const Layout layout = tokens < 20 && below(2) ? Layout::rows : own;
  const bool dynamic = below(2);
  const int zero = dynamic ? 128 : static_cast<int>(below(256));

  Output out{nullptr, static_cast<Type>(below(4)), Layout::rows, 0, 0.5f, 0, nullptr, nullptr, Type::f32, 0,
             static_cast<Function>(below(5))};
  const bool bytes = out.type == Type::u8 || out.type == Type::s8;
  if (out.type == Type::bf16 || layout == Layout::rows) out.layout = Layout::rows;
  else out.layout = bytes ? static_cast<Layout>(below(2)) : below(2) ? Layout::rows : Layout::t;
  out.stride = bytes ? stride_of(a.rows) : a.rows;
  out.zero = bytes ? static_cast<int>(below(100)) : 0;
  Memory<float> bias(static_cast<size_t>(a.rows));
  for (float& b : bias) b = static_cast<float>(below(100)) - 50;
  if (below(2)) out.bias = bias.data();
  const auto dense = static_cast<size_t>(tokens * a.rows);
  const size_t size = out.layout == Layout::rows && !bytes ? dense : elements(out.layout, tokens, a.rows);
  Memory<uint8_t> residual;
  if (below(2) && out.layout != Layout::q) {
    out.residual_type = out.layout == Layout::rows && below(2) ? Type::bf16 : Type::f32;
    out.residual_stride = a.rows;
    residual = random_floats(out.layout == Layout::rows ? dense : size, out.residual_type);
    out.residual = residual.data();
  }

  const uint32_t seed = random_bits();
  Memory<uint8_t> expected, expected_linear;
  std::vector<std::string> names = isas();
#ifdef GOSSAMER_X86
  if (amx_usable()) names.insert(names.begin(), "amx");
#endif
  for (auto name = names.rbegin(); name != names.rend(); ++name) {
    const bool panels = *name == "amx";
    if (!panels) set_isa(*name);
    random_bits.seed(seed);
    const Packed p = pack(a, panels);
    const Layout in_layout = layout == Layout::rows ? layout : panels ? Layout::q : own;
    Memory<uint8_t> q(elements(in_layout, tokens, a.cols));
    Memory<float> scales(static_cast<size_t>(tokens));
    quantise(raw, in_layout, dynamic ? 0.0f : 40.0f, zero, q.data(), stride_of(a.cols), scales.data(), threads);
    const float* own_scales = dynamic ? scales.data() : nullptr;
    const Input in{q.data(), in_layout, tokens, stride_of(a.cols), zero, 0.02f, own_scales, nullptr, 0};
    Memory<uint8_t> result(size * item(out.type));
    Output to = out;
    to.data = result.data();
    product(p.weights, in, to, threads);
    if (expected.empty()) expected = result;
    require(near(expected, result, out, a.rows, tokens), name->c_str());

    Memory<uint8_t> y(static_cast<size_t>(tokens * a.rows) * item(type)), scratch(elements(in_layout, tokens, a.cols));
    linear(p.weights, raw, in_layout, scratch.data(), stride_of(a.cols), scales.data(), out.bias, y.data(), threads);
    if (expected_linear.empty()) expected_linear = y;
    const Output plain{nullptr, type, Layout::rows, a.rows, 1, 0, nullptr, nullptr, Type::f32, 0, Function::none};
    require(near(expected_linear, y, plain, a.rows, tokens), (*name + " linear").c_str());
    linear(p.weights, raw, out.bias, y.data(), threads);
    require(near(expected_linear, y, plain, a.rows, tokens), (*name + " linear, own memory").c_str());
  }

  if (a.columns.empty()) return;
  Matrix damaged = a;
  const auto where = static_cast<size_t>(below(static_cast<int64_t>(a.columns.size())));
  damaged.columns[where] = below(2) ? -1 : 1 << 20;
  try {
    check(damaged.blocks());
    require(false, "a damaged column");
  } catch (const std::invalid_argument&) {
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 300;
  random_bits.seed(argc > 2 ? static_cast<uint32_t>(std::atoi(argv[2])) : 1);
  std::mt19937 rounds_seed(random_bits());
  for (int i = 0; i < rounds; ++i) {
    random_bits.seed(rounds_seed());
    one_round();
  }
  std::printf("%d rounds\n", rounds);
}
