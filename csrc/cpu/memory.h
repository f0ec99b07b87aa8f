// Memory for what the operators return.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../shim.h"

namespace fflfast {

// Fresh memory costs a fault a page: 4 KB pages would take longer than the arithmetic. The advice covers the tensor's
// first and last page too, as an aligned huge page may begin in the allocator's few bytes before it.
inline void advise_huge_pages([[maybe_unused]] const Tensor& tensor, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kWorthwhile = int64_t{1} << 22;
  if (bytes < kWorthwhile) return;
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data(tensor));
  const uintptr_t first = begin & ~(page - 1), last = (begin + static_cast<uintptr_t>(bytes) + page - 1) & ~(page - 1);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fflfast
