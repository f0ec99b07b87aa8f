// The private operators of the fused feature fusion on CUDA (fflfast_cuda), and of the same kernels emulated on the
// host (fflfast_emulated): registration, memory, and which kernel takes what.
#include "../fusion_schema.h"
#include "fusion_arguments.h"
#include "library.h"
#include "on_device.h"

namespace fflfast {
namespace {

using cuda::Storage;

TicketOffice& tickets() {
  static TicketOffice office(cuda::kFusionTickets, 256, cuda::kFusionCounters);
  return office;
}

// What every stage that reads the feature maps is given.
struct Maps {
  const char* op;
  const Tensor& like;
  OnDevice on;
  Storage storage;
  cuda::Features features;
  cuda::WeightOperand depthwise;

  Maps(const char* op, const std::vector<Tensor>& maps, const Tensor& depthwise_weight)
      : op(op), like(first_of(op, maps)), on(like), storage(storage_of(op, like, "feature maps")),
        features(read_features(op, maps)),
        depthwise(read_weight(op, "depthwise_weight", depthwise_weight, dtype(), int64_t{9} * features.channels)) {}

  Dtype dtype() const { return dtype_of(storage); }
  int64_t values() const { return features.pixels() * features.channels; }

  void expect_plan(bool planned) const {
    require(planned, op, ": expected feature maps whose rows fit the shared memory of a block, got a width of ",
            features.width, "; use the reference backend");
  }

 private:
  static const Tensor& first_of(const char* op, const std::vector<Tensor>& maps) {
    require(!maps.empty(), op, ": expected 1 to ", cuda::kFeatureMaps, " feature maps, got none");
    return maps[0];
  }
};

Tensor bytes(size_t count, const Tensor& like) {
  return empty({static_cast<int64_t>((count + 3) / 4)}, Dtype::kFloat32, like);
}

// A launch's memory for partial sums, and its counters; alive until the launch is on its stream.
struct OwnedScratch {
  Tensor records;
  Ticket ticket;

