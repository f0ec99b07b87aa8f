// The private operators of the fused feature fusion, one text for every library that has them. Each is a stage of
// fflfast/ops/fusion_reference.py, which says what it computes; Python calls them with arguments that it has checked.
#pragma once

namespace fflfast {

// A norm in pieces: mean and M2 (C,) float32 with the count behind M2 (0-dim float32, on the CPU or on the device),
// weight and bias (C,) float32 or none. Frozen: mean and variance as they are, a count of 1, training false.
#define FFLFAST_NORM(n)                                                                              \
  "Tensor mean" #n ", Tensor m2_" #n ", Tensor count" #n ", Tensor? weight" #n ", Tensor? bias" #n  \
  ", float eps" #n ", bool training" #n

// features: 1 to 8 tensors (B, C_k, H, W) of one dtype, any strides. Weights: contiguous, in float32 or the features'
// dtype.
constexpr const char* kFusionSchemas[] = {
    "fusion_depthwise_statistics(Tensor[] features, Tensor depthwise_weight) -> Tensor[]",
    "fusion_pointwise(Tensor[] features, Tensor depthwise_weight, " FFLFAST_NORM(1) ", Tensor pointwise_weight, "
    "Tensor[] kept, bool statistics, bool tf32) -> Tensor[]",
    "fusion_pool(Tensor y, " FFLFAST_NORM(2) ") -> Tensor[]",
    "fusion_inference(Tensor[] features, Tensor depthwise_weight, " FFLFAST_NORM(1) ", Tensor pointwise_weight, "
    FFLFAST_NORM(2) ", bool tf32) -> Tensor",
    "fusion_backward_pool(Tensor grad, Tensor active, int pixels) -> Tensor",
    "fusion_backward_sums(Tensor grad, Tensor[] features, Tensor depthwise_weight, " FFLFAST_NORM(1) ", "
    "Tensor pointwise_weight, Tensor y, " FFLFAST_NORM(2) ", Tensor sums2, bool needs_weight, bool tf32) -> Tensor[]",
    // Bit k of needs: feature map k wants its gradient; bit N: the depthwise weight.
    "fusion_backward_inputs(Tensor[] features, Tensor depthwise_weight, " FFLFAST_NORM(1) ", Tensor sums1, "
    "Tensor[] kept, int needs) -> Tensor[]",
    // A momentum below zero stands for the cumulative average; an empty tensor of batches for no counter.
    "fusion_update_running(Tensor[] moments, Tensor[] counts, Tensor(a!)[] running, Tensor(b!)[] batches, "
    "float[] momentum) -> ()",
};

#undef FFLFAST_NORM

}  // namespace fflfast

// What a library that defines fflfast::depthwise_statistics and the rest says to register them all.
#define FFLFAST_IMPLEMENT_FUSION(m)                                                 \
  m.impl("fusion_depthwise_statistics", TORCH_BOX(&fflfast::depthwise_statistics)); \
  m.impl("fusion_pointwise", TORCH_BOX(&fflfast::pointwise));                       \
  m.impl("fusion_pool", TORCH_BOX(&fflfast::pool));                                 \
  m.impl("fusion_inference", TORCH_BOX(&fflfast::inference));                       \
  m.impl("fusion_backward_pool", TORCH_BOX(&fflfast::backward_pool));               \
  m.impl("fusion_backward_sums", TORCH_BOX(&fflfast::backward_sums));               \
  m.impl("fusion_backward_inputs", TORCH_BOX(&fflfast::backward_inputs));           \
  m.impl("fusion_update_running", TORCH_BOX(&fflfast::update_running));
