// What the fusion's products bring to shared memory: lines of matrices, the numbers of a block of channels, and what
// becomes of a tile of pixels on the way.
#pragma once

#include "fusion_features.cuh"
#include "fusion_launch.h"

namespace fflfast::cuda {

// Numbers of K in a slice of a product: 128 bytes, the channels that a warp's lanes cover.
template <class T>
constexpr int kSlice = 128 / sizeof(T);

// S numbers as T: what a line of weights in float32 becomes.
template <class T, class S, int N>
FFLFAST_DEVICE Pack<T, N> converted(const Pack<S, N>& pack) {
  Pack<T, N> out;
  FFLFAST_UNROLL
  for (int k = 0; k < N; ++k) {
    if constexpr (std::is_same_v<T, S>)
      out[k] = pack[k];
    else
      out[k] = simt::convert<T>(simt::convert<float>(pack[k]));
  }
  return out;
}

// One pack of a line: asynchronously where nothing is to be converted.
template <class T, class S>
FFLFAST_DEVICE void copy_pack(const S* from, T* to) {
  constexpr int kWidth = kPack<S>;
  if constexpr (std::is_same_v<T, S>)
    simt::copy_async<16>(to, from);
  else
    *reinterpret_cast<Pack<T, kWidth>*>(to) = converted<T>(simt::load_cached<S, kWidth>(from));
}

template <class S>
FFLFAST_DEVICE bool aligned(const S* from, int64_t stride) {
  return reinterpret_cast<uintptr_t>(from) % 16 == 0 && stride % kPack<S> == 0;
}

// `lines` lines of `count` ≤ WIDTH numbers, `stride` apart in memory, to `all` lines of WIDTH in shared memory, `pitch`
// apart; zeros where there are none. As with load_pixels, the numbers are there after a wait and a barrier.
template <class T, int WIDTH, class S>
FFLFAST_DEVICE void copy_part(const S* from, int64_t stride, int lines, int count, T* to, int pitch, int all) {
  constexpr int kWidth = kPack<S>, kPacks = WIDTH / kWidth;
  const bool packs = aligned(from, stride);
  FFLFAST_ROLLED
  for (int i = simt::thread_index(); i < all * kPacks; i += simt::block_size()) {
    const int line = i / kPacks, c = i % kPacks * kWidth;
    const S* const source = from + line * stride + c;
    T* const target = to + line * pitch + c;
    if (packs && line < lines && c + kWidth <= count) {
      copy_pack(source, target);
      continue;
    }
    Pack<S, kWidth> pack{};
    FFLFAST_UNROLL
    for (int k = 0; k < kWidth; ++k)
      if (line < lines && c + k < count) pack[k] = simt::load_cached<S, 1>(source + k)[0];
    *reinterpret_cast<Pack<T, kWidth>*>(target) = converted<T>(pack);
  }
}

// The same for a number of lines that is known, quicker where all of them are there.
template <class T, int LINES, int WIDTH, int THREADS, class S>
FFLFAST_DEVICE void copy_lines(const S* from, int64_t stride, int lines, int count, T* to, int pitch) {
  constexpr int kWidth = kPack<S>, kPacks = WIDTH / kWidth, kTurns = LINES * kPacks / THREADS;
  static_assert(kTurns * THREADS == LINES * kPacks, "each thread has as many packs");
  if (lines < LINES || count < WIDTH || !aligned(from, stride))
    return copy_part<T, WIDTH>(from, stride, lines, count, to, pitch, LINES);
  FFLFAST_ROLLED
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * THREADS + simt::thread_index(), line = i / kPacks, c = i % kPacks * kWidth;
    copy_pack(from + line * stride + c, to + line * pitch + c);
  }
}

// Lines `line` … of the pointwise weight (O, C), the channels of a block.
template <class T, int LINES, int THREADS>
FFLFAST_DEVICE void copy_weights(const ProductOperands& in, int line, const ChannelBlock& block, T* to, int pitch) {
  const int64_t stride = in.features.channels, offset = line * stride + block.whole;
  const int lines = in.outputs - line;
  if (std::is_same_v<T, float> || in.pointwise.is_float32 != 0) {
    copy_lines<T, LINES, kSlice<T>, THREADS>(static_cast<const float*>(in.pointwise.data) + offset, stride, lines,
                                             block.count, to, pitch);
  } else {
    copy_lines<T, LINES, kSlice<T>, THREADS>(static_cast<const T*>(in.pointwise.data) + offset, stride, lines,
                                             block.count, to, pitch);
  }
}

// The numbers of a block of channels in shared memory, lines of kSlice: nine taps, then the norm's; zeros for channels
// that are not there, so that their activations are 0.
constexpr int kScaleLine = 9, kShiftLine = 10, kMeanLine = 11, kRstdLine = 12, kChannelLines = 13;

template <class T>
constexpr size_t kChannelNumbersBytes = sizeof(float) * kChannelLines * kSlice<T>;

