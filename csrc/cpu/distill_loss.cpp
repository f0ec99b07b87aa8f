// The private operators on the CPU: registration, choice of the instruction set, threads and memory.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../python_module.h"
#include "../schema.h"
#include "isa.h"
#include "make_plan.h"
#include "memory.h"

namespace fflfast {
namespace {

constexpr int kBestIsa = 2;

const Kernels* kernels_of(int level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (level >= 2 && avx512 && avx512_kernels() != nullptr) return avx512_kernels();
  if (level >= 1 && avx2 && avx2_kernels() != nullptr) return avx2_kernels();
#endif
  (void)level;
  return baseline_kernels();
}

int level_from_environment() {
  const char* name = std::getenv("FFLFAST_CPU_ISA");
  if (name == nullptr) return kBestIsa;
  return std::strcmp(name, "baseline") == 0 ? 0 : std::strcmp(name, "avx2") == 0 ? 1 : kBestIsa;
}

// What runs; FFLFAST_CPU_ISA=baseline|avx2|avx512 bounds it, as does the operator `isa`, for tests.
const Kernels*& kernels() {
  static const Kernels* chosen = kernels_of(level_from_environment());
  return chosen;
}

// Work below this many numbers is not worth waking a second thread for.
constexpr int64_t kGrain = 16384;

int64_t chunk_grain(const Plan& plan) {
  const int64_t numbers = plan.rows_per_chunk * plan.classes * plan.graph.num_logits;
  return numbers >= kGrain ? 1 : kGrain / numbers;
}

void allocate_gradients(Plan* plan, int64_t wanted, const DistillArguments& a, const Tensor& like,
                        std::vector<Tensor>* out) {
  for (int i = 0; i < plan->graph.num_logits; ++i) {
    const bool want = (wanted >> i) & 1;
    out->push_back(want ? empty({a.rows, a.classes}, a.dtype, like) : empty({0}, a.dtype, like));
    if (!want) continue;
    advise_huge_pages(out->back(), a.rows * a.classes * element_size(a.dtype));
    plan->gradient[i] = mutable_data(out->back());
  }
}

void write_number(const Tensor& tensor, int64_t at, Dtype dtype, double value) {
  if (dtype == Dtype::kFloat64)
    static_cast<double*>(mutable_data(tensor))[at] = value;
  else
    static_cast<float*>(mutable_data(tensor))[at] = static_cast<float>(value);
}

// A divergence between distributions that a large T has made almost equal is a small difference of sums, which T²
// then enlarges: with few classes, whose rounding does not average out, float32 sums would leave the contract.
bool wants_wide_sums(const DistillArguments& a) {
  const double temperature = a.temperature.value;
  const int64_t few = temperature >= 16.0 ? 4096 : temperature >= 8.0 ? 512 : 0;
  return a.wide() != Dtype::kFloat64 && a.classes <= few && a.graph.num_edges > 0;
}

std::vector<Tensor> distill_loss(std::vector<Tensor> logits, std::optional<Tensor> target, Tensor temperature,
                                 Tensor kl_weight, Tensor ce_weight, Tensor table, double label_smoothing,
                                 int64_t ignore_index, double target_eps, int64_t reduction, int64_t gradients) {
  const DistillArguments a = read_arguments(kDistillLoss, logits, target, temperature, kl_weight, ce_weight, table,
                                            label_smoothing, ignore_index, target_eps, reduction);
  Plan plan = make_plan(a);
  const bool none = a.reduction == Reduction::kNone;
  require(gradients == 0 || !none, kDistillLoss, ": expected reduction mean or sum where gradients are wanted");
  const Tensor& like = logits[0];
  std::vector<Tensor> out;
  out.reserve(2 + logits.size());
  out.push_back(none ? empty({a.rows}, a.wide(), like) : empty({}, a.wide(), like));
  out.push_back(empty({plan.num_terms}, a.wide(), like));
  if (none) plan.row_loss = mutable_data(out[0]);
  const double count = static_cast<double>(count_rows(plan));
  if (gradients != 0) {
    plan.power = common_power(plan);
    allocate_gradients(&plan, gradients, a, like, &out);
  } else {
    out.push_back(empty({1 + a.rows * plan.width}, a.wide(), like));
    plan.statistics = mutable_data(out[2]);
    write_number(out[2], 0, a.wide(), count);
  }

  const int64_t chunks = num_chunks(plan);
  const int numbers = 1 + plan.num_terms;
  const std::unique_ptr<double[]> partial(new double[chunks * numbers]);
  plan.partial = partial.get();
  const Kernels& run = *kernels();
  parallel_for(chunks, chunk_grain(plan), [&](int64_t begin, int64_t end) {
    run.forward(plan, storage_of(a.dtype), begin, end);
  });
  for (int k = 0; k < numbers; ++k) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * numbers + k];
    if (k > 0)
      write_number(out[1], k - 1, a.wide(), a.reduction == Reduction::kSum ? total : total / count);
    else if (!none)
      write_number(out[0], 0, a.wide(), a.reduction == Reduction::kSum ? total : total / count);
  }
  if (wants_wide_sums(a)) {
    const auto wide = [](const Tensor& tensor) { return converted(tensor, Dtype::kFloat64); };
    std::vector<Tensor> wide_logits;
    for (const Tensor& z : logits) wide_logits.push_back(wide(z));
    if (a.target_kind == Target::kProbabilities) target = wide(*target);
    const std::vector<Tensor> exact =
        distill_loss(std::move(wide_logits), target, wide(temperature), wide(kl_weight), wide(ce_weight), table,
                     label_smoothing, ignore_index, target_eps, reduction, 0);
    out[0] = converted(exact[0], a.wide());
    out[1] = converted(exact[1], a.wide());
  }
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
  Plan plan = make_plan(a);
  plan.grad_loss = data(grad_loss);
  plan.grad_stride = a.reduction == Reduction::kNone ? 1 : 0;
  plan.statistics = const_cast<void*>(data(statistics));
  std::vector<Tensor> out;
  out.reserve(logits.size());
  allocate_gradients(&plan, needs_grad, a, logits[0], &out);
  const Kernels& run = *kernels();
  parallel_for(num_chunks(plan), chunk_grain(plan), [&](int64_t begin, int64_t end) {
    run.backward(plan, storage_of(a.dtype), begin, end);
  });
  return out;
}

