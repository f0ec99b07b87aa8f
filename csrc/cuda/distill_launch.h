// What the operators ask of the files that hold the kernels. No header of PyTorch comes in here, so that nvcc reads
// them once only.
#pragma once

#include "../distill_graph.h"
#include "distill_operands.h"
#include "simt.h"

namespace fflfast::cuda {

// The most mixtures that the on-chip kernel for M logits tensors and V mixtures is compiled for; −1: none is.
inline int held_mixtures(int logits, int mixtures) {
  if (logits > 4 || mixtures > (logits == 1 ? 0 : logits)) return -1;
  return logits == 1 ? 0 : mixtures <= 1 ? 1 : logits;
}

// False where the kernel does not take the case.
bool plan_rows(const Graph& graph, const Operands& o, int element_size, const simt::DeviceProperties& device,
               Geometry* geometry);
template <class T>
void launch_rows(const Graph& graph, const Operands& o, const Geometry& geometry, void* stream);

template <class T>
bool plan_sweeps(const double* flat, const Operands& o, const simt::DeviceProperties& device, Geometry* geometry);
template <class T>
void launch_sweeps(const double* flat, const Operands& o, const Geometry& geometry, void* stream);

void launch_count(const Operands& o, int64_t grid, int64_t* count, void* stream);

// In place, over tensors of `sizes` elements.
template <class T>
void launch_scale(const Number& grad_loss, void* const* gradients, const int64_t* sizes, int count,
                  const simt::DeviceProperties& device, void* stream);

}  // namespace fflfast::cuda