template <class T>
FFLFAST_DEVICE void load_channel_numbers(const ProductOperands& in, const ChannelBlock& block, float* to) {
  for (int i = simt::thread_index(); i < 9 * kSlice<T>; i += simt::block_size()) {
    const int channel = i / 9;
    to[i % 9 * kSlice<T> + channel] =
        channel < block.count ? read_weight<T>(in.depthwise, int64_t{9} * block.whole + i) : 0.0f;
  }
  // The threads from the last one down: the first ones may have had one turn more.
  const int channel = simt::block_size() - 1 - simt::thread_index();
  if (channel >= kSlice<T>) return;
  NormFactors n{0.0f, 0.0f, 0.0f, 0.0f};
  if (channel < block.count) n = factors(in.norm1, block.whole + channel);
  to[kScaleLine * kSlice<T> + channel] = n.scale;
  to[kShiftLine * kSlice<T> + channel] = n.shift;
  to[kMeanLine * kSlice<T> + channel] = n.mean;
  to[kRstdLine * kSlice<T> + channel] = n.rstd;
}

template <class T>
FFLFAST_DEVICE Pack<float, kLaneChannels<T>> of_lane(const float* line) {
  return *reinterpret_cast<const Pack<float, kLaneChannels<T>>*>(line + simt::lane_index() * kLaneChannels<T>);
}

// Pixels around a tile that it needs on either side: a row of the image and one more.
FFLFAST_HOST_DEVICE int product_halo(const Features& f) { return f.width + 1; }

// Where a tile of pixels stands, in shared memory: what divisions it takes is found out once, by one thread.
struct TilePlace {
  int64_t first;      // pixel
  int32_t pixels;
  int32_t phase;      // of the first pixel in its image
  PixelRange around;  // what the depthwise outputs of these pixels depend on
};
constexpr size_t kPlaceBytes = 64;
static_assert(sizeof(TilePlace) <= kPlaceBytes, "what follows in shared memory is aligned");

FFLFAST_DEVICE void find_place(const Features& f, int64_t first, int pixels, TilePlace* place) {
  const PixelRange around = needed(f, first, pixels);
  *place = {first, pixels, static_cast<int>(first - around.image * f.image()), around};
}

// The pixels of a tile of at most `rows` and of one block of channels, with halo. each_depthwise goes by the place
// of the first pixel, not by the tile's `phase`, which is that of the halo and may be negative here.
template <class T>
FFLFAST_DEVICE PixelTile<T> halo_tile(const Features& f, const ChannelBlock& block, T* data, const TilePlace& place,
                                      int rows) {
  const int halo = product_halo(f);
  return {data, tile_pitch<T, kSlice<T>>(f.map[block.map].access), place.first - halo, rows + 2 * halo,
          place.phase - halo};
}

// Calls body(pixel of the tile, h) for each pixel of a tile; a lane has the channels of its own of every pixel that its
// warp comes to.
template <class T, class Body>
FFLFAST_DEVICE void each_depthwise(const Features& f, const PixelTile<T>& x, const float* numbers,
                                   const TilePlace& place, const Body& body) {
  constexpr int kLane = kLaneChannels<T>, kRun = 8;
  const int channel = simt::lane_index() * kLane, step = simt::block_size() / simt::kWarpSize * kRun;
  const int pixels = place.pixels;
  float taps[9][kLane];
  FFLFAST_UNROLL
  for (int t = 0; t < 9; ++t) {
    const auto held = of_lane<T>(numbers + t * kSlice<T>);
    FFLFAST_UNROLL
    for (int v = 0; v < kLane; ++v) taps[t][v] = held[v];
  }
  FFLFAST_ROLLED
  for (int first = simt::warp_index() * kRun; first < pixels; first += step) {
    const auto at = static_cast<unsigned>(place.phase + first);
    const unsigned pixel = at - f.by_image(at) * static_cast<unsigned>(f.image()), y = f.by_width(pixel);
    walk<kRun, kLane>(
        f, first + product_halo(f), static_cast<int>(y), static_cast<int>(pixel - y * static_cast<unsigned>(f.width)),
        pixels - first < kRun ? pixels - first : kRun,
        [&](int from, float(&value)[kLane]) {
          const auto pack = *reinterpret_cast<const Pack<T, kLane>*>(x.at(from, channel));
          FFLFAST_UNROLL
          for (int v = 0; v < kLane; ++v) value[v] = simt::convert<float>(pack[v]);
        },
        [&](int n, const Column<kLane>& left, const Column<kLane>& middle, const Column<kLane>& right) {
          float h[kLane];
          sum_taps(taps, left, middle, right, h);
          body(first + n, h);
        });
  }
}

// Writes lines of a staged tile to memory as T, `stride` apart: rows × columns of it, the first `columns` of COLUMNS.
template <class T, int COLUMNS>
FFLFAST_DEVICE void write_staged(const float* staged, int pitch, int rows, int columns, T* to, int64_t stride) {
  constexpr int kWidth = kPack<T>, kPacks = COLUMNS / kWidth;
  const bool packs = aligned(to, stride);
  FFLFAST_ROLLED
  for (int i = simt::thread_index(); i < rows * kPacks; i += simt::block_size()) {
    const int row = i / kPacks, c = i % kPacks * kWidth;
    const float* const from = staged + row * pitch + c;
    T* const target = to + row * stride + c;
    Pack<T, kWidth> pack;
    FFLFAST_UNROLL
    for (int k = 0; k < kWidth; ++k) pack[k] = simt::convert<T>(from[k]);
    if (packs && c + kWidth <= columns) {
      *reinterpret_cast<Pack<T, kWidth>*>(target) = pack;
    } else {
      FFLFAST_UNROLL
      for (int k = 0; k < kWidth; ++k)
        if (c + k < columns) target[k] = pack[k];
    }
  }
}

}  // namespace fflfast::cuda
