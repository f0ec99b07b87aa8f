// The arguments of the private operators as plain numbers and addresses, checked once for every native backend.
#pragma once

#include "distill_graph.h"
#include "shim.h"

namespace fflfast {

enum class Target : uint8_t { kNone, kIndex, kProbabilities };
enum class Reduction : uint8_t { kNone = 0, kMean = 1, kSum = 2 };

struct DistillArguments {
  Graph graph;            // in float, which is exact enough for every dtype but float64
  GraphOf<double> exact;  // the same for float64 logits
  int64_t rows;
  int64_t classes;
  Dtype dtype;
  const void* logits[kMaxLogits];
  int64_t row_stride[kMaxLogits];  // in elements
  Target target_kind = Target::kNone;
  const void* target = nullptr;
  int64_t target_stride = 0;  // rows of probabilities, in elements
  Scalar temperature, kl_weight, ce_weight;
  double label_smoothing, target_eps;
  int64_t ignore_index;
  Reduction reduction;

  Dtype wide() const { return accumulation(dtype); }
  int num_terms() const {
    int count = graph.num_edges;
    for (int i = 0; i < graph.num_logits; ++i) count += graph.ce_weight[i] != 0.0f;
    return count;
  }
};

// Throws where memory would be read wrongly; what a user can get wrong has been checked in Python.
inline DistillArguments read_arguments(const char* op, const std::vector<Tensor>& logits,
                                       const std::optional<Tensor>& target, const Tensor& temperature,
                                       const Tensor& kl_weight, const Tensor& ce_weight, const Tensor& table,
                                       double label_smoothing, int64_t ignore_index, double target_eps,
                                       int64_t reduction) {
  DistillArguments a;
  expect_dtype(table, Dtype::kFloat64, op, "the graph's table");
  require(table.is_cpu() && table.numel() >= 3, op, ": expected the graph's table on the CPU");
  const double* flat = static_cast<const double*>(data(table));
  require(table.numel() == flat_size(flat), op, ": expected a table of ", flat_size(flat), " numbers, got ",
          table.numel());
  read_graph(flat, &a.exact);
  require(read_graph(flat, &a.graph), op, ": expected at most ", kMaxLogits, " logits, ", kMaxMixtures,
          " mixtures and ", kMaxEdges, " edges; the reference backend takes larger graphs");
  require(static_cast<size_t>(a.graph.num_logits) == logits.size(), op, ": expected ", a.graph.num_logits,
          " logits tensors, got ", logits.size());
  a.dtype = dtype_of(logits[0]);
  require(a.dtype != Dtype::kOther && a.dtype != Dtype::kInt64, op,
          ": expected logits of float32, float64, bfloat16 or float16");
  require(logits[0].dim() == 2, op, ": expected logits (rows, classes), got ", logits[0].dim(), " dimensions");
  a.rows = logits[0].size(0);
  a.classes = logits[0].size(1);
  require(a.rows > 0 && a.classes > 0, op, ": expected at least one row and one class");
  for (size_t i = 0; i < logits.size(); ++i) {
    const Tensor& z = logits[i];
    expect_dtype(z, a.dtype, op, "logits");
    require(z.dim() == 2 && z.size(0) == a.rows && z.size(1) == a.classes, op, ": expected logits ", i, " of shape (",
            a.rows, ", ", a.classes, ")");
    require(a.classes == 1 || z.stride(1) == 1, op, ": expected adjacent classes in logits ", i, ", got stride ",
            z.stride(1), "; call contiguous()");
    a.logits[i] = data(z);
    a.row_stride[i] = z.stride(0);
  }
  if (target.has_value()) {
    const bool index = dtype_of(*target) == Dtype::kInt64;
    a.target_kind = index ? Target::kIndex : Target::kProbabilities;
    a.target = data(*target);
    require(target->dim() == (index ? 1 : 2) && target->size(0) == a.rows, op,
            ": expected a target of class indices (rows,) or probabilities (rows, classes)");
    if (index) {
      require(a.rows == 1 || target->stride(0) == 1, op, ": expected contiguous class indices");
    } else {
      expect_dtype(*target, a.wide(), op, "target probabilities");
      require(target->size(1) == a.classes, op, ": expected ", a.classes, " target probabilities a row, got ",
              target->size(1));
      require(a.classes == 1 || target->stride(1) == 1, op, ": expected adjacent target probabilities");
      a.target_stride = target->stride(0);
    }
  }
  for (int i = 0; i < a.graph.num_logits; ++i)
    require(target.has_value() || a.graph.ce_weight[i] == 0.0f, op,
            ": expected a target, as the graph has cross-entropy terms");
  a.temperature = read_scalar(temperature, a.wide(), op, "temperature");
  a.kl_weight = read_scalar(kl_weight, a.wide(), op, "kl_weight");
  a.ce_weight = read_scalar(ce_weight, a.wide(), op, "ce_weight");
  require(!logits[0].is_cpu() || (temperature.is_cpu() && kl_weight.is_cpu() && ce_weight.is_cpu()), op,
          ": expected temperature, kl_weight and ce_weight on the CPU for logits on the CPU");
  a.label_smoothing = label_smoothing;
  a.target_eps = target_eps;
  a.ignore_index = ignore_index;
  require(reduction >= 0 && reduction <= 2, op, ": expected reduction 0, 1 or 2, got ", reduction);
  a.reduction = static_cast<Reduction>(reduction);
  return a;
}

// Checks what the backward operator has besides.
inline void expect_backward(const char* op, const DistillArguments& a, const Tensor& grad_loss,
                            const Tensor& statistics) {
  expect_dtype(grad_loss, a.wide(), op, "grad_loss");
  expect_dtype(statistics, a.wide(), op, "statistics");
  const int64_t count = a.reduction == Reduction::kNone ? a.rows : 1;
  require(grad_loss.numel() == count, op, ": expected grad_loss with ", count, " elements, got ", grad_loss.numel());
  require(count == 1 || grad_loss.stride(0) == 1, op, ": expected a contiguous grad_loss");
  require(statistics.is_contiguous() && statistics.numel() == 1 + a.rows * a.graph.width(), op, ": expected ",
          1 + a.rows * a.graph.width(), " contiguous statistics, got ", statistics.numel());
}

}  // namespace fflfast
