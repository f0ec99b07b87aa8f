// From the fusion operators' arguments to the plans that the kernels follow.
#pragma once

#include <cmath>
#include <memory>

#include "../shim.h"
#include "fusion_plan.h"

namespace fflfast {

// A number a channel, with room for a whole vector at the last one.
using Column = std::vector<float>;
constexpr int64_t kSpare = 16;

// Scratch memory on a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t numbers) : memory_(new float[numbers + kSpare]) {}
  float* get() const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
  }

 private:
  std::unique_ptr<float[]> memory_;
};

struct NormArguments {
  const Tensor &mean, &m2, &count;
  const std::optional<Tensor>&weight, &bias;
  double eps;
  bool training;
};

// What a norm is to the kernels: z = scale·h + shift, ĥ = (h − mean)·rstd, and its sums ÷ count.
struct NormNumbers {
  Column scale, shift, mean, rstd, bias_share, weight_share;
  bool training;

  template <class Plan>
  void give(Plan* plan) const {
    plan->scale = scale.data();
    plan->shift = shift.data();
    plan->mean = mean.data();
    plan->rstd = rstd.data();
    plan->bias_share = bias_share.data();
    plan->weight_share = weight_share.data();
    plan->training = training;
  }
};

inline const float* expect_column(const Tensor& tensor, int64_t size, const char* op, const char* name) {
  expect_dtype(tensor, Dtype::kFloat32, op, name);
  require(tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == size, op, ": expected ", name, " of shape (", size,
          ",) on the CPU");
  return static_cast<const float*>(data(tensor));
}

inline NormNumbers read_norm(const char* op, const NormArguments& norm, int64_t size, const Tensor* sums = nullptr) {
  const float *mean = expect_column(norm.mean, size, op, "mean"), *m2 = expect_column(norm.m2, size, op, "m2");
  const float* weight = norm.weight ? expect_column(*norm.weight, size, op, "a norm's weight") : nullptr;
  const float* bias = norm.bias ? expect_column(*norm.bias, size, op, "a norm's bias") : nullptr;
  const int64_t mean_step = norm.mean.stride(0), m2_step = norm.m2.stride(0);
  const int64_t weight_step = weight ? norm.weight->stride(0) : 0, bias_step = bias ? norm.bias->stride(0) : 0;
  require(norm.count.is_cpu(), op, ": expected a norm's count on the CPU");
  const double count = read_scalar(norm.count, Dtype::kFloat32, op, "a norm's count").value;
  NormNumbers out;
  out.training = norm.training;
  for (Column* column : {&out.scale, &out.shift, &out.mean, &out.rstd, &out.bias_share, &out.weight_share})
    column->resize(size + kSpare);
  for (int64_t c = 0; c < size; ++c) {
    const double rstd = 1.0 / std::sqrt(m2[c * m2_step] / count + norm.eps);
    out.mean[c] = mean[c * mean_step];
    out.rstd[c] = static_cast<float>(rstd);
    out.scale[c] = static_cast<float>(weight ? rstd * weight[c * weight_step] : rstd);
    out.shift[c] = static_cast<float>((bias ? bias[c * bias_step] : 0.0) -
                                      static_cast<double>(out.mean[c]) * static_cast<double>(out.scale[c]));
  }
  if (sums == nullptr || !norm.training) return out;
  expect_dtype(*sums, Dtype::kFloat32, op, "a norm's sums");
  require(sums->is_contiguous() && sums->dim() == 2 && sums->size(0) == 2 && sums->size(1) == size, op,
          ": expected contiguous sums (2, ", size, ")");
  const float* sum = static_cast<const float*>(data(*sums));
  for (int64_t c = 0; c < size; ++c) {
    out.bias_share[c] = static_cast<float>(sum[c] / count);
    out.weight_share[c] = static_cast<float>(sum[size + c] / count);
  }
  return out;
}

inline Strides strides_of(const Tensor& x) {
  const int64_t channels = x.size(1), width = x.size(3);
  Strides s{x.stride(0), x.stride(1), x.stride(2), x.stride(3), Access::kAny};
  if ((channels > 1 && s.channel == 1) || (channels == 1 && s.column != 1))
    s.access = Access::kChannels;
  else if (width == 1 || s.column == 1)
    s.access = Access::kPixels;
  return s;
}