void scale_gradients(Tensor grad_loss, std::vector<Tensor> gradients) {
  for (const Tensor& gradient : gradients) {
    const int64_t count = gradient.numel();
    if (count == 0) continue;
    const Dtype dtype = dtype_of(gradient);
    const double factor = read_scalar(grad_loss, accumulation(dtype), kScaleGradients, "grad_loss").value;
    if (factor == 1.0) return;
    require(gradient.is_contiguous(), kScaleGradients, ": expected contiguous gradients");
    char* const numbers = static_cast<char*>(mutable_data(gradient));
    const Kernels& run = *kernels();
    parallel_for(count, 4 * kGrain, [&](int64_t begin, int64_t end) {
      run.scale(numbers + begin * element_size(dtype), storage_of(dtype), factor, end - begin);
    });
  }
}

// Bounds the instruction set: 0 baseline, 1 AVX2, 2 AVX-512, −1 changes nothing. Returns what runs now.
int64_t isa(int64_t level) {
  if (level >= 0) kernels() = kernels_of(static_cast<int>(level));
  return isa_level();
}

}  // namespace

int isa_level() { return kernels() == avx512_kernels() ? 2 : kernels() == avx2_kernels() ? 1 : 0; }

}  // namespace fflfast

STABLE_TORCH_LIBRARY(fflfast_cpu, m) {
  m.def(fflfast::kDistillLossSchema);
  m.def(fflfast::kDistillLossBackwardSchema);
  m.def(fflfast::kScaleGradientsSchema);
  m.def("isa(int level=-1) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fflfast_cpu, CPU, m) {
  m.impl(fflfast::kDistillLoss, TORCH_BOX(&fflfast::distill_loss));
  m.impl(fflfast::kDistillLossBackward, TORCH_BOX(&fflfast::distill_loss_backward));
  m.impl(fflfast::kScaleGradients, TORCH_BOX(&fflfast::scale_gradients));
}

STABLE_TORCH_LIBRARY_IMPL(fflfast_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&fflfast::isa)); }

FFLFAST_PYTHON_MODULE(_cpu)
