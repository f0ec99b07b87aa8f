// What a kernel file makes of the rows: the table of functions of one instruction set (see vec.h).
#pragma once

#include "shape_kernel.h"

namespace fflfast {
namespace FFLFAST_ISA {

template <class Kernel>
void forward_chunks(const Plan& plan, int64_t begin, int64_t end) {
  Kernel kernel(plan);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    double* total = plan.partial + chunk * (1 + plan.num_terms);
    for (int k = 0; k <= plan.num_terms; ++k) total[k] = 0;
    const int64_t first = chunk * plan.rows_per_chunk, next = first + plan.rows_per_chunk;
    for (int64_t row = first; row < (next < plan.rows ? next : plan.rows); ++row) kernel.forward(row, total);
  }
}

template <class S>
void forward_rows(const Plan& plan, int64_t begin, int64_t end) {
  if (sizeof(S) == 4 && plan.power > 0) {
    if (ShapeKernel<FflShape<2>>::fits(plan)) return forward_chunks<ShapeKernel<FflShape<2>>>(plan, begin, end);
    if (ShapeKernel<DmlShape>::fits(plan)) return forward_chunks<ShapeKernel<DmlShape>>(plan, begin, end);
    if (ShapeKernel<KdShape>::fits(plan)) return forward_chunks<ShapeKernel<KdShape>>(plan, begin, end);
    return forward_chunks<PowerKernel>(plan, begin, end);
  }
  forward_chunks<RowKernel<S>>(plan, begin, end);
}

template <class S>
void backward_rows(const Plan& plan, int64_t begin, int64_t end) {
  RowKernel<S> kernel(plan);
  const int64_t last = end * plan.rows_per_chunk;
  for (int64_t row = begin * plan.rows_per_chunk; row < (last < plan.rows ? last : plan.rows); ++row)
    kernel.backward(row);
}

template <class S>
void scale_numbers(void* gradient, double factor, int64_t count) {
  typedef Accumulation<S> A;
  S* g = static_cast<S*>(gradient);
  const auto f = set<A>(static_cast<A>(factor));
  for (int64_t c = 0; c < count; c += kBlock) {
    const int n = static_cast<int>(count - c < kBlock ? count - c : kBlock);
    S* block = g + c;
    for_each_vector(block, n, A(0), [&](int i, auto v) {
      // Exactly 0 stays 0 whatever the factor: an ignored row gets none of an infinite grad_output.
      const auto scaled = v == A(0) ? v : v * f;
      if (i + Vec<A>::kWidth <= n)
        store(block + i, scaled);
      else
        store_tail(block + i, scaled, n - i);
    });
  }
}

void forward(const Plan& plan, Storage storage, int64_t begin, int64_t end) {
  switch (storage) {
    case Storage::kFloat32: return forward_rows<float>(plan, begin, end);
    case Storage::kFloat64: return forward_rows<double>(plan, begin, end);
    case Storage::kBFloat16: return forward_rows<BFloat16>(plan, begin, end);
    case Storage::kFloat16: return forward_rows<Half>(plan, begin, end);
  }
}

void backward(const Plan& plan, Storage storage, int64_t begin, int64_t end) {
  switch (storage) {
    case Storage::kFloat32: return backward_rows<float>(plan, begin, end);
    case Storage::kFloat64: return backward_rows<double>(plan, begin, end);
    case Storage::kBFloat16: return backward_rows<BFloat16>(plan, begin, end);
    case Storage::kFloat16: return backward_rows<Half>(plan, begin, end);
  }
}

void scale_gradient(void* gradient, Storage storage, double factor, int64_t count) {
  switch (storage) {
    case Storage::kFloat32: return scale_numbers<float>(gradient, factor, count);
    case Storage::kFloat64: return scale_numbers<double>(gradient, factor, count);
    case Storage::kBFloat16: return scale_numbers<BFloat16>(gradient, factor, count);
    case Storage::kFloat16: return scale_numbers<Half>(gradient, factor, count);
  }
}

const Kernels kKernels = {FFLFAST_ISA_NAME, forward, backward, scale_gradient};

}  // namespace FFLFAST_ISA
}  // namespace fflfast
