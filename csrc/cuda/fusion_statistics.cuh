// Moments of the depthwise output, which is not stored: h = Σ_t w_t x_t over the nine taps, and per channel
//
//   mean = Σ_p h_p / P,   M2 = Σ_p (h_p − mean)²
//
// A block takes a block of channels (a lane four bytes of them) and every `splits`-th tile of whole rows of pixels; its
// warps take runs of kRun pixels of the tile, and slide a window of 3 × 3 along them: three reads of shared memory a
// pixel and channel pair. A thread merges the moments of each run (two passes over registers) into its own, warps and
// blocks merge theirs by Chan's formula (fusion_moments.cuh).
// Bytes: A·e read (rows above and below a tile once more, from L2), 16 a channel and block for the records.
// Launches: one.
#pragma once

#include "fusion_features.cuh"
#include "fusion_launch_policy.h"
#include "fusion_moments.cuh"
#include "fusion_pixels.h"

namespace fflfast::cuda {

template <class T>
constexpr size_t statistics_bytes(int pixels, int halo) {
  constexpr size_t kRecords = sizeof(float) * (kTileThreads / simt::kWarpSize * kMoments * kBlockChannels<T> + 1);
  const size_t tile = tile_bytes<T, kBlockChannels<T>>(pixels + 2 * halo);
  return tile > kRecords ? tile : kRecords;
}

template <class T>
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(256, 2)
void depthwise_statistics(const FFLFAST_GRID_CONSTANT StatisticsCall o, const RowTiles cut, const Scratch scratch) {
  constexpr int kChannels = kBlockChannels<T>, kLane = kLaneChannels<T>;
  const SplitGrid grid{cut.channel_blocks, cut.splits};
  const Features& f = o.features;
  const ChannelBlock block = channel_block<kChannels>(f, grid.channel_block());
  const int channel = simt::lane_index() * kLane, warps = simt::block_size() / simt::kWarpSize;
  float taps[9][kLane], moments[kLane][kMoments];
  read_taps<T>(o.weight, block, channel, taps);
  FFLFAST_UNROLL
  for (int v = 0; v < kLane; ++v)
    FFLFAST_UNROLL
    for (int k = 0; k < kMoments; ++k) moments[v][k] = 0.0f;
  for (int64_t tile = grid.split(); tile < cut.tiles; tile += cut.splits) {
    const int64_t first = tile * cut.pixels, left = f.pixels() - first;
    const int pixels = left < cut.pixels ? static_cast<int>(left) : cut.pixels;
    const PixelTile<T> x = pixel_tile<T, kChannels>(f, f.map[block.map].access, simt::shared_memory<T>(),
                                                    first - cut.halo, cut.pixels + 2 * cut.halo);
    load_pixels<T, kChannels>(f, block, surroundings(f, first, pixels, f.width), x);
    simt::copy_async_commit();
    simt::copy_async_wait<1, 0>();
    simt::sync_block<2>();
    const RowRuns<kRun> runs(f, x.phase + cut.halo);
    for (int r = simt::warp_index(); r < runs.number(pixels); r += warps) {
      const Run run = runs(r);
      float h[kRun][kLane] = {};
      each_depthwise<kRun>(f, x, cut.halo + run.first, run, channel, taps, [&](int n, const float(&value)[kLane]) {
        FFLFAST_UNROLL
        for (int v = 0; v < kLane; ++v) h[n][v] = value[v];
      });
      FFLFAST_UNROLL
      for (int v = 0; v < kLane; ++v) add_moments(h, v, run.count, moments[v]);
    }
    simt::sync_block<3>();
  }
  float* const shared = simt::shared_memory<float>();
  FFLFAST_UNROLL
  for (int v = 0; v < kLane; ++v) put_record<kChannels>(shared, simt::warp_index(), channel + v, moments[v]);
  finish_splits<4, kChannels, kMoments, MergeMoments>(
      grid, shared, warps, scratch.records, scratch.tickets, [&](int index, int c, const float(&record)[kMoments]) {
        const ChannelBlock of = channel_block<kChannels>(f, index);
        if (c >= of.count) return;
        o.moments[of.whole + c] = mean_of(record);
        o.moments[f.channels + of.whole + c] = record[3];
      });
}

}  // namespace fflfast::cuda
