#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace gossamer::isa {
namespace {

constexpr const char* names[] = {"scalar", "avx2", "avx512"};
constexpr int unset = -1;
std::atomic<int> chosen{unset};

// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the wide registers.
Isa best() {
#ifdef GOSSAMER_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::scalar;
#else
  return Isa::scalar;
#endif
}

Isa parse(const std::string& wanted, const std::string& source) {
  std::string valid;
  for (int level = static_cast<int>(best()); level >= 0; --level) {
    if (wanted == names[level]) return static_cast<Isa>(level);
    valid += valid.empty() ? names[level] : std::string(", ") + names[level];
  }
  throw std::invalid_argument(source + "=" + wanted + " is not an instruction set this CPU can run; choose one of: " +
                              valid);
}

}  // namespace

const char* name(Isa isa) { return names[static_cast<int>(isa)]; }

std::vector<std::string> supported() {
  std::vector<std::string> out;
  for (int level = static_cast<int>(best()); level >= 0; --level) out.emplace_back(names[level]);
  return out;
}

void set(const std::string& wanted) { chosen = static_cast<int>(parse(wanted, "set_isa: name")); }

Isa active() {
  if (chosen == unset) {
    const char* wanted = std::getenv("GOSSAMER_ISA");
    chosen = static_cast<int>(wanted && *wanted ? parse(wanted, "GOSSAMER_ISA") : best());
  }
  return static_cast<Isa>(chosen.load());
}

}  // namespace gossamer::isa
