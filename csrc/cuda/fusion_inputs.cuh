// The end of the backward pass: gradients of the feature maps and of the depthwise weight.
//
//   dh = scale1 · (dz − [training] (dβ1 + ĥ · dγ1) / count1),   ĥ = (h − mean1) · rstd1,   h computed again from x
//   dx[p] = Σ_t w_t · dh[p − t],   dw_t = Σ_p x[p] · dh[p − t]          t = (i, j) − 1 of the nine taps
//
// with dz the kept gradient of the first norm's output, zero where its ReLU is. A block takes a block of channels and
// every `splits`-th tile of whole rows of pixels: dh of the tile and of a row above and below (x: two rows) in shared
// memory in float32, then each warp slides a window of 3 × 3 over dh for dx and dw at once. dx takes x's place in
// shared memory, so that it leaves in the map's own layout as wide as it allows.
// Bytes: A·e of x and A·e of dz read, A·e written (rows around a tile once more, from L2). A frozen norm whose
// depthwise weight wants no gradient: x is not read. Launches: one.
#pragma once

#include "fusion_features.cuh"
#include "fusion_launch_policy.h"
#include "fusion_moments.cuh"
#include "fusion_pixels.h"

namespace fflfast::cuda {

// Where a block's shared memory holds what.
template <class T>
struct InputsLayout {
  static constexpr int kChannels = kBlockChannels<T>;
  int x_rows, dh_rows;

  FFLFAST_HOST_DEVICE InputsLayout(int pixels, int halo) : x_rows(pixels + 4 * halo), dh_rows(pixels + 2 * halo) {}
  FFLFAST_HOST_DEVICE size_t dh_offset() const { return tile_bytes<T, kChannels>(x_rows); }
  FFLFAST_HOST_DEVICE size_t bytes() const {
    const size_t tiles = dh_offset() + sizeof(float) * kChannels * dh_rows;
    const size_t records = sizeof(float) * (kTileThreads / simt::kWarpSize * 9 * kChannels + 1);
    return tiles > records ? tiles : records;
  }
};

// dh = scale · dz − offset − slope · (h − mean) of V channels; zero where the block has none.
template <int V>
struct InputsNumbers {
  float mean[V], scale[V], offset[V], slope[V];

  FFLFAST_DEVICE InputsNumbers(const InputsCall& o, const ChannelBlock& block, int channel) {
    const float count = count_of(o.norm);
    FFLFAST_UNROLL
    for (int v = 0; v < V; ++v) {
      mean[v] = scale[v] = offset[v] = slope[v] = 0.0f;
      if (channel + v >= block.count) continue;
      const int c = block.whole + channel + v;
      const NormFactors n = factors(o.norm, c);
      mean[v] = n.mean;
      scale[v] = n.scale;
      if (o.norm.training == 0) continue;
      offset[v] = n.scale * (o.sums[c] / count);
      slope[v] = n.scale * n.rstd * (o.sums[o.features.channels + c] / count);
    }
  }

