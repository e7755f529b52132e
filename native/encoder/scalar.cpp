// For CPUs without AVX2.
#include "plain.h"

namespace gossamer::encoder {
const Kernels scalar_kernels{norm, attend, embed, to_rows, from_rows};
}  // namespace gossamer::encoder
