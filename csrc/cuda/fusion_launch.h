// The fusion's matrix products, as the operators call them. A stage has a function that says how many bytes of memory
// it wants for as long as its launches run (`workspace`, 16-byte aligned, not initialised) and one that launches it;
// both are given the same operands. No header of PyTorch comes in here.
#pragma once

#include "fusion_operands.h"
#include "simt.h"

namespace fflfast::cuda {

// Sides of the tiles.
constexpr int kLargeSide = 128, kSmallSide = 64;

// How a stage is cut into blocks; from fusion_product_policy.h.
struct ProductPlan {
  int32_t large;         // tiles of 128 × 128, else of 64 × 64
  int32_t column_tiles;  // of outputs (forward), of channels (backward)
  int32_t row_tiles;     // of pixels
  int32_t splits;        // blocks that share a column tile: each takes every splits-th row tile
};

// What all stages are given.
struct ProductOperands {
  Features features;
  WeightOperand depthwise, pointwise;
  NormOperand norm1;
  int32_t outputs;
};

struct PointwiseOperands {
  ProductOperands in;
  void* y;          // (B, H·W, O)
  float* moments;   // (2, O) of y: mean, M2; null: not wanted
  void* workspace;
  Tickets tickets;
};

struct InferenceOperands {
  ProductOperands in;
  NormOperand norm2;
  void* pooled;  // (B, O)
};

struct BackwardSumsOperands {
  ProductOperands in;
  NormOperand norm2;
  const void* grad;       // (B, O), of pooled
  const void* y;          // (B, H·W, O)
  const float* sums2;     // (2, O): dβ2, dγ2
  float* sums1;           // (2, C): dβ1, dγ1
  void* dz;               // (B, H·W, C): gradient of the first norm's output
  void* weight_gradient;  // (O, C) of the pointwise weight's dtype; null: not wanted, and no second launch
  void* workspace;
  Tickets tickets;        // of both launches, which run one after the other
};

// The functions of one arithmetic. A stage's workspace is in bytes.
struct ProductFunctions {
  // False where a row of an image is too wide for the shared memory of a block.
  bool (*take)(const Features& features, const simt::DeviceProperties& device);
  size_t (*pointwise_workspace)(const PointwiseOperands& o, const simt::DeviceProperties& device);
  void (*launch_pointwise)(const PointwiseOperands& o, const simt::DeviceProperties& device, void* stream);
  void (*launch_inference)(const InferenceOperands& o, const simt::DeviceProperties& device, void* stream);
  size_t (*backward_sums_workspace)(const BackwardSumsOperands& o, const simt::DeviceProperties& device);
  void (*launch_backward_sums)(const BackwardSumsOperands& o, const simt::DeviceProperties& device, void* stream);
};

extern const ProductFunctions kFloat32Products, kTf32Products, kBFloat16Products, kFloat16Products;

// float32 features are multiplied in float32, or in tf32 where the caller allows it.
inline const ProductFunctions& products_of(Storage storage, bool tf32) {
  if (storage == Storage::kFloat32) return tf32 ? kTf32Products : kFloat32Products;
  return storage == Storage::kBFloat16 ? kBFloat16Products : kFloat16Products;
}

}  // namespace fflfast::cuda
