// The private operators of a native backend, one text for every library: fflfast_cpu, fflfast_cuda and the emulation.
// Python (fflfast/ops/native.py) calls them with arguments that it has checked.
#pragma once

namespace fflfast {

// logits: M tensors (R, C) of one dtype, class stride 1, any row stride. target: none, int64 (R,) or probabilities
// (R, C) of the accumulation dtype. table: the flat graph of csrc/distill_graph.h, float64, on the CPU.
// reduction: 0 none, 1 mean, 2 sum. Bit i of gradients says that logits i wants its gradient.
// Returns loss, terms, statistics where gradients is 0 (base form), else loss, terms, M gradients for a
// grad_output of 1 (fast form), an empty tensor where the bit is not set.
constexpr const char* kDistillLossSchema =
    "distill_loss(Tensor[] logits, Tensor? target, Tensor temperature, Tensor kl_weight, Tensor ce_weight, "
    "Tensor table, float label_smoothing, int ignore_index, float target_eps, int reduction, int gradients) "
    "-> Tensor[]";

// M gradients from the base form's statistics, an empty tensor where the bit of needs_grad is not set.
constexpr const char* kDistillLossBackwardSchema =
    "distill_loss_backward(Tensor grad_loss, Tensor[] logits, Tensor? target, Tensor statistics, Tensor temperature, "
    "Tensor kl_weight, Tensor ce_weight, Tensor table, float label_smoothing, int ignore_index, float target_eps, "
    "int reduction, int needs_grad) -> Tensor[]";

// g ← round(g · grad_loss) in place; leaves at once where grad_loss is 1 and skips empty tensors.
constexpr const char* kScaleGradientsSchema = "scale_gradients(Tensor grad_loss, Tensor(a!)[] gradients) -> ()";

constexpr const char* kDistillLoss = "distill_loss";
constexpr const char* kDistillLossBackward = "distill_loss_backward";
constexpr const char* kScaleGradients = "scale_gradients";

}  // namespace fflfast
