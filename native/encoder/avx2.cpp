// The plain code, which the compiler turns into AVX2.
#include "plain.h"

namespace gossamer::encoder {
const Kernels avx2_kernels{norm, attend, embed, to_rows, from_rows};
}  // namespace gossamer::encoder
