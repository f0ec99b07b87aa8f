// The arguments of the fusion's operators as plain numbers and addresses. Throws where memory would be read wrongly;
// what a user can get wrong has been checked in Python.
#pragma once

#include "../shim.h"
#include "fusion_launch.h"
#include "fusion_pixels.h"

#include <algorithm>

namespace fflfast {

inline cuda::Storage storage_of(const char* op, const Tensor& tensor, const char* name) {
  const Dtype dtype = dtype_of(tensor);
  require(dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16, op, ": expected ", name,
          " of float32, bfloat16 or float16, got ", name_of(dtype));
  return dtype == Dtype::kFloat32    ? cuda::Storage::kFloat32
         : dtype == Dtype::kBFloat16 ? cuda::Storage::kBFloat16
                                     : cuda::Storage::kFloat16;
}

inline Dtype dtype_of(cuda::Storage storage) {
  constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
  return kDtypes[static_cast<int>(storage)];
}

// How a block goes over a tensor (B, C, H, W). The stride of a dimension of size 1 does not matter.
inline cuda::Access access_of(const void* data, const int64_t (&size)[4], const int64_t (&stride)[4], int element) {
  const int64_t width = 16 / element;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  const auto steps = [&](int dimension) { return size[dimension] == 1 || stride[dimension] % width == 0; };
  if (aligned && stride[1] == 1 && size[1] % width == 0 && steps(0) && steps(2) && steps(3))
    return cuda::Access::kChannelPacks;
  const bool adjacent = (size[3] == 1 || stride[3] == 1) && (size[2] == 1 || stride[2] == size[3]);
  if (aligned && adjacent && size[2] * size[3] % width == 0 && steps(0) && steps(1)) return cuda::Access::kPixelPacks;
  const int inner = size[3] > 1 ? 3 : 2;
  const bool pixels = size[inner] > 1 && (size[1] == 1 || stride[inner] < stride[1]);
  return pixels ? cuda::Access::kPixels : cuda::Access::kChannels;
}

inline cuda::Feature read_feature(const Tensor& map, void* data) {
  int64_t size[4], stride[4];
  for (int d = 0; d < 4; ++d) {
    size[d] = map.size(d);
    stride[d] = map.stride(d);
  }
  return {data, static_cast<int32_t>(size[1]), access_of(data, size, stride, element_size(dtype_of(map))),
          stride[0], stride[1], stride[2], stride[3]};
}

inline cuda::Features read_features(const char* op, const std::vector<Tensor>& maps) {
  cuda::Features f{};
  require(!maps.empty() && maps.size() <= cuda::kFeatureMaps, op, ": expected 1 to ", cuda::kFeatureMaps,
          " feature maps, got ", maps.size());
  const Tensor& like = maps[0];
  storage_of(op, like, "feature maps");
  int64_t channels = 0;
  for (size_t k = 0; k < maps.size(); ++k) {
    const Tensor& map = maps[k];
    expect_dtype(map, dtype_of(like), op, "feature maps");
    require(map.dim() == 4, op, ": expected feature maps (B, C, H, W), got ", map.dim(), " dimensions");
    require(map.size(0) == like.size(0) && map.size(2) == like.size(2) && map.size(3) == like.size(3), op,
            ": expected feature maps of one batch and size, got (", map.size(0), ", ·, ", map.size(2), ", ",
            map.size(3), ") beside (", like.size(0), ", ·, ", like.size(2), ", ", like.size(3), ")");
    require(map.numel() > 0, op, ": expected feature maps with elements");
    f.map[k] = read_feature(map, const_cast<void*>(data(map)));
    f.first_channel[k] = static_cast<int32_t>(channels);
    channels += map.size(1);
  }
  constexpr int64_t kMost = int64_t{1} << 28;
  require(channels < kMost && like.size(2) * like.size(3) < kMost, op,
          ": expected fewer than 2^28 channels, and pixels of an image, got ", channels, " and ",
          like.size(2) * like.size(3));
  f.count = static_cast<int32_t>(maps.size());
  f.channels = static_cast<int32_t>(channels);
  f.height = static_cast<int32_t>(like.size(2));
  f.width = static_cast<int32_t>(like.size(3));
  f.batch = like.size(0);
  f.by_image = cuda::Divider(static_cast<uint32_t>(f.image()));
  f.by_width = cuda::Divider(static_cast<uint32_t>(f.width));
  return f;
}

inline void expect_contiguous(const char* op, const char* name, const Tensor& tensor, int64_t numbers) {
  require(tensor.numel() == numbers && tensor.is_contiguous(), op, ": expected ", name, " of ", numbers,
          " contiguous numbers, got ", tensor.numel());
}

// A float32 tensor of so many contiguous numbers.
inline const float* read_floats(const char* op, const char* name, const Tensor& tensor, int64_t numbers) {
  expect_dtype(tensor, Dtype::kFloat32, op, name);
  expect_contiguous(op, name, tensor, numbers);
  return static_cast<const float*>(data(tensor));
}

// A tensor of feature maps' dtype in one piece.
inline const void* read_values(const char* op, const char* name, const Tensor& tensor, Dtype dtype, int64_t numbers) {
  expect_dtype(tensor, dtype, op, name);
  expect_contiguous(op, name, tensor, numbers);
  return data(tensor);
}

inline cuda::WeightOperand read_weight(const char* op, const char* name, const Tensor& weight, Dtype dtype,
                                       int64_t numbers) {
  const bool wide = dtype_of(weight) == Dtype::kFloat32;
  if (!wide) expect_dtype(weight, dtype, op, name);
  expect_contiguous(op, name, weight, numbers);
  return {data(weight), wide};
}

// A number of values: known now where it is on the CPU, else read by the kernel. In the emulation, where everything is
// on the CPU, one of shape (1,) stands for one on the device.
struct Count {
  const float* device;
  float known;
};

inline Count read_count(const char* op, const Tensor& tensor) {
  expect_dtype(tensor, Dtype::kFloat32, op, "a count");
  require(tensor.numel() == 1, op, ": expected a count with one element, got ", tensor.numel());
  const float* const address = static_cast<const float*>(data(tensor));
#ifdef FFLFAST_EMULATE
  const bool on_host = tensor.dim() == 0;
#else
  const bool on_host = tensor.is_cpu();
#endif
  return on_host ? Count{nullptr, *address} : Count{address, 0.0f};
}

inline cuda::NormOperand read_norm(const char* op, const Tensor& mean, const Tensor& m2, const Tensor& count,
                                   const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                                   bool training, int64_t channels) {
  cuda::NormOperand n{};
  n.mean = read_floats(op, "a norm's mean", mean, channels);
  n.m2 = read_floats(op, "a norm's M2", m2, channels);
  n.weight = weight ? read_floats(op, "a norm's weight", *weight, channels) : nullptr;
  n.bias = bias ? read_floats(op, "a norm's bias", *bias, channels) : nullptr;
  const Count values = read_count(op, count);
  n.count = values.device;
  n.known_count = values.known;
  n.eps = static_cast<float>(eps);
  n.training = training;
  return n;
}

}  // namespace fflfast
