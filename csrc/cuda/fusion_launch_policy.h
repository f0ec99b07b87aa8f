// How many pixels a tile of the fusion's kernels holds, and how many blocks, threads and bytes of shared memory a
// launch takes: the one place to change after a measurement. Every number here is by reckoning; none is measured yet.
#pragma once

#include "fusion_pixels.h"
#include "simt.h"

#include <algorithm>

namespace fflfast::cuda {

// Threads of a block of the kernels that go over tiles of feature maps.
constexpr int kTileThreads = 256;
// Pixels that a warp goes along at a time: two columns of the window besides are read for each such run.
constexpr int kRun = 8;
// Channels of a block: a lane has 4 bytes of them, and a warp goes along pixels together.
template <class T>
constexpr int kBlockChannels = simt::kWarpSize * (4 / static_cast<int>(sizeof(T)));

// Blocks a multiprocessor that a tile's shared memory should leave room for, first the best.
constexpr int kResidentBlocks[] = {4, 2, 1};
constexpr size_t kReservedShared = 1024;  // of each block, by the system
// Tiles from large to small: the larger, the fewer rows are read twice. The first that gives every multiprocessor
// kFewBlocks blocks is taken, or else the smallest.
constexpr int kTilePixels[] = {256, 128, 64, 32};
constexpr int kFewBlocks = 2, kManyBlocks = 4;

// Tiles of the images; bytes(pixels, halo) is the shared memory of a block. False where no row of an image fits.
template <class Bytes>
inline bool cut_rows(const Features& f, int channel_blocks, const simt::DeviceProperties& device, const Bytes& bytes,
                     RowTiles* cut) {
  const int image = f.image(), width = f.width;
  const int64_t few = int64_t{device.sm_count} * kFewBlocks, many = int64_t{device.sm_count} * kManyBlocks;
  for (const int resident : kResidentBlocks) {
    const size_t budget =
        resident == 1 ? device.shared_per_block : device.shared_per_block / resident - kReservedShared;
    bool found = false;
    for (const int target : kTilePixels) {
      const bool whole = image <= target;
      const int pixels = whole ? target / image * image : std::max(1, target / width) * width;
      const int halo = whole ? 0 : width;
      if (bytes(pixels, halo) > budget) continue;
      const int64_t tiles = (f.pixels() + pixels - 1) / pixels;
      *cut = {pixels, halo, channel_blocks, tiles, std::max<int64_t>(1, std::min(tiles, many / channel_blocks))};
      found = true;
      if (tiles * channel_blocks >= few) return true;
    }
    if (found) return true;
  }
  return false;
}

// A block of the pool: `lanes` threads side by side on packs of channels, `parts` of them on the pixels of an image,
// and as many images as there are threads for.
struct PoolShape {
  int lanes, parts, images;
};

inline PoolShape pool_shape(int64_t batch, int64_t packs, int pixels, int sm_count) {
  constexpr int kSomeParts = 4, kMostParts = 32;  // more than some only where the blocks would be few
  int lanes = 1, parts = 1;
  while (lanes < simt::kWarpSize && lanes < packs) lanes *= 2;
  const auto blocks = [&] { return batch * lanes * parts / kTileThreads * ((packs + lanes - 1) / lanes); };
  while (parts < pixels && lanes * parts < kTileThreads &&
         (parts < kSomeParts || (parts < kMostParts && blocks() < int64_t{kFewBlocks} * sm_count)))
    parts *= 2;
  return {lanes, parts, kTileThreads / (lanes * parts)};
}

// Channels side by side and images one after the other in a block of backward_pool.
constexpr int kSumThreads = 512, kSumLanes = 8;

constexpr int kRunningThreads = 512;

}  // namespace fflfast::cuda
