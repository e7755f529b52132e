// The dense peer of bench_bsr_int8.py: oneDNN's int8 product, u8 by s8 to u8 with bias, weights in its own layout.
//
//     onednn_int8 SECONDS M K N [M K N ...]
//
// prints a JSON line for every shape: the better of its matmul and its inner product, microseconds a call: the median
// of the calling thread's CPU time, and the 5th percentile of wall time. OMP_NUM_THREADS and ONEDNN_MAX_CPU_ISA apply.
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"

using namespace dnnl;
using Args = std::unordered_map<int, memory>;

namespace {

double now(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return 1e6 * static_cast<double>(t.tv_sec) + 1e-3 * static_cast<double>(t.tv_nsec);
}

struct Time {
  double cpu, wall;
};

template <class Call>
Time measure(double seconds, const Call& call) {
  std::vector<double> cpu, wall;
  for (int i = 0; i < 3; ++i) call();
  const double stop = now(CLOCK_MONOTONIC) + 1e6 * seconds;
  while (cpu.size() < 7 || now(CLOCK_MONOTONIC) < stop) {
    const double c = now(CLOCK_THREAD_CPUTIME_ID), w = now(CLOCK_MONOTONIC);
    call();
    wall.push_back(now(CLOCK_MONOTONIC) - w);
    cpu.push_back(now(CLOCK_THREAD_CPUTIME_ID) - c);
  }
  std::sort(cpu.begin(), cpu.end());
  std::sort(wall.begin(), wall.end());
  return {cpu[cpu.size() / 2], wall[wall.size() / 20]};
}

memory filled(const engine& engine, const memory::desc& desc, int low, int high) {
  memory m(desc, engine);
  auto* bytes = static_cast<uint8_t*>(m.get_data_handle());
  for (size_t i = 0; i < desc.get_size(); ++i)
    bytes[i] = static_cast<uint8_t>(low + static_cast<int>(i * 2654435761u >> 13) % (high - low));
  return m;
}

memory scalar(const engine& engine, float value) {
  memory m({{1}, memory::data_type::f32, memory::format_tag::a}, engine);
  *static_cast<float*>(m.get_data_handle()) = value;
  return m;
}

template <class Primitive>
Time run(const engine& engine, stream& stream, double seconds, const Primitive& primitive, const memory& x,
         const memory& plain, const memory::desc& bias, const memory::desc& out) {
  memory weights(primitive.weights_desc(), engine), y(out, engine), b(bias, engine);
  std::fill_n(static_cast<float*>(b.get_data_handle()), bias.get_size() / 4, 0.5f);
  reorder(plain, weights).execute(stream, const_cast<memory&>(plain), weights);
  stream.wait();
  memory scratch(primitive.scratchpad_desc(), engine);
  const Args args{{DNNL_ARG_SRC, x}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_BIAS, b}, {DNNL_ARG_DST, y},
                  {DNNL_ARG_SCRATCHPAD, scratch}, {DNNL_ARG_ATTR_SCALES | DNNL_ARG_WEIGHTS, scalar(engine, 0.01f)}};
  const dnnl::primitive call(primitive);
  return measure(seconds, [&] {
    call.execute(stream, args);
    stream.wait();
  });
}

}  // namespace

int main(int argc, char** argv) {
  using dt = memory::data_type;
  using tag = memory::format_tag;
  engine engine(engine::kind::cpu, 0);
  stream stream(engine);
  primitive_attr attr;
  attr.set_scales_mask(DNNL_ARG_WEIGHTS, 0);
  attr.set_scratchpad_mode(scratchpad_mode::user);
  for (int i = 2; i + 2 < argc; i += 3) {
    const memory::dim m = std::atoll(argv[i]), k = std::atoll(argv[i + 1]), n = std::atoll(argv[i + 2]);
    const double seconds = std::atof(argv[1]) / 2;
    const memory x = filled(engine, {{n, k}, dt::u8, tag::ab}, 0, 256);
    const memory::desc bias2({1, m}, dt::f32, tag::ab), bias1({m}, dt::f32, tag::a), out({n, m}, dt::u8, tag::ab);
    const matmul::primitive_desc one(engine, {{n, k}, dt::u8, tag::ab}, {{k, m}, dt::s8, tag::any}, bias2, out, attr);
    const Time a = run(engine, stream, seconds, one, x, filled(engine, {{k, m}, dt::s8, tag::ba}, -100, 100), bias2, out);
    const inner_product_forward::primitive_desc two(engine, prop_kind::forward_inference, {{n, k}, dt::u8, tag::ab},
                                                    {{m, k}, dt::s8, tag::any}, bias1, out, attr);
    const Time b = run(engine, stream, seconds, two, x, filled(engine, {{m, k}, dt::s8, tag::ab}, -100, 100), bias1, out);
    std::printf("{\"m\": %lld, \"k\": %lld, \"n\": %lld, \"cpu\": %.2f, \"wall\": %.2f, \"impl\": \"%s\"}\n",
                static_cast<long long>(m), static_cast<long long>(k), static_cast<long long>(n), std::min(a.cpu, b.cpu),
                std::min(a.wall, b.wall), a.cpu < b.cpu ? one.impl_info_str() : two.impl_info_str());
    std::fflush(stdout);
  }
}