// A call's feature maps and depthwise weight. Its plan points into it.
struct FeatureArguments {
  FusionPlan plan{};
  std::vector<ChannelBlock> blocks;
  Column taps;

  FeatureArguments(const char* op, const std::vector<Tensor>& features, const Tensor& weight, int width) {
    require(!features.empty() && features.size() <= kMaxFeatures, op, ": expected 1 to ", kMaxFeatures,
            " feature maps, got ", features.size());
    for (size_t k = 0; k < features.size(); ++k) {
      const Tensor& x = features[k];
      expect_dtype(x, Dtype::kFloat32, op, "feature maps");
      require(x.is_cpu() && x.dim() == 4, op, ": expected feature maps (B, C, H, W) on the CPU");
      if (k == 0) {
        plan.batch = x.size(0);
        plan.height = x.size(2);
        plan.width = x.size(3);
      }
      require(x.size(0) == plan.batch && x.size(2) == plan.height && x.size(3) == plan.width && x.numel() > 0, op,
              ": expected feature maps of one batch and size, none of them empty");
      plan.map[k].data = static_cast<const float*>(data(x));
      plan.map[k].strides = strides_of(x);
      for (int64_t c = 0; c < x.size(1); c += width) {
        const int lanes = static_cast<int>(x.size(1) - c < width ? x.size(1) - c : width);
        blocks.push_back({static_cast<int>(k), lanes, c, plan.channels + c});
      }
      plan.channels += x.size(1);
    }
    plan.block = blocks.data();
    plan.num_blocks = static_cast<int64_t>(blocks.size());
    // About as many pixels a chunk as pay for what a chunk costs, while its tiles stay in the second-level cache.
    constexpr int64_t kFewPixels = 256, kManyPixels = 1024;
    const int64_t pixels = plan.pixels();
    plan.strip_rows = pixels <= kManyPixels ? plan.height : plan.width < kManyPixels ? kManyPixels / plan.width : 1;
    plan.strips = (plan.height + plan.strip_rows - 1) / plan.strip_rows;
    plan.images_per_chunk = pixels < kFewPixels ? kFewPixels / pixels : 1;
    read_taps(op, weight);
  }
  FeatureArguments(const FeatureArguments&) = delete;

  // The plan of images [first, first + count) alone.
  FusionPlan part(int64_t first, int64_t count) const {
    FusionPlan part = plan;
    part.batch = count;
    for (FeatureMap& map : part.map) map.data += first * map.strides.batch;
    return part;
  }

  int64_t first_chunk(int64_t image) const { return image / plan.images_per_chunk * plan.strips; }

  // Pixels of a chunk: all have as many but the last strip of an image and the last few images.
  double count(int64_t chunk) const {
    const int64_t row = chunk % plan.strips * plan.strip_rows, rows = plan.height - row;
    const int64_t image = chunk / plan.strips * plan.images_per_chunk, images = plan.batch - image;
    return static_cast<double>((rows < plan.strip_rows ? rows : plan.strip_rows) * plan.width *
                               (images < plan.images_per_chunk ? images : plan.images_per_chunk));
  }

 private:
  void read_taps(const char* op, const Tensor& weight) {
    expect_dtype(weight, Dtype::kFloat32, op, "the depthwise weight");
    require(weight.is_cpu() && weight.dim() == 4 && weight.size(0) == plan.channels && weight.size(1) == 1 &&
                weight.size(2) == 3 && weight.size(3) == 3,
            op, ": expected a depthwise weight (", plan.channels, ", 1, 3, 3) on the CPU");
    plan.spaced = plan.channels + kSpare;
    taps.resize(9 * plan.spaced);
    const float* from = static_cast<const float*>(data(weight));
    const int64_t stride = weight.stride(0), row = weight.stride(2), column = weight.stride(3);
    for (int64_t c = 0; c < plan.channels; ++c)
      for (int t = 0; t < 9; ++t) taps[t * plan.spaced + c] = from[c * stride + t / 3 * row + t % 3 * column];
    plan.taps = taps.data();
  }
};

}  // namespace fflfast
