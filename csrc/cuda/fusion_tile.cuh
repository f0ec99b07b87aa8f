// The feature maps as the fusion's kernels read and write them: a range of pixels × a block of channels in shared
// memory.
//
// Pixels are numbered through the batch, p = (b·H + h)·W + w. A tile holds pixels `first` … `first + rows − 1` of it, a
// row of shared memory each, whatever images they belong to: a tap leaves the image where its place in the image says
// so, never by where the tile ends. So a kernel that wants h at pixels p … p + n − 1 loads p − W − 1 … p + n + W, less
// where the range begins or ends with an image or a row of one (`needed`).
#pragma once

#include "fusion_operands.h"
#include "simt.h"

namespace fflfast::cuda {

using simt::Pack;

template <class T>
constexpr int kPack = 16 / sizeof(T);

// Lanes go along channels, with as many channels each as fill 4 bytes: a warp then covers kLaneChannels<T> · 32.
template <class T>
constexpr int kLaneChannels = 4 / sizeof(T);

template <int KC>
FFLFAST_HOST_DEVICE int channel_blocks(const Features& f) {
  int blocks = 0;
  for (int k = 0; k < f.count; ++k) blocks += (f.map[k].channels + KC - 1) / KC;
  return blocks;
}

template <int KC>
FFLFAST_DEVICE ChannelBlock channel_block(const Features& f, int index) {
  int k = 0;
  for (; k + 1 < f.count; ++k) {
    const int blocks = (f.map[k].channels + KC - 1) / KC;
    if (index < blocks) break;
    index -= blocks;
  }
  const int first = index * KC, left = f.map[k].channels - first;
  return {k, first, f.first_channel[k] + first, left < KC ? left : KC};
}

struct PixelRange {
  int64_t begin, end;
  int64_t image;  // that `begin` is in
  int phase;      // of `begin` in it
};

// Pixels p … p + n − 1 with `margin` more on both sides, less what is of another image or behind the batch.
FFLFAST_DEVICE PixelRange surroundings(const Features& f, int64_t p, int64_t n, int margin) {
  const int64_t all = f.pixels(), image = f.image(), last = (p + n < all ? p + n : all) - 1;
  const int64_t index = p / image, image_begin = index * image, image_end = (last / image + 1) * image;
  const int64_t from = p - margin > image_begin ? p - margin : image_begin, to = last + margin + 1;
  return {from, to < image_end ? to : image_end, index, static_cast<int>(from - image_begin)};
}

// What h at pixels p … p + n − 1 depends on.
FFLFAST_DEVICE PixelRange needed(const Features& f, int64_t p, int64_t n) {
  return surroundings(f, p, n, f.width + 1);
}

template <class T>
struct PixelTile {
  T* data;        // 16-byte aligned
  int pitch;      // elements from one pixel to the next; even for 16 bits
  int64_t first;  // pixel of row 0; before the batch where it is negative
  int rows;
  int phase;      // of row 0 in its image

  FFLFAST_DEVICE T* at(int row, int channel) const { return data + row * pitch + channel; }
};

// Bytes of shared memory of a tile, a multiple of 16.
template <class T, int KC>
constexpr size_t tile_bytes(int rows) {
  return static_cast<size_t>(rows) * (KC + kPack<T>) * sizeof(T);
}

// Packs of channels want rows of 16-byte multiples; single elements that neighbouring threads bring for neighbouring
// pixels want rows that fall into different banks.
template <class T, int KC>
FFLFAST_DEVICE int tile_pitch(Access access) {
  return access == Access::kChannelPacks ? KC + kPack<T> : KC + kLaneChannels<T>;
}

template <class T, int KC>
FFLFAST_DEVICE PixelTile<T> pixel_tile(const Features& f, Access access, T* data, int64_t first, int rows) {
  const int64_t image = f.image(), phase = first % image;
  return {data, tile_pitch<T, KC>(access), first, rows, static_cast<int>(phase < 0 ? phase + image : phase)};
}

// Where the pixels of a range lie in a map: addresses from the image that the range begins in.
struct PixelOffsets {
  const Features& f;
  const Feature& map;
  int phase;  // of the range's begin in its image
  int64_t base;

  FFLFAST_DEVICE PixelOffsets(const Features& f, const Feature& map, int channel, const PixelRange& range)
      : f(f), map(map), phase(range.phase), base(range.image * map.stride_b + channel * map.stride_c) {}

