// The private operators on CUDA (fflfast_cuda), and of the same kernels emulated on the host (fflfast_emulated):
// registration, memory, and which kernel takes what.
#include "../distill_arguments.h"
#include "../schema.h"
#include "distill_launch.h"
#include "launch_policy.h"
#include "library.h"
#include "on_device.h"
#ifndef FFLFAST_EMULATE
#include "../python_module.h"
#endif

namespace fflfast {
namespace {

using cuda::Geometry;
using cuda::Operands;

cuda::Number number(const Scalar& scalar) { return {scalar.value, scalar.device}; }

Operands operands(const DistillArguments& a) {
  Operands o{};
  o.rows = a.rows;
  o.classes = a.classes;
  for (int i = 0; i < a.graph.num_logits; ++i) {
    o.logits[i] = a.logits[i];
    o.stride[i] = a.row_stride[i];
  }
  o.target_kind = static_cast<cuda::TargetKind>(a.target_kind);
  o.target = a.target;
  o.target_stride = a.target_stride;
  o.ignore_index = a.ignore_index;
  o.temperature = number(a.temperature);
  o.kl_weight = number(a.kl_weight);
  o.ce_weight = number(a.ce_weight);
  o.label_smoothing = a.label_smoothing;
  o.target_eps = a.target_eps;
  o.reduction = static_cast<cuda::ReductionKind>(a.reduction);
  o.statistics_width = a.graph.width();
  o.num_terms = a.num_terms();
  return o;
}

void allocate_gradients(int64_t wanted, const DistillArguments& a, const Tensor& like, Operands* o,
                        std::vector<Tensor>* out) {
  for (int i = 0; i < a.graph.num_logits; ++i) {
    const bool want = wanted >> i & 1;
    out->push_back(want ? empty({a.rows, a.classes}, a.dtype, like) : empty({0}, a.dtype, like));
    if (want) o->gradients[i] = mutable_data(out->back());
    o->writes_gradients |= want;
  }
}

// A call of one kernel with storage type T in place of a.dtype.
template <class Call>
auto by_dtype(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::kFloat64: return call(double{});
    case Dtype::kBFloat16: return call(simt::BFloat16{});
    case Dtype::kFloat16: return call(simt::Half{});
    default: return call(float{});
  }
}

struct Choice {
  bool on_chip;
  Geometry geometry;
};

Choice choose(const char* op, const DistillArguments& a, const double* flat, const Operands& o, const OnDevice& on) {
  Geometry geometry;
  if (a.dtype != Dtype::kFloat64 && cuda::plan_rows(a.graph, o, element_size(a.dtype), on.properties, &geometry))
    return {true, geometry};
  const bool fits = by_dtype(a.dtype, [&](auto t) {
    return cuda::plan_sweeps<decltype(t)>(flat, o, on.properties, &geometry);
  });
  require(fits, op, ": expected a graph that fits the kernel's arguments and the shared memory of the device, got ",
          a.graph.num_edges, " edges of ", name_of(a.dtype), " logits; use the reference backend");
  return {false, geometry};
}

void launch(const Choice& choice, const DistillArguments& a, const double* flat, const Operands& o,
            const OnDevice& on) {
  by_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!std::is_same_v<T, double>) {
      if (choice.on_chip) return cuda::launch_rows<T>(a.graph, o, choice.geometry, on.stream);
    }
    cuda::launch_sweeps<T>(flat, o, choice.geometry, on.stream);
  });
}

// Says how n is known while gradients are written, and starts the count where a launch of its own is worth it.
std::optional<Tensor> count_rows(const DistillArguments& a, const Tensor& like, const OnDevice& on, Operands* o) {
  if (a.reduction != Reduction::kMean) return std::nullopt;
  if (a.target_kind != Target::kIndex) {
    o->count_kind = cuda::kCountKnown;
    o->known_count = a.rows;
    return std::nullopt;
  }
  if (a.rows <= cuda::kCountedByBlock) {
    o->count_kind = cuda::kCountByBlock;
    return std::nullopt;
  }
  const int64_t grid = cuda::blocks_for(a.rows / 4096, cuda::kCountGrid);
  Tensor count = empty({1}, Dtype::kInt64, like), partials = empty({grid}, Dtype::kFloat64, like);
  Operands counting = *o;
  counting.partials = static_cast<double*>(mutable_data(partials));
  cuda::launch_count(counting, grid, static_cast<int64_t*>(mutable_data(count)), on.stream);
  o->count_kind = cuda::kCountInMemory;
  o->count = static_cast<const int64_t*>(data(count));
  return count;
}

void use_ticket(const Ticket& ticket, Operands* o) {
  o->ticket_slot = ticket.slot;
  o->ticket = ticket.memory();
}

