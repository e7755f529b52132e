// A launch of a CUDA kernel through the driver's own cuLaunchKernel, whose address comes from Python: no CUDA header and
// no CUDA library is needed to build this. Its parameters are put together here, on the stack of the calling thread.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace gossamer {

// One parameter of 4 or 8 bytes, at the address `to`. `kind`: a character of Python's `struct`.
inline void put_parameter(char kind, nanobind::handle value, uint64_t* to) {
  const auto put = [to](auto number) { std::memcpy(to, &number, sizeof number); };
  switch (kind) {
    case 'i': return put(nanobind::cast<int32_t>(value));
    case 'I': return put(nanobind::cast<uint32_t>(value));
    case 'q': return put(nanobind::cast<int64_t>(value));
    case 'P':
    case 'Q': return put(nanobind::cast<uint64_t>(value));
    case 'f': return put(nanobind::cast<float>(value));
    case 'd': return put(nanobind::cast<double>(value));
  }
  throw std::invalid_argument("cuda_launch: a kind of parameter is none of i, I, q, Q, P, f, d, T");
}

// `values`: one per character of `kinds`; T is a tensor map, as bytes. Grid and block are three sizes each.
inline int cuda_launch(uintptr_t launch, uintptr_t function, const char* kinds, uintptr_t stream, unsigned shared,
                       nanobind::tuple grid, nanobind::tuple block, nanobind::args values) {
  using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                         void**);
  constexpr size_t MOST = 32;
  const size_t count = values.size();
  if (count != std::strlen(kinds) || count > MOST)
    throw std::invalid_argument("cuda_launch: the parameters are not as many as the kernel takes, or over 32");
  if (grid.size() != 3 || block.size() != 3) throw std::invalid_argument("cuda_launch: grid and block have 3 sizes");
  uint64_t slots[MOST];
  void* table[MOST];
  for (size_t i = 0; i < count; ++i) {
    table[i] = &slots[i];
    if (kinds[i] == 'T') {
      const auto map = nanobind::cast<nanobind::bytes>(values[i]);  // `values` keeps it alive
      if (map.size() != 128) throw std::invalid_argument("cuda_launch: a tensor map has 128 bytes");
      table[i] = const_cast<void*>(map.data());
      continue;
    }
    put_parameter(kinds[i], values[i], &slots[i]);
  }
  unsigned sizes[6];
  for (size_t i = 0; i < 6; ++i) sizes[i] = nanobind::cast<unsigned>(i < 3 ? grid[i] : block[i - 3]);
  const nanobind::gil_scoped_release nogil;
  return reinterpret_cast<Launch>(launch)(reinterpret_cast<void*>(function), sizes[0], sizes[1], sizes[2], sizes[3],
                                          sizes[4], sizes[5], shared, reinterpret_cast<void*>(stream), table, nullptr);
}

// cusparseLtMatmul, which lies at the address `matmul`, with C = D on one stream. `numbers`: alpha and beta, floats.
inline int cslt_matmul(uintptr_t matmul, uintptr_t handle, uintptr_t plan, uintptr_t numbers, uintptr_t a, uintptr_t b,
                       uintptr_t d, uintptr_t space, uintptr_t stream) {
  using Matmul = int (*)(const void*, const void*, const void*, const void*, const void*, const void*, const void*,
                         void*, void*, void**, int32_t);
  const auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  void* streams[1] = {at(stream)};
  const nanobind::gil_scoped_release nogil;
  return reinterpret_cast<Matmul>(matmul)(at(handle), at(plan), at(numbers), at(a), at(b), at(numbers + sizeof(float)),
                                          at(d), at(d), at(space), streams, 1);
}

}  // namespace gossamer
