// How many threads, blocks and bytes of shared memory a launch takes: the one place to change after a measurement.
// Every number here is by reckoning; none has been measured yet.
#pragma once

#include "distill_operands.h"
#include "simt.h"

#include <algorithm>

namespace fflfast::cuda {

// A row as chunks of 16 bytes: how many threads share it. Below 32 lanes a block holds 128/lanes rows.
struct RowShare {
  int64_t max_chunks;
  int lanes, block;
};
constexpr RowShare kRowShares[] = {
    {2, 2, 128}, {4, 4, 128}, {8, 8, 128}, {16, 16, 128}, {192, 32, 128}, {1024, 128, 128}, {INT64_MAX, 256, 256},
};

// Shared memory that lets two blocks live on a multiprocessor, so that one loads while the other computes.
constexpr size_t kSharedOfTwo = 112 * 1024;
// Blocks a multiprocessor at most: each block leaves a line of partial sums for the last one to add.
constexpr int kBlocksPerSm = 16;
// Rows up to which every block counts the whole target itself instead of a launch before: 64 KB from L2 a block.
constexpr int64_t kCountedByBlock = 8192;
constexpr int64_t kCountGrid = 64;

inline int64_t blocks_for(int64_t items, int64_t limit) { return std::max<int64_t>(1, std::min(items, limit)); }

// Rows held on chip. `bytes(lanes, block, cluster)` is the shared memory of a block; false where no cluster is enough.
template <class Bytes>
inline bool rows_geometry(int64_t rows, int64_t classes, int element_size, const simt::DeviceProperties& device,
                          const Bytes& bytes, Geometry* geometry) {
  const int64_t chunks = (classes * element_size + 15) / 16 + 1;
  const RowShare* share = kRowShares;
  while (chunks > share->max_chunks) ++share;
  const int max_cluster = device.capability >= 90 ? 8 : 1;
  int cluster = 1;
  while (cluster < max_cluster && bytes(share->lanes, share->block, cluster) > kSharedOfTwo) cluster *= 2;
  const size_t shared = bytes(share->lanes, share->block, cluster);
  if (shared > device.shared_per_block) return false;
  const int64_t groups = share->block / share->lanes;
  const int64_t limit = std::max<int64_t>(1, int64_t{device.sm_count} * kBlocksPerSm / cluster);
  *geometry = {share->lanes, share->block, cluster, blocks_for((rows + groups - 1) / groups, limit) * cluster, shared};
  return true;
}

// One block a row: as many warps as have a tile of 512 classes, as far as their numbers fit beside each other.
template <class Bytes>
inline bool sweeps_geometry(int64_t rows, int64_t classes, const simt::DeviceProperties& device, const Bytes& bytes,
                            Geometry* geometry) {
  constexpr size_t kSharedOfFour = 56 * 1024;
  int block = 256;
  while (block > 32 && (int64_t{block} * 8 >= classes || bytes(block) > kSharedOfFour)) block /= 2;
  if (bytes(block) > device.shared_per_block) return false;
  *geometry = {block, block, 1, blocks_for(rows, int64_t{device.sm_count} * kBlocksPerSm), bytes(block)};
  return true;
}

inline Geometry scale_geometry(int64_t elements, int element_size, const simt::DeviceProperties& device) {
  constexpr int64_t kBlock = 256;
  const int64_t packs = elements * element_size / 16 + 1;
  return {256, 256, 1, blocks_for((packs + kBlock - 1) / kBlock, int64_t{device.sm_count} * 8), 0};
}

}  // namespace fflfast::cuda
