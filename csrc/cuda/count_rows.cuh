// The count of rows as a launch of its own.
#pragma once

#include "distill_loss_common.cuh"

namespace fflfast::cuda {

// n for a launch whose blocks would have to count too long a target: one block's line of partials is a count.
// Bytes: 8 a row. Launches: one.
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(256) void count_rows(const FFLFAST_GRID_CONSTANT Operands o, int64_t* count) {
  int64_t* shared = simt::shared_memory<int64_t>();
  const int64_t own = count_in_block<1>(o, simt::block_index() * simt::block_size(),
                                        simt::grid_size() * simt::block_size(), shared);
  if (simt::thread_index() == 0) o.partials[simt::block_index()] = static_cast<double>(own);
  int* const flag = reinterpret_cast<int*>(shared + simt::block_size() / simt::kWarpSize);
  if (!is_last_block<3>(o, simt::grid_size(), flag)) return;
  const double sum = sum_of_blocks<4>(o.partials, 1, 0, simt::grid_size());
  if (simt::thread_index() == 0) *count = static_cast<int64_t>(sum);
}

}  // namespace fflfast::cuda
