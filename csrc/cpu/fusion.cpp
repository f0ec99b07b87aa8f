// The stages of the fused feature fusion on the CPU: registration, order of work, threads and memory.
//
// The matrix products are PyTorch's own mm (fusion_products.h), which is near the machine's peak; all else is fused
// around them (fusion_kernels.h). a = relu(z), which both products of the pointwise weight want as a matrix, exists a
// few images at a time.
#include "../fusion_schema.h"
#include "fusion_arguments.h"
#include "fusion_combine.h"
#include "fusion_groups.h"
#include "isa.h"

namespace fflfast {
namespace {

const FusionKernels& kernels() {
  const int level = isa_level();
  return *(level >= 2 ? avx512_fusion() : level == 1 ? avx2_fusion() : baseline_fusion());
}

// Runs one of the kernels over all units of a plan.
using Stage = void (*)(const FusionPlan&, int64_t, int64_t, float*);
void run(Stage stage, const FusionPlan& plan) {
  const FusionKernels& k = kernels();
  const int64_t scratch = k.scratch(plan);
  parallel_for(plan.chunks() * plan.num_blocks, grain(plan.chunk_pixels() * k.width), [&](int64_t begin, int64_t end) {
    const Scratch memory(scratch);
    stage(plan, begin, end, memory.get());
  });
}

Matrix read_pointwise(const char* op, const Tensor& weight, int64_t channels) {
  expect_dtype(weight, Dtype::kFloat32, op, "the pointwise weight");
  require(weight.is_cpu() && weight.dim() == 4 && weight.size(1) == channels && weight.size(2) == 1 &&
              weight.size(3) == 1 && weight.size(0) > 0,
          op, ": expected a pointwise weight (C_out, ", channels, ", 1, 1) on the CPU");
  float* const read_only = static_cast<float*>(const_cast<void*>(data(weight)));
  return {read_only, weight.size(0), channels, weight.stride(0), weight.stride(1)};
}

PoolPlan read_y(const char* op, const Tensor& y) {
  expect_dtype(y, Dtype::kFloat32, op, "y");
  require(y.is_cpu() && y.dim() == 3 && y.is_contiguous() && y.numel() > 0, op,
          ": expected y (B, H·W, C_out), contiguous, on the CPU");
  PoolPlan plan{};
  plan.y = static_cast<const float*>(data(y));
  plan.batch = y.size(0);
  plan.pixels = y.size(1);
  plan.columns = y.size(2);
  return plan;
}

const float* expect_matrix(const Tensor& tensor, int64_t rows, int64_t columns, const char* op, const char* name) {
  expect_dtype(tensor, Dtype::kFloat32, op, name);
  require(tensor.is_contiguous() && tensor.numel() == rows * columns, op, ": expected ", name, " (", rows, ", ",
          columns, "), contiguous");
  return static_cast<const float*>(data(tensor));
}

void run_pool(const PoolPlan& plan) {
  parallel_for(plan.batch, grain(plan.pixels * plan.columns),
               [&](int64_t begin, int64_t end) { kernels().pool(plan, begin, end); });
}

// A norm as the schema has it, in pieces, and put together again.
#define FFLFAST_NORM_ARGUMENTS(n)                                                                                 \
  Tensor mean##n, Tensor m2_##n, Tensor count##n, std::optional<Tensor> weight##n, std::optional<Tensor> bias##n, \
      double eps##n, bool training##n
#define FFLFAST_NORM(n) \
  NormArguments { mean##n, m2_##n, count##n, weight##n, bias##n, eps##n, training##n }

std::vector<Tensor> depthwise_statistics(std::vector<Tensor> features, Tensor depthwise_weight) {
  FeatureArguments a("fusion_depthwise_statistics", features, depthwise_weight, kernels().width);
  const std::unique_ptr<double[]> partial(new double[a.plan.chunks() * 2 * a.plan.channels]);
  a.plan.partial = partial.get();
  run(kernels().statistics, a.plan);
  return {combine_moments(partial.get(), a.plan.chunks(), a.plan.channels,
                          [&](int64_t chunk) { return a.count(chunk); }, features[0])};
}

std::vector<Tensor> pointwise(std::vector<Tensor> features, Tensor depthwise_weight, FFLFAST_NORM_ARGUMENTS(1),
                              Tensor pointwise_weight, std::vector<Tensor>, bool statistics, bool) {
  constexpr const char* kOp = "fusion_pointwise";
  FeatureArguments a(kOp, features, depthwise_weight, kernels().width);
  const NormNumbers norm = read_norm(kOp, FFLFAST_NORM(1), a.plan.channels);
  norm.give(&a.plan);
  const Matrix weight = read_pointwise(kOp, pointwise_weight, a.plan.channels);
  const int64_t pixels = a.plan.pixels(), rows = a.plan.batch * pixels, columns = weight.rows;
  const Groups groups = make_groups(&a.plan, columns);
  Tensor y = make({a.plan.batch, pixels, columns}, features[0]);
  PoolPlan plan = read_y(kOp, y);
  float* const to = numbers(y);
  const int64_t chunks_each = ceil_div(groups.images * pixels, kMomentRows);
  const std::unique_ptr<double[]> partial(new double[groups.count * chunks_each * 2 * columns]);
  const auto rows_in = [&](int64_t chunk) {
    const int64_t first = chunk / chunks_each * groups.images * pixels, next = first + groups.images * pixels;
    return clamp((next < rows ? next : rows) - first - chunk % chunks_each * kMomentRows, 0, kMomentRows);
  };
  for_each_group(a, groups, [&](int64_t group, int64_t first, FusionPlan part) {
    const int64_t part_rows = part.batch * pixels;
    const Scratch activated(part_rows * part.channels);
    PoolPlan part2 = plan;
    part2.y += first * pixels * columns;
    part2.partial = partial.get() + group * chunks_each * 2 * columns;
    part.rows = activated.get();
    run(kernels().activate, part);
    product(rows_of(part.rows, part_rows, part.channels), weight.transposed(),
            rows_of(to + first * pixels * columns, part_rows, columns));
    if (!statistics) return;
    parallel_for(ceil_div(part_rows, kMomentRows), grain(kMomentRows * columns),
                 [&](int64_t begin, int64_t end) { kernels().moments(part2, part_rows, begin, end); });
  });
  if (!statistics) return {y, make({0}, y)};
  const int64_t last = groups.count - 1, last_rows = rows - last * groups.images * pixels;
  const int64_t chunks = last * chunks_each + ceil_div(last_rows, kMomentRows);
  const auto count = [&](int64_t chunk) { return static_cast<double>(rows_in(chunk)); };
  return {y, combine_moments(partial.get(), chunks, columns, count, y)};
}

std::vector<Tensor> pool(Tensor y, FFLFAST_NORM_ARGUMENTS(2)) {
  PoolPlan plan = read_y("fusion_pool", y);
  const NormNumbers norm = read_norm("fusion_pool", FFLFAST_NORM(2), plan.columns);
  norm.give(&plan);
  Tensor pooled = make({plan.batch, plan.columns}, y), active = make({2, plan.batch, plan.columns}, y);
  plan.out = numbers(pooled);
  plan.active = numbers(active);
  plan.hat_sum = plan.active + plan.batch * plan.columns;
  run_pool(plan);
  return {pooled, active};
}

Tensor inference(std::vector<Tensor> features, Tensor depthwise_weight, FFLFAST_NORM_ARGUMENTS(1),
                 Tensor pointwise_weight, FFLFAST_NORM_ARGUMENTS(2), bool) {
  constexpr const char* kOp = "fusion_inference";
  FeatureArguments a(kOp, features, depthwise_weight, kernels().width);
  const NormNumbers norm1 = read_norm(kOp, FFLFAST_NORM(1), a.plan.channels);
  norm1.give(&a.plan);
  const Matrix weight = read_pointwise(kOp, pointwise_weight, a.plan.channels);
  const NormNumbers norm2 = read_norm(kOp, FFLFAST_NORM(2), weight.rows);
  const int64_t pixels = a.plan.pixels(), columns = weight.rows;
  const Groups groups = make_groups(&a.plan, columns);
  Tensor pooled = make({a.plan.batch, columns}, features[0]);
  float* const to = numbers(pooled);
  for_each_group(a, groups, [&](int64_t, int64_t first, FusionPlan part) {
    const int64_t rows = part.batch * pixels;
    const Scratch activated(rows * part.channels), y(rows * columns);
    part.rows = activated.get();
    run(kernels().activate, part);
    product(rows_of(part.rows, rows, part.channels), weight.transposed(), rows_of(y.get(), rows, columns));
    PoolPlan plan{};
    norm2.give(&plan);
    plan.y = y.get();
    plan.batch = part.batch;
    plan.pixels = pixels;
    plan.columns = columns;
    plan.out = to + first * columns;
    run_pool(plan);
  });
  return pooled;
}

Tensor backward_pool(Tensor grad, Tensor active, int64_t pixels) {
  constexpr const char* kOp = "fusion_backward_pool";
  require(grad.dim() == 2, kOp, ": expected grad (B, C_out)");
  const int64_t batch = grad.size(0), columns = grad.size(1);
  const float* g = expect_matrix(grad, batch, columns, kOp, "grad");
  const float* a = expect_matrix(active, 2 * batch, columns, kOp, "active");
  Tensor out = make({2, columns}, grad);
  float* to = numbers(out);
  const std::unique_ptr<double[]> totals(new double[2 * columns]());
  for (int k = 0; k < 2; ++k)
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t o = 0; o < columns; ++o)
        totals[k * columns + o] += static_cast<double>(g[b * columns + o]) * a[(k * batch + b) * columns + o];
  for (int64_t i = 0; i < 2 * columns; ++i) to[i] = static_cast<float>(totals[i] / static_cast<double>(pixels));
  return out;
}

std::vector<Tensor> backward_sums(Tensor grad, std::vector<Tensor> features, Tensor depthwise_weight,
                                  FFLFAST_NORM_ARGUMENTS(1), Tensor pointwise_weight, Tensor y,
                                  FFLFAST_NORM_ARGUMENTS(2), Tensor sums2, bool needs_weight, bool) {
  constexpr const char* kOp = "fusion_backward_sums";
  FeatureArguments a(kOp, features, depthwise_weight, kernels().width);
  const NormNumbers norm1 = read_norm(kOp, FFLFAST_NORM(1), a.plan.channels);
  norm1.give(&a.plan);
  const Matrix weight = read_pointwise(kOp, pointwise_weight, a.plan.channels);
  PoolPlan plan = read_y(kOp, y);
  const int64_t pixels = a.plan.pixels(), columns = weight.rows, channels = a.plan.channels;
  require(plan.batch == a.plan.batch && plan.pixels == pixels && plan.columns == columns, kOp, ": expected y (",
          a.plan.batch, ", ", pixels, ", ", columns, ")");
  const NormNumbers norm2 = read_norm(kOp, FFLFAST_NORM(2), columns, &sums2);
  norm2.give(&plan);
  plan.grad = expect_matrix(grad, plan.batch, columns, kOp, "grad");

  const Groups groups = make_groups(&a.plan, columns);
  Tensor kept = make({a.plan.batch, pixels, channels}, y);
  Tensor weight_gradient = needs_weight ? make({columns, channels, 1, 1}, y) : make({0}, y);
  float *const to_kept = numbers(kept), *const to_weight = numbers(weight_gradient);
  const int64_t chunks = a.plan.chunks(), parts = groups.apart && needs_weight ? groups.count : 0;
  const std::unique_ptr<double[]> partial(new double[chunks * 2 * channels]);
  const std::unique_ptr<float[]> weight_parts(new float[parts * weight.numel()]);
  for_each_group(a, groups, [&](int64_t group, int64_t first, FusionPlan part) {
    const int64_t rows = part.batch * pixels;
    const Scratch dy(rows * columns), activated(needs_weight ? rows * channels : 0);
    PoolPlan part2 = plan;
    part2.y += first * pixels * columns;
    part2.grad += first * columns;
    part2.out = dy.get();
    parallel_for(part.batch, grain(pixels * columns),
                 [&](int64_t begin, int64_t end) { kernels().grad_y(part2, begin, end); });
    const Matrix dy_rows = rows_of(dy.get(), rows, columns);
    if (needs_weight) {
      part.rows = activated.get();
      run(kernels().activate, part);
      const Matrix a_rows = rows_of(part.rows, rows, channels);
      if (groups.apart)
        multiply(dy_rows.transposed(), a_rows, rows_of(weight_parts.get() + group * weight.numel(), columns, channels));
      else
        long_product(dy_rows.transposed(), a_rows, rows_of(to_weight, columns, channels), first > 0);
    }
    part.rows = to_kept + first * pixels * channels;
    product(dy_rows, weight, rows_of(part.rows, rows, channels));
    part.partial = partial.get() + a.first_chunk(first) * 2 * channels;
    run(kernels().mask, part);
  });
  if (parts > 0) add_parts(weight_parts.get(), parts, weight.numel(), false, to_weight);
  Tensor sums = make({2, channels}, y);
  float* to = numbers(sums);
  combine_sums(partial.get(), chunks, 2, channels, [&](int64_t k, int64_t c) { return to + k * channels + c; });
  return {sums, weight_gradient, kept};
}

std::vector<Tensor> backward_inputs(std::vector<Tensor> features, Tensor depthwise_weight, FFLFAST_NORM_ARGUMENTS(1),
                                    Tensor sums1, std::vector<Tensor> kept, int64_t needs) {
  constexpr const char* kOp = "fusion_backward_inputs";
  FeatureArguments a(kOp, features, depthwise_weight, kernels().width);
  const NormNumbers norm = read_norm(kOp, FFLFAST_NORM(1), a.plan.channels, &sums1);
  norm.give(&a.plan);
  const int64_t channels = a.plan.channels, chunks = a.plan.chunks();
  require(kept.size() == 1, kOp, ": expected what fusion_backward_sums kept");
  a.plan.rows = const_cast<float*>(expect_matrix(kept[0], a.plan.batch * a.plan.pixels(), channels, kOp, "kept"));
  std::vector<Tensor> out;
  for (size_t k = 0; k < features.size(); ++k) {
    const bool want = (needs >> k) & 1;
    out.push_back(want ? torch::stable::empty_like(features[k]) : make({0}, features[k]));
    if (!want) continue;
    advise_huge_pages(out[k], 4 * out[k].numel());
    a.plan.map[k].gradient = numbers(out[k]);
    a.plan.map[k].gradient_strides = strides_of(out[k]);
  }
  const bool want = (needs >> features.size()) & 1;
  out.push_back(want ? make({channels, 1, 3, 3}, features[0]) : make({0}, features[0]));
  const std::unique_ptr<double[]> partial(want ? new double[chunks * 9 * channels] : nullptr);
  a.plan.partial = partial.get();
  run(kernels().inputs, a.plan);
  float* to = numbers(out.back());
  if (want)
    combine_sums(partial.get(), chunks, 9, channels, [&](int64_t t, int64_t c) { return to + c * 9 + t; });
  return out;
}

// running = (1 − m)·running + m·batch, the batch's variance with count − 1, as nn.BatchNorm2d does.
void update_running(std::vector<Tensor> moments, std::vector<Tensor> counts, std::vector<Tensor> running,
                    std::vector<Tensor> batches, std::vector<double> momentum) {
  constexpr const char* kOp = "fusion_update_running";
  const size_t norms = moments.size();
  require(counts.size() == norms && running.size() == 2 * norms && batches.size() == norms && momentum.size() == norms,
          kOp, ": expected as many counts, counters and momenta as moments, and twice as many running statistics");
  for (size_t i = 0; i < norms; ++i) {
    require(moments[i].dim() == 2, kOp, ": expected moments (2, C)");
    const int64_t size = moments[i].size(1);
    const float* moment = expect_matrix(moments[i], 2, size, kOp, "moments");
    const double count = read_scalar(counts[i], Dtype::kFloat32, kOp, "count").value;
    double m = momentum[i];
    if (batches[i].numel() > 0) {
      expect_dtype(batches[i], Dtype::kInt64, kOp, "the counter of batches");
      const int64_t seen = ++*static_cast<int64_t*>(mutable_data(batches[i]));
      if (m < 0) m = 1.0 / static_cast<double>(seen);
    }
    for (int k = 0; k < 2; ++k) {
      const Tensor& old = running[2 * i + k];
      expect_column(old, size, kOp, "running statistics");
      float* to = numbers(old);
      const int64_t stride = old.stride(0);
      for (int64_t c = 0; c < size; ++c) {
        const double now = k == 0 ? moment[c] : moment[size + c] / (count - 1);
        to[c * stride] = static_cast<float>((1 - m) * to[c * stride] + m * now);
      }
    }
  }
}

}  // namespace
}  // namespace fflfast

STABLE_TORCH_LIBRARY_FRAGMENT(fflfast_cpu, m) {
  for (const char* schema : fflfast::kFusionSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(fflfast_cpu, CPU, m) {
  FFLFAST_IMPLEMENT_FUSION(m)
}