  OwnedScratch(int64_t numbers, const OnDevice& on, const Tensor& like)
      : records(empty({numbers}, Dtype::kFloat32, like)), ticket(tickets().take(on, like)) {}
  cuda::Scratch operand() const { return {static_cast<float*>(mutable_data(records)), {ticket.memory(), ticket.slot}}; }
};

std::vector<Tensor> depthwise_statistics(std::vector<Tensor> features, Tensor depthwise_weight) {
  const Maps maps("fusion_depthwise_statistics", features, depthwise_weight);
  const Tensor moments = empty({2, maps.features.channels}, Dtype::kFloat32, maps.like);
  cuda::RowTiles cut;
  maps.expect_plan(cuda::plan_statistics(maps.features, maps.storage, maps.on.properties, &cut));
  const OwnedScratch scratch(cuda::statistics_records(cut, maps.storage), maps.on, maps.like);
  cuda::launch_statistics({maps.features, maps.depthwise, static_cast<float*>(mutable_data(moments))}, maps.storage,
                          cut, scratch.operand(), maps.on.stream);
  return {moments};
}

// The part of the matrix products' arguments that their three stages share.
cuda::ProductOperands product_operands(const Maps& maps, const cuda::NormOperand& norm1,
                                       const Tensor& pointwise_weight) {
  require(pointwise_weight.dim() == 4 && pointwise_weight.size(1) == maps.features.channels, maps.op,
          ": expected a pointwise_weight (O, ", maps.features.channels, ", 1, 1)");
  const int64_t outputs = pointwise_weight.size(0);
  return {maps.features, maps.depthwise,
          read_weight(maps.op, "pointwise_weight", pointwise_weight, maps.dtype(), outputs * maps.features.channels),
          norm1, static_cast<int32_t>(outputs)};
}

const cuda::ProductFunctions& products(const Maps& maps, bool tf32) {
  const cuda::ProductFunctions& functions = cuda::products_of(maps.storage, tf32);
  maps.expect_plan(functions.take(maps.features, maps.on.properties));
  return functions;
}

std::vector<Tensor> pointwise(std::vector<Tensor> features, Tensor depthwise_weight, Tensor mean1, Tensor m2_1,
                              Tensor count1, std::optional<Tensor> weight1, std::optional<Tensor> bias1, double eps1,
                              bool training1, Tensor pointwise_weight, std::vector<Tensor>, bool statistics,
                              bool tf32) {
  const Maps maps("fusion_pointwise", features, depthwise_weight);
  const auto norm1 =
      read_norm(maps.op, mean1, m2_1, count1, weight1, bias1, eps1, training1, maps.features.channels);
  cuda::PointwiseOperands o{};
  o.in = product_operands(maps, norm1, pointwise_weight);
  const cuda::ProductFunctions& run = products(maps, tf32);
  const Tensor y = empty({maps.features.batch, maps.features.image(), o.in.outputs}, maps.dtype(), maps.like);
  const Tensor moments = statistics ? empty({2, o.in.outputs}, Dtype::kFloat32, maps.like)
                                    : empty({0}, Dtype::kFloat32, maps.like);
  o.y = mutable_data(y);
  o.moments = statistics ? static_cast<float*>(mutable_data(moments)) : nullptr;
  const Ticket ticket = tickets().take(maps.on, maps.like);
  o.tickets = {ticket.memory(), ticket.slot};
  const Tensor workspace = bytes(run.pointwise_workspace(o, maps.on.properties), maps.like);
  o.workspace = mutable_data(workspace);
  run.launch_pointwise(o, maps.on.properties, maps.on.stream);
  return {y, moments};
}

std::vector<Tensor> pool(Tensor y, Tensor mean2, Tensor m2_2, Tensor count2, std::optional<Tensor> weight2,
                         std::optional<Tensor> bias2, double eps2, bool training2) {
  constexpr const char* kOp = "fusion_pool";
  const Storage storage = storage_of(kOp, y, "y");
  require(y.dim() == 3 && y.is_contiguous() && y.numel() > 0, kOp, ": expected a contiguous y (B, H·W, O)");
  const OnDevice on(y);
  const Tensor pooled = empty({y.size(0), y.size(2)}, dtype_of(storage), y);
  const Tensor active = empty({2, y.size(0), y.size(2)}, Dtype::kFloat32, y);
  const auto norm2 = read_norm(kOp, mean2, m2_2, count2, weight2, bias2, eps2, training2, y.size(2));
  cuda::launch_pool({data(y), norm2, mutable_data(pooled), static_cast<float*>(mutable_data(active)), y.size(0),
                     static_cast<int32_t>(y.size(1)), static_cast<int32_t>(y.size(2))},
                    storage, on.properties, on.stream);
  return {pooled, active};
}

Tensor inference(std::vector<Tensor> features, Tensor depthwise_weight, Tensor mean1, Tensor m2_1, Tensor count1,
                 std::optional<Tensor> weight1, std::optional<Tensor> bias1, double eps1, bool training1,
                 Tensor pointwise_weight, Tensor mean2, Tensor m2_2, Tensor count2, std::optional<Tensor> weight2,
                 std::optional<Tensor> bias2, double eps2, bool training2, bool tf32) {
  const Maps maps("fusion_inference", features, depthwise_weight);
  const auto norm1 =
      read_norm(maps.op, mean1, m2_1, count1, weight1, bias1, eps1, training1, maps.features.channels);
  cuda::InferenceOperands o{};
  o.in = product_operands(maps, norm1, pointwise_weight);
  o.norm2 = read_norm(maps.op, mean2, m2_2, count2, weight2, bias2, eps2, training2, o.in.outputs);
  const cuda::ProductFunctions& run = products(maps, tf32);
  const Tensor pooled = empty({maps.features.batch, o.in.outputs}, maps.dtype(), maps.like);
  o.pooled = mutable_data(pooled);
  run.launch_inference(o, maps.on.properties, maps.on.stream);
  return pooled;
}

Tensor backward_pool(Tensor grad, Tensor active, int64_t pixels) {
  constexpr const char* kOp = "fusion_backward_pool";
  const Storage storage = storage_of(kOp, grad, "grad");
  require(grad.dim() == 2 && grad.is_contiguous() && grad.numel() > 0, kOp, ": expected a contiguous grad (B, O)");
  const OnDevice on(grad);
  const int64_t batch = grad.size(0), outputs = grad.size(1);
  const float* const counts = read_floats(kOp, "active", active, 2 * batch * outputs);
  const Tensor sums = empty({2, outputs}, Dtype::kFloat32, grad);
  cuda::launch_backward_pool({data(grad), counts, static_cast<float*>(mutable_data(sums)), batch,
                              static_cast<int32_t>(pixels), static_cast<int32_t>(outputs)},
                             storage, on.stream);
  return sums;
}

std::vector<Tensor> backward_sums(Tensor grad, std::vector<Tensor> features, Tensor depthwise_weight, Tensor mean1,
                                  Tensor m2_1, Tensor count1, std::optional<Tensor> weight1,
                                  std::optional<Tensor> bias1, double eps1, bool training1, Tensor pointwise_weight,
                                  Tensor y, Tensor mean2, Tensor m2_2, Tensor count2, std::optional<Tensor> weight2,
                                  std::optional<Tensor> bias2, double eps2, bool training2, Tensor sums2,
                                  bool needs_weight, bool tf32) {
  const Maps maps("fusion_backward_sums", features, depthwise_weight);
  const cuda::Features& f = maps.features;
  const auto norm1 = read_norm(maps.op, mean1, m2_1, count1, weight1, bias1, eps1, training1, f.channels);
  cuda::BackwardSumsOperands o{};
  o.in = product_operands(maps, norm1, pointwise_weight);
  o.norm2 = read_norm(maps.op, mean2, m2_2, count2, weight2, bias2, eps2, training2, o.in.outputs);
  o.grad = read_values(maps.op, "grad", grad, maps.dtype(), f.batch * o.in.outputs);
  o.y = read_values(maps.op, "y", y, maps.dtype(), f.pixels() * o.in.outputs);
  o.sums2 = read_floats(maps.op, "sums2", sums2, int64_t{2} * o.in.outputs);
  const cuda::ProductFunctions& run = products(maps, tf32);
  const Dtype weight_dtype = dtype_of(pointwise_weight);
  const Tensor sums1 = empty({2, f.channels}, Dtype::kFloat32, maps.like);
  const Tensor dz = empty({f.batch, f.image(), f.channels}, maps.dtype(), maps.like);
  const Tensor weight_gradient = needs_weight ? empty({o.in.outputs, f.channels, 1, 1}, weight_dtype, maps.like)
                                              : empty({0}, weight_dtype, maps.like);
  o.sums1 = static_cast<float*>(mutable_data(sums1));
  o.dz = mutable_data(dz);
  o.weight_gradient = needs_weight ? mutable_data(weight_gradient) : nullptr;
  const Ticket ticket = tickets().take(maps.on, maps.like);
  o.tickets = {ticket.memory(), ticket.slot};
  const Tensor workspace = bytes(run.backward_sums_workspace(o, maps.on.properties), maps.like);
  o.workspace = mutable_data(workspace);
  run.launch_backward_sums(o, maps.on.properties, maps.on.stream);
  return {sums1, weight_gradient, dz};
}

std::vector<Tensor> backward_inputs(std::vector<Tensor> features, Tensor depthwise_weight, Tensor mean1, Tensor m2_1,
                                    Tensor count1, std::optional<Tensor> weight1, std::optional<Tensor> bias1,
                                    double eps1, bool training1, Tensor sums1, std::vector<Tensor> kept,
                                    int64_t needs) {
  const Maps maps("fusion_backward_inputs", features, depthwise_weight);
  const cuda::Features& f = maps.features;
  cuda::InputsCall call{};
  call.features = f;
  call.weight = maps.depthwise;
  call.norm = read_norm(maps.op, mean1, m2_1, count1, weight1, bias1, eps1, training1, f.channels);
  call.sums = read_floats(maps.op, "sums1", sums1, int64_t{2} * f.channels);
  require(kept.size() == 1, maps.op, ": expected what fusion_backward_sums kept, one tensor, got ", kept.size());
  call.kept = read_values(maps.op, "the kept gradient", kept[0], maps.dtype(), maps.values());
  std::vector<Tensor> out;
  out.reserve(features.size() + 1);
  for (size_t k = 0; k < features.size(); ++k) {
    const bool wanted = needs >> k & 1;
    out.push_back(wanted ? torch::stable::empty_like(features[k]) : empty({0}, maps.dtype(), maps.like));
    if (wanted) call.gradient[k] = read_feature(out[k], mutable_data(out[k]));
  }
  const bool needs_weight = needs >> features.size() & 1;
  const Dtype weight_dtype = dtype_of(depthwise_weight);
  out.push_back(needs_weight ? empty({f.channels, 1, 3, 3}, weight_dtype, maps.like)
                             : empty({0}, weight_dtype, maps.like));
  if (needs == 0) return out;
  call.weight_gradient = needs_weight ? mutable_data(out.back()) : nullptr;
  cuda::RowTiles cut;
  maps.expect_plan(cuda::plan_inputs(f, maps.storage, maps.on.properties, &cut));
  const OwnedScratch scratch(needs_weight ? cuda::inputs_records(cut, maps.storage) : 0, maps.on, maps.like);
  cuda::launch_inputs(call, maps.storage, cut, scratch.operand(), maps.on.stream);
  return out;
}

void update_running(std::vector<Tensor> moments, std::vector<Tensor> counts, std::vector<Tensor> running,
                    std::vector<Tensor> batches, std::vector<double> momentum) {
  constexpr const char* kOp = "fusion_update_running";
  const size_t norms = moments.size();
  require(norms >= 1 && norms <= 2 && counts.size() == norms && running.size() == 2 * norms &&
              batches.size() == norms && momentum.size() == norms,
          kOp, ": expected one or two norms, each with moments, a count, two running tensors, batches and a momentum");
  const OnDevice on(moments[0]);
  cuda::RunningCall call{};
  for (size_t i = 0; i < norms; ++i) {
    cuda::RunningNorm& norm = call.norm[i];
    const int64_t channels = running[2 * i].numel();
    const Count values = read_count(kOp, counts[i]);
    norm = {read_floats(kOp, "moments", moments[i], 2 * channels), values.device, values.known,
            static_cast<float>(momentum[i]), nullptr, nullptr, nullptr, static_cast<int32_t>(channels)};
    read_floats(kOp, "a running mean", running[2 * i], channels);
    read_floats(kOp, "a running variance", running[2 * i + 1], channels);
    norm.mean = static_cast<float*>(mutable_data(running[2 * i]));
    norm.variance = static_cast<float*>(mutable_data(running[2 * i + 1]));
    expect_dtype(batches[i], Dtype::kInt64, kOp, "batches");
    require(batches[i].numel() == 1 || (batches[i].numel() == 0 && momentum[i] >= 0.0), kOp,
            ": expected a counter of batches with one element where the average is cumulative, got ",
            batches[i].numel());
    if (batches[i].numel() == 1) norm.batches = static_cast<int64_t*>(mutable_data(batches[i]));
  }
  cuda::launch_update_running(call, static_cast<int>(norms), on.stream);
}

}  // namespace
}  // namespace fflfast

FFLFAST_EXTEND(FFLFAST_LIBRARY, m) {
  for (const char* schema : fflfast::kFusionSchemas) m.def(schema);
}

FFLFAST_IMPLEMENT(FFLFAST_LIBRARY, FFLFAST_DISPATCH_KEY, m) {
  FFLFAST_IMPLEMENT_FUSION(m)
}