  FFLFAST_DEVICE float dh(int v, float dz, float h) const {
    return ::fmaf(-slope[v], h - mean[v], ::fmaf(scale[v], dz, -offset[v]));
  }
};

// dz of V channels at the pixels from p, zeros behind `count`; adjacent channels are read at once where they may be.
template <class T, int G, int V>
FFLFAST_DEVICE void read_kept(const InputsCall& o, const ChannelBlock& block, int channel, int64_t p, int count,
                              Pack<T, V> (&dz)[G]) {
  const int channels = o.features.channels;
  const T* const from = static_cast<const T*>(o.kept) + p * channels + block.whole + channel;
  const bool together = channels % V == 0 && block.whole % V == 0 && channel + V <= block.count;
  FFLFAST_UNROLL
  for (int n = 0; n < G; ++n) {
    dz[n] = Pack<T, V>{};
    if (n >= count) continue;
    if (together) {
      dz[n] = simt::load_streaming<T, V>(from + int64_t{n} * channels);
    } else {
      FFLFAST_UNROLL
      for (int v = 0; v < V; ++v)
        if (channel + v < block.count) dz[n][v] = simt::load_streaming<T, 1>(from + int64_t{n} * channels + v)[0];
    }
  }
}

template <class T>
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(256, 2)
void backward_inputs(const FFLFAST_GRID_CONSTANT InputsCall o, const RowTiles cut, const Scratch scratch) {
  constexpr int kChannels = kBlockChannels<T>, kLane = kLaneChannels<T>;
  const SplitGrid grid{cut.channel_blocks, cut.splits};
  const Features& f = o.features;
  const ChannelBlock block = channel_block<kChannels>(f, grid.channel_block());
  const Feature& gradient = o.gradient[block.map];
  const bool wants_weight = o.weight_gradient != nullptr, wants_map = gradient.data != nullptr;
  if (!wants_weight && !wants_map) return;
  const int channel = simt::lane_index() * kLane, warps = simt::block_size() / simt::kWarpSize, halo = cut.halo;
  const InputsLayout<T> layout(cut.pixels, halo);
  T* const x_memory = simt::shared_memory<T>();
  float* const dh = reinterpret_cast<float*>(simt::shared_memory<unsigned char>() + layout.dh_offset()) + channel;
  const auto dh_at = [&](int row) { return reinterpret_cast<Pack<float, kLane>*>(dh + row * kChannels); };
  const InputsNumbers<kLane> numbers(o, block, channel);
  float taps[9][kLane], flipped[9][kLane], sums[kLane][9];
  read_taps<T>(o.weight, block, channel, taps);
  FFLFAST_UNROLL
  for (int t = 0; t < 9; ++t)
    FFLFAST_UNROLL
    for (int v = 0; v < kLane; ++v) {
      flipped[t][v] = taps[8 - t][v];
      sums[v][t] = 0.0f;
    }
  for (int64_t tile = grid.split(); tile < cut.tiles; tile += cut.splits) {
    const int64_t first = tile * cut.pixels, left = f.pixels() - first;
    const int pixels = left < cut.pixels ? static_cast<int>(left) : cut.pixels;
    const PixelTile<T> x =
        pixel_tile<T, kChannels>(f, f.map[block.map].access, x_memory, first - 2 * halo, layout.x_rows);
    const bool trains = o.norm.training != 0;
    if (trains || wants_weight) {
      load_pixels<T, kChannels>(f, block, surroundings(f, first, pixels, trains ? 2 * f.width : 0), x);
      simt::copy_async_commit();
      simt::copy_async_wait<21, 0>();
    }
    simt::sync_block<22>();
    const PixelRange around = surroundings(f, first, pixels, f.width);
    const int dh_pixels = static_cast<int>(around.end - around.begin);
    const int dh_shift = static_cast<int>(around.begin - (first - halo));
    const RowRuns<kRun> dh_runs(f, x.phase + halo + dh_shift);
    for (int r = simt::warp_index(); r < dh_runs.number(dh_pixels); r += warps) {
      const Run run = dh_runs(r);
      Pack<T, kLane> dz[kRun];
      read_kept<T>(o, block, channel, around.begin + run.first, run.count, dz);
      const auto put = [&](int k, const float(&h)[kLane]) {
        FFLFAST_UNROLL
        for (int v = 0; v < kLane; ++v)
          (*dh_at(dh_shift + run.first + k))[v] = numbers.dh(v, simt::convert<float>(dz[k][v]), h[v]);
      };
      if (trains) {
        each_depthwise<kRun>(f, x, halo + dh_shift + run.first, run, channel, taps, put);
      } else {
        constexpr float kNone[kLane] = {};
        FFLFAST_UNROLL
        for (int k = 0; k < kRun; ++k)
          if (k < run.count) put(k, kNone);
      }
    }
    simt::sync_block<23>();
    const RowRuns<kRun> runs(f, x.phase + 2 * halo);
    for (int r = simt::warp_index(); r < runs.number(pixels); r += warps) {
      const Run run = runs(r);
      walk<kRun, kLane, false>(
          f, halo + run.first, run.y, run.x, run.count,
          [&](int row, float (&value)[kLane]) {
            const Pack<float, kLane> pack = *dh_at(row);
            FFLFAST_UNROLL
            for (int v = 0; v < kLane; ++v) value[v] = pack[v];
          },
          [&](int k, const Column<kLane>& before, const Column<kLane>& middle, const Column<kLane>& after) {
            auto* const place = reinterpret_cast<Pack<T, kLane>*>(x.at(2 * halo + run.first + k, channel));
            float dx[kLane];
            sum_taps(flipped, before, middle, after, dx);
            FFLFAST_UNROLL
            for (int v = 0; v < kLane; ++v) {
              if (wants_weight) {
                const float own = simt::convert<float>((*place)[v]);
                FFLFAST_UNROLL
                for (int i = 0; i < 3; ++i) {
                  sums[v][3 * i] = ::fmaf(own, after.value[2 - i][v], sums[v][3 * i]);
                  sums[v][3 * i + 1] = ::fmaf(own, middle.value[2 - i][v], sums[v][3 * i + 1]);
                  sums[v][3 * i + 2] = ::fmaf(own, before.value[2 - i][v], sums[v][3 * i + 2]);
                }
              }
              (*place)[v] = simt::convert<T>(dx[v]);
            }
          });
    }
    simt::sync_block<24>();
    if (wants_map) store_pixels<T, kChannels>(f, gradient, block, surroundings(f, first, pixels, 0), x);
    simt::sync_block<25>();
  }
  if (!wants_weight) return;
  float* const shared = simt::shared_memory<float>();
  FFLFAST_UNROLL
  for (int v = 0; v < kLane; ++v) put_record<kChannels>(shared, simt::warp_index(), channel + v, sums[v]);
  finish_splits<26, kChannels, 9, MergeSums>(
      grid, shared, warps, scratch.records, scratch.tickets, [&](int index, int c, const float(&record)[9]) {
        const ChannelBlock of = channel_block<kChannels>(f, index);
        if (c >= of.count) return;
        FFLFAST_UNROLL
        for (int t = 0; t < 9; ++t) {
          const int64_t at = int64_t{9} * (of.whole + c) + t;
          if (o.weight.is_float32)
            static_cast<float*>(o.weight_gradient)[at] = record[t];
          else
            static_cast<T*>(o.weight_gradient)[at] = simt::convert<T>(record[t]);
        }
      });
}

}  // namespace fflfast::cuda
