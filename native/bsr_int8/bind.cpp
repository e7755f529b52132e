#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "pack.h"
#include "run.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gossamer::bsr;

namespace {

template <class T>
T* at(uintptr_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

Blocks blocks(int64_t block_rows, int64_t cols, int block, uintptr_t starts, uintptr_t columns, uintptr_t data) {
  return {block_rows, cols, block, at<const int64_t>(starts), at<const int32_t>(columns), at<const int8_t>(data)};
}

// The bytes of panels.
int64_t count(int64_t block_rows, int64_t cols, int block, uintptr_t starts, uintptr_t columns, uintptr_t groups,
           uintptr_t windows) {
  const Blocks a = blocks(block_rows, cols, block, starts, columns, 0);
  check(a);
  count_groups(a, at<int64_t>(groups));
  count_windows(a, at<int64_t>(windows));
  return panel_bytes(a);
}

// Null: panels, or groups, are not wanted.
void fill(int64_t block_rows, int64_t cols, int block, uintptr_t starts, uintptr_t columns, uintptr_t data,
          uintptr_t panels, uintptr_t groups, uintptr_t group_data, uintptr_t offsets, bool wide, uintptr_t windows,
          uintptr_t window_data, uintptr_t index, uintptr_t base, uintptr_t sums) {
  const Blocks a = blocks(block_rows, cols, block, starts, columns, data);
  if (panels) fill_panels(a, at<int8_t>(panels));
  else fill_groups(a, at<const int64_t>(groups), wide, at<int8_t>(group_data), at<void>(offsets));
  fill_windows(a, at<const int64_t>(windows), at<int8_t>(window_data), at<uint8_t>(index), at<uint32_t>(base));
  sum_rows(a, at<int32_t>(sums));
}

Weights weights(int64_t rows, int64_t cols, int block, uintptr_t panels, uintptr_t groups, uintptr_t group_data,
                uintptr_t offsets, bool wide, uintptr_t windows, uintptr_t window_data, uintptr_t index, uintptr_t base,
                uintptr_t scale, uintptr_t sums) {
  return {rows, cols, block,
          {at<const int8_t>(group_data), at<const void>(offsets), at<const int64_t>(groups), wide},
          {at<const int8_t>(panels), (cols + 63) / 64},
          {at<const int8_t>(window_data), at<const uint8_t>(index), at<const uint32_t>(base),
           at<const int64_t>(windows)},
          at<const float>(scale), at<const int32_t>(sums)};
}

void quantise_raw(uintptr_t x, int type, int64_t tokens, int64_t channels, int64_t stride, int layout, float inverse,
                  int zero, uintptr_t out, int64_t out_stride, uintptr_t scales, int threads) {
  quantise({at<const void>(x), static_cast<Type>(type), tokens, channels, stride}, static_cast<Layout>(layout), inverse,
           zero, at<uint8_t>(out), out_stride, at<float>(scales), threads);
}

void run(const Weights& a, uintptr_t x, int layout, int64_t tokens, int64_t stride, int zero, float scale,
         uintptr_t token_scale, uintptr_t out, int type, int out_layout, int64_t out_stride, float inverse,
         int out_zero, uintptr_t bias, uintptr_t residual, int residual_type, int64_t residual_stride, int function,
         int threads) {
  const Input in{at<const uint8_t>(x), static_cast<Layout>(layout), tokens, stride, zero, scale,
                 at<const float>(token_scale), nullptr, 0};
  const Output to{at<void>(out), static_cast<Type>(type), static_cast<Layout>(out_layout), out_stride, inverse,
                  out_zero, at<const float>(bias), at<const void>(residual), static_cast<Type>(residual_type),
                  residual_stride, static_cast<Function>(function)};
  product(a, in, to, threads);
}

void linear_raw(const Weights& a, uintptr_t x, int type, int64_t tokens, int64_t stride, uintptr_t bias, uintptr_t y,
                int threads) {
  linear(a, {at<const void>(x), static_cast<Type>(type), tokens, a.cols, stride}, at<const float>(bias), at<void>(y),
         threads);
}

}  // namespace

NB_MODULE(_bsr, m) {
  const auto nogil = nb::call_guard<nb::gil_scoped_release>();
  m.doc() = "Block-sparse int8 products over raw pointers; gossamer.kernels.cpu_bsr_int8 is the typed, checked way in.";

  m.def("isas", isas, "The instruction sets this CPU can run, best first.");
  m.def("isa", isa, "The instruction set in use: GOSSAMER_ISA, else the best.");
  m.def("set_isa", set_isa, "name"_a, "Use this instruction set from now on, in every thread.");

#ifdef GOSSAMER_X86
  m.def("amx", amx_usable, "Can this process use AMX for int8?");
#else
  m.def("amx", [] { return false; }, "Can this process use AMX for int8?");
#endif
  m.def("count", count, "block_rows"_a, "cols"_a, "block"_a, "starts"_a, "columns"_a, "groups"_a, "windows"_a, nogil,
        "Checks the columns; writes where the groups and windows of each block row start, int64; gives the bytes of "
        "panels.");
  m.def("fill", fill, "block_rows"_a, "cols"_a, "block"_a, "starts"_a, "columns"_a, "data"_a, "panels"_a,
        "groups"_a, "group_data"_a, "offsets"_a, "wide"_a, "windows"_a, "window_data"_a, "index"_a, "base"_a, "sums"_a,
        nogil, "Writes the groups, or where `panels` is not 0 those, the windows and the sums of the rows.");

  nb::class_<Weights>(m, "Weights", "Packed weights; whoever has one keeps the memory behind it.");
  m.def("weights", weights, "rows"_a, "cols"_a, "block"_a, "panels"_a, "groups"_a, "group_data"_a, "offsets"_a,
        "wide"_a, "windows"_a, "window_data"_a, "index"_a, "base"_a, "scale"_a, "sums"_a,
        "What `count` and `fill` made, together; panels 0: groups.");

  m.def("quantise", quantise_raw, "x"_a, "type"_a, "tokens"_a, "channels"_a, "stride"_a, "layout"_a, "inverse"_a,
        "zero"_a, "out"_a, "out_stride"_a, "scales"_a, "threads"_a, nogil,
        "Row-major floats to uint8 in a layout (0 = t, 1 = q, 2 = rows); inverse 0: per token, scales are written.");
  m.def("run", run, "weights"_a, "x"_a, "layout"_a, "tokens"_a, "stride"_a, "zero"_a, "scale"_a, "token_scale"_a,
        "out"_a, "type"_a, "out_layout"_a, "out_stride"_a, "inverse"_a, "out_zero"_a, "bias"_a, "residual"_a,
        "residual_type"_a, "residual_stride"_a, "function"_a, "threads"_a, nogil,
        "The product of quantised activations with an epilogue.");
  m.def("linear", linear_raw, "weights"_a, "x"_a, "type"_a, "tokens"_a, "stride"_a, "bias"_a, "y"_a,
        "threads"_a, nogil,
        "y [tokens, rows] = x A^T + bias, x quantised per token on the way.");
}