std::vector<Tensor> distill_loss(std::vector<Tensor> logits, std::optional<Tensor> target, Tensor temperature,
                                 Tensor kl_weight, Tensor ce_weight, Tensor table, double label_smoothing,
                                 int64_t ignore_index, double target_eps, int64_t reduction, int64_t gradients) {
  const DistillArguments a = read_arguments(kDistillLoss, logits, target, temperature, kl_weight, ce_weight, table,
                                            label_smoothing, ignore_index, target_eps, reduction);
  const bool per_row = a.reduction == Reduction::kNone;
  require(gradients == 0 || !per_row, kDistillLoss, ": expected reduction mean or sum where gradients are wanted");
  const Tensor& like = logits[0];
  const OnDevice on(like);
  const double* flat = static_cast<const double*>(data(table));
  Operands o = operands(a);
  std::vector<Tensor> out;
  out.reserve(2 + logits.size());
  out.push_back(per_row ? empty({a.rows}, a.wide(), like) : empty({}, a.wide(), like));
  out.push_back(empty({o.num_terms}, a.wide(), like));
  o.loss = mutable_data(out[0]);
  o.terms = mutable_data(out[1]);
  static TicketOffice tickets(cuda::kTickets, 1024, 1);
  const Ticket ticket = tickets.take(on, like);
  use_ticket(ticket, &o);
  std::optional<Tensor> count;
  if (gradients != 0) {
    allocate_gradients(gradients, a, like, &o, &out);
    count = count_rows(a, like, on, &o);
  } else {
    out.push_back(empty({1 + a.rows * a.graph.width()}, a.wide(), like));
    o.statistics_out = mutable_data(out[2]);
  }
  const Choice choice = choose(kDistillLoss, a, flat, o, on);
  const Tensor partials = empty({choice.geometry.grid * (2 + o.num_terms)}, Dtype::kFloat64, like);
  o.partials = static_cast<double*>(mutable_data(partials));
  launch(choice, a, flat, o, on);
  return out;
}

std::vector<Tensor> distill_loss_backward(Tensor grad_loss, std::vector<Tensor> logits, std::optional<Tensor> target,
                                          Tensor statistics, Tensor temperature, Tensor kl_weight, Tensor ce_weight,
                                          Tensor table, double label_smoothing, int64_t ignore_index,
                                          double target_eps, int64_t reduction, int64_t needs_grad) {
  const DistillArguments a =
      read_arguments(kDistillLossBackward, logits, target, temperature, kl_weight, ce_weight, table, label_smoothing,
                     ignore_index, target_eps, reduction);
  expect_backward(kDistillLossBackward, a, grad_loss, statistics);
  const OnDevice on(logits[0]);
  const double* flat = static_cast<const double*>(data(table));
  Operands o = operands(a);
  o.grad_loss = data(grad_loss);
  o.statistics_in = data(statistics);
  std::vector<Tensor> out;
  out.reserve(logits.size());
  allocate_gradients(needs_grad, a, logits[0], &o, &out);
  if (o.writes_gradients) launch(choose(kDistillLossBackward, a, flat, o, on), a, flat, o, on);
  return out;
}

void scale_gradients(Tensor grad_loss, std::vector<Tensor> gradients) {
  void* addresses[cuda::kOperandLogits];
  int64_t sizes[cuda::kOperandLogits];
  int count = 0;
  const Tensor* first = nullptr;
  for (const Tensor& gradient : gradients) {
    if (gradient.numel() == 0) continue;
    require(count < cuda::kOperandLogits, kScaleGradients, ": expected at most ", cuda::kOperandLogits, " gradients");
    require(gradient.is_contiguous(), kScaleGradients, ": expected contiguous gradients");
    if (first == nullptr) first = &gradient;
    expect_dtype(gradient, dtype_of(*first), kScaleGradients, "gradients");
    addresses[count] = mutable_data(gradient);
    sizes[count++] = gradient.numel();
  }
  if (first == nullptr) return;
  const Dtype dtype = dtype_of(*first);
  const OnDevice on(*first);
  expect_dtype(grad_loss, accumulation(dtype), kScaleGradients, "grad_loss");
  require(grad_loss.numel() == 1, kScaleGradients, ": expected grad_loss with one element, got ", grad_loss.numel());
  // On the gradients' device whatever that is: the host does not read it.
  const cuda::Number factor{0.0, data(grad_loss)};
  by_dtype(dtype, [&](auto t) {
    cuda::launch_scale<decltype(t)>(factor, addresses, sizes, count, on.properties, on.stream);
  });
}

}  // namespace

}  // namespace fflfast

#ifndef FFLFAST_EMULATE
FFLFAST_PYTHON_MODULE(_cuda)
#endif

FFLFAST_DEFINE(FFLFAST_LIBRARY, m) {
  m.def(fflfast::kDistillLossSchema);
  m.def(fflfast::kDistillLossBackwardSchema);
  m.def(fflfast::kScaleGradientsSchema);
}

FFLFAST_IMPLEMENT(FFLFAST_LIBRARY, FFLFAST_DISPATCH_KEY, m) {
  m.impl(fflfast::kDistillLoss, TORCH_BOX(&fflfast::distill_loss));
  m.impl(fflfast::kDistillLossBackward, TORCH_BOX(&fflfast::distill_loss_backward));
  m.impl(fflfast::kScaleGradients, TORCH_BOX(&fflfast::scale_gradients));
}
