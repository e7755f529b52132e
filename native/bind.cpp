#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bitmask.h"
#include "isa.h"
#include "launch.h"
#include "linear.h"
#include "pages.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gossamer;

NB_MODULE(_native, m) {
  const auto nogil = nb::call_guard<nb::gil_scoped_release>();
  m.doc() = "CPU kernels of Gossamer over raw pointers; gossamer.native is the typed, checked way in.";

  m.def("isas", isa::supported, "The instruction sets this CPU can run, best first.");
  m.def("isa", [] { return isa::name(isa::active()); }, "The instruction set in use: GOSSAMER_ISA, else the best.");
  m.def("set_isa", isa::set, "name"_a, "Use this instruction set from now on, in every thread.");

  m.def("bitmask_count", bitmask_count, "src"_a, "rows"_a, "cols"_a, "row_stride_bytes"_a, "itemsize"_a, "is_float"_a,
        "counts"_a, "threads"_a, nogil, "Non-zeros per row, int64.");
  m.def("bitmask_pack", bitmask_pack, "src"_a, "rows"_a, "cols"_a, "row_stride_bytes"_a, "itemsize"_a, "is_float"_a,
        "mask"_a, "offsets"_a, "values"_a, "threads"_a, nogil,
        "Writes mask [rows, ceil(cols / 8)] and values; offsets [rows + 1] are where each row's values start.");
  m.def("bitmask_unpack", bitmask_unpack, "mask"_a, "values"_a, "offsets"_a, "rows"_a, "cols"_a, "itemsize"_a, "dst"_a,
        "dst_row_stride_bytes"_a, "threads"_a, nogil, "The inverse of bitmask_pack, with zeros elsewhere.");
  m.def("bitmask_unpack_bf16_f32", bitmask_unpack_bf16_f32, "mask"_a, "values"_a, "offsets"_a, "rows"_a, "cols"_a,
        "dst"_a, "dst_row_stride_bytes"_a, "threads"_a, nogil, "bitmask_unpack of bfloat16 values into float32.");
  m.def("popcount_rows", popcount_rows, "mask"_a, "rows"_a, "row_bytes"_a, "counts"_a, "threads"_a, nogil,
        "Set bits per row, int64.");

  m.def("bitmask_linear", bitmask_linear, "mask"_a, "values"_a, "offsets"_a, "type"_a, "rows"_a, "cols"_a, "x"_a,
        "x_type"_a, "x_row_stride_bytes"_a, "tokens"_a, "bias"_a, "bias_type"_a, "y"_a, "threads"_a, nogil,
        "y [tokens, rows] = x A^T + bias; tokens 1 to 16, types 0 = float32, 1 = bfloat16, y's that of x.");
  m.def("bitmask_many", bitmask_many, "mask"_a, "values"_a, "offsets"_a, "type"_a, "rows"_a, "cols"_a, "x"_a, "x_type"_a,
        "x_row_stride_bytes"_a, "tokens"_a, "bias"_a, "bias_type"_a, "y"_a, "threads"_a, nogil,
        "bitmask_linear of any number of tokens that multiplies no zeros; False, and no y, where x is not finite.");
  m.def("dense_linear", dense_linear, "weight"_a, "type"_a, "rows"_a, "cols"_a, "x"_a, "x_type"_a,
        "x_row_stride_bytes"_a, "tokens"_a, "bias"_a, "bias_type"_a, "y"_a, "threads"_a, nogil,
        "bitmask_linear of a dense [rows, cols].");
  m.def("sum_words", sum_words, "buffer"_a, "bytes"_a, "threads"_a, nogil,
        "The sum of the 64-bit words of a buffer of whole cache lines, modulo 2^64.");
  m.def("move_to_huge_pages", move_to_huge_pages, "begin"_a, "bytes"_a, nogil,
        "Moves memory onto huge pages without changing its address; False where the system would not.");
  m.def("cuda_launch", cuda_launch, "launch"_a, "function"_a, "kinds"_a, "stream"_a, "shared"_a, "grid"_a, "block"_a,
        "values"_a, "cuLaunchKernel, which lies at the address `launch`; its error, 0 if none.");
  m.def("cslt_matmul", cslt_matmul, "matmul"_a, "handle"_a, "plan"_a, "numbers"_a, "a"_a, "b"_a, "d"_a, "space"_a,
        "stream"_a, "cusparseLtMatmul, which lies at the address `matmul`, with C = D; its status, 0 if all is well.");
  m.def("threads_of", threads_of, "Whose threads do the work: openmp (those of torch) or threads (made for the call).");
}
