#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bitmask.h"
#include "isa.h"

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
}
