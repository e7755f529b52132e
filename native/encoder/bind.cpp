#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>


#include "../bsr_int8/run.h"
#include "forward.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace gossamer::encoder;
namespace bsr = gossamer::bsr;

namespace {

template <class T>
T* at(uintptr_t pointer) {
  return reinterpret_cast<T*>(pointer);
}

Linear linear(int64_t rows, int64_t cols, int block, uintptr_t panels, uintptr_t starts, uintptr_t data,
              uintptr_t offsets, bool wide, uintptr_t scale, uintptr_t sums, uintptr_t bias, uintptr_t factors) {
  Linear out{};
  out.weights.rows = rows;
  out.weights.cols = cols;
  out.weights.block = block;
  out.weights.groups = {at<const int8_t>(data), at<const void>(offsets), at<const int64_t>(starts), wide};
  out.weights.panels = {at<const int8_t>(panels), (cols + 63) / 64};
  out.weights.scale = at<const float>(scale);
  out.weights.sums = at<const int32_t>(sums);
  out.bias = at<const float>(bias);
  out.factors = at<const float>(factors);
  return out;
}

Norm norm(uintptr_t weight, uintptr_t bias, float eps) { return {at<const float>(weight), at<const float>(bias), eps}; }

Layer layer(const Linear& qkv, const Linear& out, const Linear& up, const Linear& down, const Norm& attention_norm,
            const Norm& output_norm, uintptr_t score_scale, uintptr_t value_scale, int function, float least) {
  return {qkv, out, up, down, attention_norm, output_norm, at<const float>(score_scale), at<const float>(value_scale),
          static_cast<bsr::Function>(function), least};
}

Embeddings embeddings(uintptr_t words, int64_t word_rows, uintptr_t positions, int64_t position_rows, uintptr_t types,
                      int64_t type_rows, int64_t pad, const Norm& norm) {
  return {at<const uint16_t>(words), at<const uint16_t>(positions), at<const uint16_t>(types),
          word_rows, position_rows, type_rows, pad, norm};
}

void make(Encoder* self, int64_t hidden, int64_t heads, int64_t intermediate, const Embeddings& embeddings,
          const std::vector<Layer>& layers) {
  new (self) Encoder({hidden, heads, intermediate, embeddings, layers});
}

void run(Encoder& self, int64_t sentences, int64_t length, uintptr_t mask, uintptr_t ids, uintptr_t types,
         uintptr_t positions, uintptr_t rows, uintptr_t out, int threads, uintptr_t times) {
  self.run({sentences, length, at<const int64_t>(mask), at<const int64_t>(ids), at<const int64_t>(types),
            at<const int64_t>(positions), at<const float>(rows), at<float>(out)},
           threads, at<double>(times));
}

}  // namespace

NB_MODULE(_encoder, m) {
  const auto nogil = nb::call_guard<nb::gil_scoped_release>();
  m.doc() = "The int8 encoder over raw pointers; gossamer.encoder is the typed, checked way in.";

  m.def("isa", bsr::isa, "The instruction set in use: GOSSAMER_ISA, else the best.");
  m.def("set_isa", bsr::set_isa, "name"_a, "Use this instruction set from now on, in every thread.");
  m.def("stages", [] { return std::vector<std::string>(stage_names, stage_names + stages); },
        "What the times of `Encoder.run` are of.");

  nb::class_<Linear>(m, "Linear", "Weights with a bias; whoever has one keeps the memory behind it.")
      .def_prop_ro("layout", [](const Linear& self) { return static_cast<int>(self.layout()); });
  m.def("linear", linear, "rows"_a, "cols"_a, "block"_a, "panels"_a, "starts"_a, "data"_a, "offsets"_a, "wide"_a,
        "scale"_a, "sums"_a, "bias"_a, "factors"_a, "Groups, or where `panels` is not 0 those.");
  nb::class_<Norm>(m, "Norm", "A layer normalisation.");
  m.def("norm", norm, "weight"_a, "bias"_a, "eps"_a, "Weight and bias are float32.");
  nb::class_<Layer>(m, "Layer", "A layer of the encoder.");
  m.def("layer", layer, "qkv"_a, "out"_a, "up"_a, "down"_a, "attention_norm"_a, "output_norm"_a, "score_scale"_a,
        "value_scale"_a, "function"_a, "least"_a, "See native/encoder/encoder.h.");
  nb::class_<Embeddings>(m, "Embeddings", "Tables in bfloat16.");
  m.def("embeddings", embeddings, "words"_a, "word_rows"_a, "positions"_a, "position_rows"_a, "types"_a,
        "type_rows"_a, "pad"_a, "norm"_a, "See native/encoder/encoder.h.");

  nb::class_<Encoder>(m, "Encoder", "A forward pass in one call; threads may call it at the same time.")
      .def("__init__", make, "hidden"_a, "heads"_a, "intermediate"_a, "embeddings"_a, "layers"_a)
      .def("run", run, "sentences"_a, "length"_a, "mask"_a, "ids"_a, "types"_a, "positions"_a, "rows"_a, "out"_a,
           "threads"_a, "times"_a, nogil,
           "float32 [sentences, length, hidden] to `out`; IndexError for what the tables do not have.");
}
