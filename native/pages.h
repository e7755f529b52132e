// Where weights lie decides how fast they are read: on 4 KiB pages every page costs a walk, twice as deep in a guest.
#pragma once

#include <cstdint>

namespace gossamer {

// Asks the system to move this memory onto huge pages, where it stays at its addresses. True if it did.
bool move_to_huge_pages(uintptr_t begin, int64_t bytes);

}  // namespace gossamer
