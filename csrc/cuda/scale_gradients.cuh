// g ← round(g · grad_loss) for up to 16 tensors: the backward pass of the fast form, whose gradients are those of a
// grad_output of 1. Where grad_loss is 1, the common case, each block reads that number and leaves.
// Bytes: 2·M·R·C·e, or 0. Launches: one.
#pragma once

#include "distill_loss_common.cuh"

namespace fflfast::cuda {

struct Scaling {
  Number grad_loss;
  void* gradients[kOperandLogits];
  int64_t sizes[kOperandLogits];  // elements; 0 for none
};

// A gradient of exactly 0 stays 0 whatever the factor: an ignored row gets none of an infinite grad_output.
template <class T, class A>
FFLFAST_DEVICE T scaled(T gradient, A factor) {
  const A wide = simt::convert<A>(gradient);
  return wide == A(0) ? gradient : simt::convert<T>(wide * factor);
}

template <class T>
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(256) void scale_gradients(const FFLFAST_GRID_CONSTANT Scaling s) {
  using A = Wide<T>;
  constexpr int kWidth = 16 / sizeof(T);
  const A factor = read<A>(s.grad_loss);
  if (factor == A(1)) return;
  const int64_t first = simt::block_index() * simt::block_size() + simt::thread_index();
  const int64_t step = simt::grid_size() * simt::block_size();
  for (int i = 0; i < kOperandLogits; ++i) {
    T* g = static_cast<T*>(s.gradients[i]);
    const bool aligned = reinterpret_cast<uintptr_t>(g) % 16 == 0;
    const int64_t packs = aligned ? s.sizes[i] / kWidth : 0;
    for (int64_t k = first; k < packs; k += step) {
      Pack<T, kWidth> pack = simt::load_streaming<T, kWidth>(g + k * kWidth);
      FFLFAST_UNROLL
      for (int j = 0; j < kWidth; ++j) pack[j] = scaled(pack[j], factor);
      simt::store_streaming<T, kWidth>(g + k * kWidth, pack);
    }
    for (int64_t k = packs * kWidth + first; k < s.sizes[i]; k += step)
      g[k] = scaled(g[k], factor);
  }
}

}  // namespace fflfast::cuda
