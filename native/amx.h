// Whether AMX may be used: the processor has it, and the system lets this process have its registers.
#pragma once
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cpuid.h>

namespace gossamer {

// `kind`: the bit of the data type in edx of leaf 7, say 1 << 22 for bfloat16, 1 << 25 for int8.
inline bool amx_granted(unsigned kind) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & tile) || !(edx & kind)) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace gossamer
