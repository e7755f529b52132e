// A launch of a CUDA kernel through the driver's own cuLaunchKernel, whose address comes from Python: no CUDA header and
// no CUDA library is needed to build this, and ctypes takes three microseconds longer to convert the arguments.
#pragma once

#include <cstdint>

namespace gossamer {

inline int cuda_launch(uintptr_t launch, uintptr_t function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                       unsigned by, unsigned bz, unsigned shared, uintptr_t stream, uintptr_t parameters) {
  using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                         void**);
  return reinterpret_cast<Launch>(launch)(reinterpret_cast<void*>(function), gx, gy, gz, bx, by, bz, shared,
                                          reinterpret_cast<void*>(stream), reinterpret_cast<void**>(parameters),
                                          nullptr);
}

}  // namespace gossamer
