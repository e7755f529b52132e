// A fast checksum against damage, not against malice: any change confined to one 8-byte word always shows.
#pragma once

#include <cstdint>

namespace gossamer::retrieval {

uint64_t checksum(const void* data, uint64_t bytes, int threads);

}  // namespace gossamer::retrieval
