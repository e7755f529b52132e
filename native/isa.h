// Which instruction set the kernels use: asked of the CPU once, narrowed by GOSSAMER_ISA or set().
#pragma once

#include <string>
#include <vector>

namespace gossamer::isa {

// Ordered: a CPU that runs one level runs those before it.
enum class Isa : int { scalar, avx2, avx512 };

std::vector<std::string> supported();  // best first
Isa active();                          // throws std::invalid_argument if GOSSAMER_ISA names what cannot run
void set(const std::string& name);     // throws std::invalid_argument
const char* name(Isa isa);

}  // namespace gossamer::isa
