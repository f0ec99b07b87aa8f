// Tiles and blocks of the fusion's products: the one place to change after a measurement. By reckoning for an H200 (132
// multiprocessors of 227 KB); nothing here is measured yet. B, N maps of C channels, H × H, C outputs, bfloat16:
//
//   (B, N, C, H)       side  pointwise: tiles, blocks  gradient: tiles, blocks  weight: tiles, splits  inference
//   (128, 2, 64, 8)     64       128 × 1, 128             128 × 2, 256              2, 16             128 of 1 image
//   (256, 2, 512, 7)   128        98 × 4, 196              98 × 8, 264             32, 8              512 of 2
//   (1024, 2, 512, 7)  128       392 × 4, 264             392 × 8, 264             32, 8             2048 of 2
//   (256, 3, 2048, 7)  128        98 × 16, 224             98 × 48, 240           768, 1             2048 of 2
#pragma once

#include "fusion_launch.h"

#include <algorithm>

namespace fflfast::cuda {

// Tiles of 128 × 128 are taken where they give every multiprocessor this many; smaller ones reload more for each sum.
constexpr int64_t kLargeTilesPerSm = 1;
// Threads of a multiprocessor that the kernels' registers leave room for (kBlocksBeside).
constexpr int kThreadsPerSm = 512;
constexpr size_t kSystemShared = 1024;  // of each block
// Slices of pixels that a block of the weight's gradient should have at least: each block ends with writing its tile.
constexpr int64_t kWeightSlices = 8;
// The most shared memory for the sums of a block's images (inference).
constexpr size_t kImageSums = 8 * 1024;

constexpr int most_images(int side) { return static_cast<int>(kImageSums / (2 * sizeof(float) * side)); }

constexpr int64_t tiles_of(int64_t size, int64_t side) { return (size + side - 1) / side; }

inline int64_t resident_blocks(int threads, size_t shared, const simt::DeviceProperties& device) {
  const auto fit = static_cast<int64_t>((device.shared_per_block + kSystemShared) / (shared + kSystemShared));
  return device.sm_count * std::max<int64_t>(1, std::min<int64_t>(fit, kThreadsPerSm / threads));
}

inline bool wants_large(int64_t rows, int64_t columns, const simt::DeviceProperties& device) {
  return columns > kSmallSide &&
         tiles_of(rows, kLargeSide) * tiles_of(columns, kLargeSide) >= kLargeTilesPerSm * device.sm_count;
}

// A large tile of the weight's gradient has both sides, and runs of slices of pixels besides.
inline bool wants_large_weight(int64_t outputs, int64_t channels, int64_t slices,
                               const simt::DeviceProperties& device) {
  const int64_t tiles = tiles_of(outputs, kLargeSide) * tiles_of(channels, kLargeSide);
  return std::min(outputs, channels) > kSmallSide &&
         tiles * tiles_of(slices, kWeightSlices) >= kLargeTilesPerSm * device.sm_count;
}

// `splits` blocks share `items`, as evenly as they can with at least `least` each.
inline int64_t even_splits(int64_t items, int64_t wanted, int64_t least) {
  const int64_t most = std::max<int64_t>(1, std::min(wanted, items / std::max<int64_t>(1, least)));
  return tiles_of(items, tiles_of(items, most));
}

inline ProductPlan make_plan(bool large, int64_t column_tiles, int64_t row_tiles, int64_t splits) {
  return {large, static_cast<int32_t>(column_tiles), static_cast<int32_t>(row_tiles), static_cast<int32_t>(splits)};
}

// Row tiles of `side` pixels, shared by as many blocks as are resident at once.
inline ProductPlan row_plan(bool large, int64_t pixels, int64_t column_tiles, int64_t resident) {
  const int64_t rows = tiles_of(pixels, large ? kLargeSide : kSmallSide);
  return make_plan(large, column_tiles, rows, even_splits(rows, resident / column_tiles, 1));
}

// Tiles of the weight (O × C), each the work of `splits` blocks on runs of slices of pixels.
inline ProductPlan weight_plan(bool large, int outputs, int channels, int64_t slices, int64_t resident) {
  const int side = large ? kLargeSide : kSmallSide;
  const int64_t tiles = tiles_of(outputs, side) * tiles_of(channels, side);
  return make_plan(large, tiles, slices, even_splits(slices, resident / tiles, kWeightSlices));
}

// row_tiles: images of a block, splits: groups of so many. The number of images that ends soonest: a tile's rows are
// wasted where it holds no whole number of them, multiprocessors where there are too few groups.
inline ProductPlan image_plan(bool large, const Features& f, int outputs, int64_t resident) {
  const int side = large ? kLargeSide : kSmallSide;
  const int64_t columns = tiles_of(outputs, side);
  const int64_t most = most_images(side);
  int64_t best = 1, best_time = INT64_MAX;
  for (int64_t images = 1; images <= std::min(most, f.batch); ++images) {
    const int64_t rounds = tiles_of(tiles_of(f.batch, images) * columns, resident);
    const int64_t time = rounds * tiles_of(images * f.image(), side);
    if (time < best_time) best = images, best_time = time;
  }
  return make_plan(large, columns, best, tiles_of(f.batch, best));
}

}  // namespace fflfast::cuda
