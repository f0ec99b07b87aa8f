// The ticket that tells a block whether it is the last one to finish.
#pragma once

#include "simt.h"

namespace fflfast::cuda {

// True in every thread of the block that is last to come here of `blocks`, which then sees what the others wrote before
// it: their first threads themselves, or any of their threads before a barrier. `ticket` is 0 before a launch and again
// after it, as it wraps with the last block.
template <int SITE>
FFLFAST_DEVICE bool is_last_of(unsigned* ticket, int64_t blocks, int* shared) {
  if (simt::thread_index() == 0) {
    simt::fence_device();
    const unsigned limit = static_cast<unsigned>(blocks - 1);
    *shared = simt::atomic_inc_wrap(ticket, limit) == limit;
    simt::fence_device();
  }
  simt::sync_block<SITE>();
  return *shared != 0;
}

}  // namespace fflfast::cuda
