// Products and quantisation over threads, and which instruction set does them.
#pragma once

#include <string>
#include <vector>

#include "bsr.h"

namespace gossamer::bsr {

std::vector<std::string> isas();          // best first; a CPU that runs one runs those after it
std::string isa();                        // GOSSAMER_ISA, else the best
void set_isa(const std::string& name);    // throws std::invalid_argument

// The layout of x says which kernel runs: t and q must be that of the blocks (1 and 4 columns), rows any.
void product(const Weights& a, const Input& x, const Output& out, int threads);

// `inverse` 0: per token, whose scales are written; else 1 / scale. `out` has blocks_of(tokens) whole blocks, or rows.
void quantise(const Raw& x, Layout layout, float inverse, int zero, uint8_t* out, int64_t stride, float* scales,
              int threads);

// y [tokens, rows] in the type of x, x quantised per token on the way. `scratch` takes quantised activations: all of
// them, or, without panels, where the token blocks are a multiple of `threads` or 4 * threads and more, one block for
// each thread.
void linear(const Weights& a, const Raw& x, Layout layout, uint8_t* scratch, int64_t stride, float* scales,
            const float* bias, void* y, int threads);

// The same in the layout that these weights read fastest for so many tokens, with memory of its own.
void linear(const Weights& a, const Raw& x, const float* bias, void* y, int threads);

}  // namespace gossamer::bsr