  // Of the n-th pixel of the range, in elements.
  FFLFAST_DEVICE int64_t operator()(int n) const {
    const auto at = static_cast<unsigned>(phase + n);
    const unsigned image = f.by_image(at), pixel = at - image * static_cast<unsigned>(f.image());
    const unsigned y = f.by_width(pixel), x = pixel - y * static_cast<unsigned>(f.width);
    return base + image * map.stride_b + y * map.stride_h + x * map.stride_w;
  }
};

// Calls body(pixel of the range, channel, offset) so that neighbouring threads are neighbours in memory; `channels` of
// body's channels are adjacent in the map and start at a multiple of `channels`.
template <int KC, class Body>
FFLFAST_DEVICE void each_element(const PixelOffsets& offsets, Access access, int pixels, const Body& body) {
  const int threads = simt::block_size();
  if (access == Access::kPixels) {
    constexpr int kPart = 8;
    for (int i = simt::thread_index(); i < pixels * (KC / kPart); i += threads) {
      const int n = i % pixels, c = i / pixels * kPart;
      const int64_t offset = offsets(n) + c * offsets.map.stride_c;
      FFLFAST_UNROLL
      for (int k = 0; k < kPart; ++k) body(n, c + k, offset + k * offsets.map.stride_c);
    }
  } else {
    for (int i = simt::thread_index(); i < pixels * KC; i += threads)
      body(i / KC, i % KC, offsets(i / KC) + i % KC * offsets.map.stride_c);
  }
}

// Calls body(first pixel of the range, which may be before it, channel, offset) for packs of an image's pixels. The
// lanes of a warp are 32 / width packs of `width` channels, so that their elements fall into different banks.
template <class T, int KC, class Body>
FFLFAST_DEVICE void each_pixel_pack(const PixelOffsets& offsets, int pixels, const Body& body) {
  constexpr int kWidth = kPack<T>, kBeside = simt::kWarpSize / kWidth;
  const int skew = offsets.phase % kWidth, packs = (skew + pixels + kWidth - 1) / kWidth;
  const int groups = (packs + kBeside - 1) / kBeside;
  const int warps = simt::block_size() / simt::kWarpSize;
  for (int i = simt::warp_index(); i < groups * (KC / kWidth); i += warps) {
    const int pack = i % groups * kBeside + simt::lane_index() / kWidth;
    const int c = i / groups * kWidth + simt::lane_index() % kWidth, n = pack * kWidth - skew;
    if (pack < packs) body(n, c, offsets(n) + c * offsets.map.stride_c);
  }
}

// Fills `tile` with the pixels of `range`, of a block of channels; what is outside of either is zero. All threads of
// the block take part; the numbers are there after copy_async_commit, copy_async_wait and a barrier.
template <class T, int KC>
FFLFAST_DEVICE void load_pixels(const Features& f, const ChannelBlock& block, const PixelRange& range,
                                const PixelTile<T>& tile) {
  constexpr int kWidth = kPack<T>;
  const Feature& map = f.map[block.map];
  const T* const data = static_cast<const T*>(map.data);
  const PixelOffsets offsets(f, map, block.first, range);
  const int pixels = static_cast<int>(range.end - range.begin), shift = static_cast<int>(range.begin - tile.first);
  const int threads = simt::block_size();
  for (int i = simt::thread_index(); i < (tile.rows - pixels) * KC; i += threads) {
    const int row = i / KC < shift ? i / KC : i / KC + pixels;
    *tile.at(row, i % KC) = T{};
  }
  if (map.access == Access::kChannelPacks) {
    constexpr int kPacks = KC / kWidth;
    for (int i = simt::thread_index(); i < pixels * kPacks; i += threads) {
      const int n = i / kPacks, c = i % kPacks * kWidth;
      T* const to = tile.at(shift + n, c);
      if (c < block.count)
        simt::copy_async<16>(to, data + offsets(n) + c);
      else
        *reinterpret_cast<Pack<T, kWidth>*>(to) = Pack<T, kWidth>{};
    }
  } else if (map.access == Access::kPixelPacks) {
    each_pixel_pack<T, KC>(offsets, pixels, [&](int n, int c, int64_t offset) {
      Pack<T, kWidth> pack{};
      if (c < block.count) pack = simt::load_cached<T, kWidth>(data + offset);
      FFLFAST_UNROLL
      for (int k = 0; k < kWidth; ++k)
        if (n + k >= 0 && n + k < pixels) *tile.at(shift + n + k, c) = pack[k];
    });
  } else {
    each_element<KC>(offsets, map.access, pixels, [&](int n, int c, int64_t offset) {
      T* const to = tile.at(shift + n, c);
      if (c >= block.count)
        *to = T{};
      else if constexpr (sizeof(T) == 4)
        simt::copy_async<4>(to, data + offset);
      else
        *to = simt::load_cached<T, 1>(data + offset)[0];
    });
  }
}

// Writes the pixels of `range` to a map of the same shape; what load_pixels is in the other direction.
template <class T, int KC>
FFLFAST_DEVICE void store_pixels(const Features& f, const Feature& map, const ChannelBlock& block,
                                 const PixelRange& range, const PixelTile<T>& tile) {
  constexpr int kWidth = kPack<T>;
  T* const data = const_cast<T*>(static_cast<const T*>(map.data));
  const PixelOffsets offsets(f, map, block.first, range);
  const int pixels = static_cast<int>(range.end - range.begin), shift = static_cast<int>(range.begin - tile.first);
  if (map.access == Access::kChannelPacks && tile.pitch % kWidth == 0) {
    constexpr int kPacks = KC / kWidth;
    for (int i = simt::thread_index(); i < pixels * kPacks; i += simt::block_size()) {
      const int n = i / kPacks, c = i % kPacks * kWidth;
      if (c < block.count)
        simt::store_streaming<T, kWidth>(data + offsets(n) + c,
                                         *reinterpret_cast<const Pack<T, kWidth>*>(tile.at(shift + n, c)));
    }
  } else if (map.access == Access::kPixelPacks && offsets.phase % kWidth == 0 && pixels % kWidth == 0) {
    each_pixel_pack<T, KC>(offsets, pixels, [&](int n, int c, int64_t offset) {
      if (c >= block.count) return;
      Pack<T, kWidth> pack;
      FFLFAST_UNROLL
      for (int k = 0; k < kWidth; ++k) pack[k] = *tile.at(shift + n + k, c);
      simt::store_streaming<T, kWidth>(data + offset, pack);
    });
  } else {
    const Access access = map.access == Access::kChannelPacks || map.access == Access::kChannels ? Access::kChannels
                                                                                                 : Access::kPixels;
    each_element<KC>(offsets, access, pixels, [&](int n, int c, int64_t offset) {
      if (c < block.count) data[offset] = *tile.at(shift + n, c);
    });
  }
}

}  // namespace fflfast::cuda
