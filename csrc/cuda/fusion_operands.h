// What the kernels of the fused feature fusion are launched with: addresses and numbers, by value.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fflfast::cuda {

constexpr int kFeatureMaps = 8;
// Counters of a launch (fusion_moments.cuh), and launches that have counters of their own.
constexpr int kFusionCounters = 16;
constexpr int kFusionTickets = 2048;

// The dtype of feature maps, y and gradients: what a kernel computes products in. Sums are float32.
enum class Storage : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// How a block's threads move over a feature map (fusion_features.cuh).
enum class Access : int32_t {
  kChannelPacks = 0,  // 16 bytes of adjacent channels at once
  kPixelPacks = 1,    // 16 bytes of adjacent pixels of an image at once
  kChannels = 2,      // single elements, neighbouring threads on neighbouring channels
  kPixels = 3,        // single elements, neighbouring threads on neighbouring pixels
};

// A tensor (B, channels, H, W) anywhere in memory; strides in elements.
struct Feature {
  const void* data;
  int32_t channels;
  Access access;
  int64_t stride_b, stride_c, stride_h, stride_w;
};

// n / d for 0 ≤ n < 2^31 without a division, by Granlund and Montgomery's multiplier.
struct Divider {
  uint32_t multiplier = 1, shift = 0;

  constexpr Divider() = default;
  explicit constexpr Divider(uint32_t d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1);
  }
  constexpr uint32_t operator()(uint32_t n) const {
    return (static_cast<uint32_t>(static_cast<uint64_t>(multiplier) * n >> 32) + n) >> shift;
  }
};

// The virtual concat: channel c of it is channel c − first_channel[k] of map k.
struct Features {
  Feature map[kFeatureMaps];
  int32_t first_channel[kFeatureMaps];
  int32_t count;
  int32_t channels;  // of all maps
  int32_t height, width;
  int64_t batch;
  Divider by_image, by_width;
  constexpr int32_t image() const { return height * width; }
  constexpr int64_t pixels() const { return batch * height * width; }
};

// Up to KC channels of one map; the blocks of all maps in order tile the virtual concat, none straddles two maps.
struct ChannelBlock {
  int32_t map;
  int32_t first;   // in the map
  int32_t whole;   // in the virtual concat
  int32_t count;   // 1 … KC
};

// Of width × height weights, contiguous, in float32 or in the feature maps' dtype, to which they are rounded.
struct WeightOperand {
  const void* data;
  int32_t is_float32;
};

// One batch norm; without training, m2 is the running variance and the count is 1.
struct NormOperand {
  const float* mean;
  const float* m2;
  const float* weight;  // null: ones
  const float* bias;    // null: zeros
  const float* count;   // null: known_count
  float known_count;
  float eps;
  int32_t training;
};

// Where a launch counts its finished blocks: counters of its own, else number `slot` of the library's.
struct Tickets {
  unsigned* own;
  int32_t slot;
};

}  // namespace fflfast::cuda
