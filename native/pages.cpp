#include "pages.h"

#ifdef __linux__
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#endif

namespace gossamer {

#ifdef __linux__
namespace {

constexpr uintptr_t huge_page = uintptr_t{1} << 21;
constexpr int collapse = 25;  // MADV_COLLAPSE, Linux 6.1; older headers do not name it

// Older kernels collapse even where the administrator said never.
bool allowed() {
  char choice[128] = {};
  if (FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r")) {
    if (!std::fgets(choice, sizeof choice, file)) choice[0] = 0;
    std::fclose(file);
  }
  return choice[0] && !std::strstr(choice, "[never]");
}

}  // namespace

bool move_to_huge_pages(uintptr_t begin, int64_t bytes) {
  if (bytes <= 0 || !allowed()) return false;
  // Whole huge pages around the memory: neighbours move along, which they cannot notice.
  const uintptr_t end = (begin + static_cast<uintptr_t>(bytes) + huge_page - 1) / huge_page * huge_page;
  bool all = true;
  for (uintptr_t page = begin / huge_page * huge_page; page < end; page += huge_page)
    all &= madvise(reinterpret_cast<void*>(page), huge_page, collapse) == 0;
  return all;
}
#else
bool move_to_huge_pages(uintptr_t, int64_t) { return false; }
#endif

}  // namespace gossamer
