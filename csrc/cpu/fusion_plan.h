// One call's work on feature maps as plain data: what fusion.cpp (baseline code) fills in and the kernel files read.
//
// A chunk is a few whole images, or a strip of rows of one large image; a unit of work is a chunk times a block of
// channels, one vector wide. The cut depends on shapes alone, so sums do not depend on threads.
#pragma once

#include <cstdint>

namespace fflfast {

constexpr int kMaxFeatures = 8;

// How a block of channels is loaded: a vector a pixel, a vector a channel (then transposed), or number by number.
enum class Access : uint8_t { kChannels, kPixels, kAny };

struct Strides {
  int64_t batch, channel, row, column;  // in elements
  Access access;
};

struct FeatureMap {
  const float* data;
  float* gradient;  // null where not wanted
  Strides strides, gradient_strides;
};

struct ChannelBlock {
  int map;
  int lanes;        // channels of the block, at most a vector's width
  int64_t first;    // its first channel within the map
  int64_t channel;  // and within the concatenation
};

struct FusionPlan {
  FeatureMap map[kMaxFeatures];
  const ChannelBlock* block;
  int64_t num_blocks;
  int64_t batch, height, width, channels;
  int64_t images_per_chunk;  // 1 where there is more than one strip
  int64_t strip_rows, strips;

  // A number a channel each, with a vector's width to spare at the end. Tap t of channel c is taps[t·spaced + c].
  int64_t spaced;
  const float *taps, *scale, *shift, *mean, *rstd;
  const float *bias_share, *weight_share;  // a training norm's sums ÷ count
  bool training;

  float* rows;      // (batch·height·width, channels): a is written, ∂L/∂a masked in place, ∂L/∂z read
  double* partial;  // a chunk: k sums of each channel, (k, channels)

  // Inlined always: the kernel files, compiled for one machine each, must not share a function (see vec.h).
  [[gnu::always_inline]] int64_t pixels() const { return height * width; }
  [[gnu::always_inline]] int64_t chunk_pixels() const {
    return strips > 1 ? strip_rows * width : images_per_chunk * pixels();
  }
  [[gnu::always_inline]] int64_t chunks() const { return (batch + images_per_chunk - 1) / images_per_chunk * strips; }
};

// y and what belongs to it: rows of pixels × O columns.
struct PoolPlan {
  const float* y;
  int64_t batch, pixels, columns;
  const float *scale, *shift, *mean, *rstd;  // a number a column, with a vector's width to spare
  const float *bias_share, *weight_share;
  bool training;
  const float* grad;        // (batch, columns), for grad_y
  float* out;               // pool: pooled (batch, columns); grad_y: dy like y
  float *active, *hat_sum;  // (batch, columns) each, or null
  double* partial;          // moments: a chunk of kMomentRows rows: mean, M2 of each column
};

constexpr int64_t kMomentRows = 128;

struct FusionKernels {
  int width;  // numbers in a vector
  // Numbers of scratch memory, aligned to 64 bytes, that a call of the four functions below wants.
  int64_t (*scratch)(const FusionPlan&);
  void (*statistics)(const FusionPlan&, int64_t begin, int64_t end, float* scratch);
  void (*activate)(const FusionPlan&, int64_t begin, int64_t end, float* scratch);
  void (*mask)(const FusionPlan&, int64_t begin, int64_t end, float* scratch);
  void (*inputs)(const FusionPlan&, int64_t begin, int64_t end, float* scratch);
  void (*moments)(const PoolPlan&, int64_t rows, int64_t begin, int64_t end);  // chunks of rows
  void (*pool)(const PoolPlan&, int64_t begin, int64_t end);                   // images
  void (*grad_y)(const PoolPlan&, int64_t begin, int64_t end);                 // images
};

// Null where the compiler's target has no such instructions.
const FusionKernels* baseline_fusion();
const FusionKernels* avx2_fusion();
const FusionKernels* avx512_fusion();

}  // namespace fflfast
