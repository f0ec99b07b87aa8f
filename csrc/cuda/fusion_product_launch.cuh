// The launches of the fusion's products in one arithmetic; one file (fusion_product_<arithmetic>.cu) compiles it.
#pragma once

#include "fusion_product_backward.cuh"
#include "fusion_product_forward.cuh"
#include "fusion_product_policy.h"
#include "fusion_product_weight.cuh"

namespace fflfast::cuda {

// Calls body(the tile's shape) for the tile that a plan has chosen.
template <class Body>
auto with_tile(bool large, const Body& body) {
  return large ? body(LargeTile{}) : body(SmallTile{});
}

template <class T, bool TENSOR_CORES>
struct Products {
  using Device = simt::DeviceProperties;

  static bool take(const Features& f, const Device& device) {
    const size_t forward =
        std::max(pointwise_bytes<T, SmallTile>(f), inference_bytes<T, SmallTile>(f, most_images(kSmallSide)));
    return std::max(forward, BackwardLayout<T, SmallTile>(f).bytes()) <= device.shared_per_block;
  }

  // bytes(tile) is the shared memory of a kernel's block.
  template <class Bytes>
  static int64_t resident(bool large, const Device& device, const Bytes& bytes) {
    return with_tile(large, [&](auto tile) {
      return resident_blocks(decltype(tile)::kThreads, bytes(tile), device);
    });
  }

  static ProductPlan pointwise_plan(const ProductOperands& in, const Device& device) {
    const auto bytes = [&](auto tile) { return pointwise_bytes<T, decltype(tile)>(in.features); };
    const bool large =
        wants_large(in.features.pixels(), in.outputs, device) && bytes(LargeTile{}) <= device.shared_per_block;
    return row_plan(large, in.features.pixels(), tiles_of(in.outputs, large ? kLargeSide : kSmallSide),
                    resident(large, device, bytes));
  }

  static size_t pointwise_workspace(const PointwiseOperands& o, const Device& device) {
    if (!o.moments) return 0;
    const ProductPlan plan = pointwise_plan(o.in, device);
    const int side = plan.large ? kLargeSide : kSmallSide;
    return sizeof(float) * record_numbers(plan.column_tiles, plan.splits, side, kMoments);
  }

  static void launch_pointwise(const PointwiseOperands& o, const Device& device, void* stream) {
    const ProductPlan plan = pointwise_plan(o.in, device);
    with_tile(plan.large, [&](auto tile) {
      using Shape = decltype(tile);
      const size_t shared = pointwise_bytes<T, Shape>(o.in.features);
      simt::launch({plan.column_tiles * int64_t{plan.splits}, Shape::kThreads, 1, shared, stream},
                   pointwise_product<T, TENSOR_CORES, Shape>, o, plan);
    });
  }

  static void launch_inference(const InferenceOperands& o, const Device& device, void* stream) {
    const Features& f = o.in.features;
    const auto bytes = [&](auto tile) {
      return inference_bytes<T, decltype(tile)>(f, most_images(decltype(tile)::kN));
    };
    const bool large = wants_large(f.pixels(), o.in.outputs, device) && bytes(LargeTile{}) <= device.shared_per_block;
    const ProductPlan plan = image_plan(large, f, o.in.outputs, resident(large, device, bytes));
    with_tile(large, [&](auto tile) {
      using Shape = decltype(tile);
      const size_t shared = inference_bytes<T, Shape>(f, static_cast<int>(plan.row_tiles));
      simt::launch({plan.column_tiles * int64_t{plan.splits}, Shape::kThreads, 1, shared, stream},
                   inference_product<T, TENSOR_CORES, Shape>, o, plan);
    });
  }

  // The two launches of backward_sums, and where the workspace holds what.
  struct Backward {
    ProductPlan gradient, weight;
    size_t dy, a, partials, bytes;
  };

  static Backward backward(const BackwardSumsOperands& o, const Device& device) {
    const Features& f = o.in.features;
    const int64_t pixels = f.pixels();
    const auto gradient_bytes = [&](auto tile) { return BackwardLayout<T, decltype(tile)>(f).bytes(); };
    const auto weight_bytes = [](auto tile) { return WeightLayout<T, decltype(tile)>::kBytes; };
    bool large = wants_large(pixels, f.channels, device) && gradient_bytes(LargeTile{}) <= device.shared_per_block;
    Backward b{};
    const int side = large ? kLargeSide : kSmallSide;
    b.gradient = row_plan(large, pixels, tiles_of(channel_blocks<kSlice<T>>(f), side / kSlice<T>),
                          resident(large, device, gradient_bytes));
    const auto after = [](size_t bytes) { return (bytes + 15) / 16 * 16; };
    b.dy = after(sizeof(float) * record_numbers(b.gradient.column_tiles, b.gradient.splits, side, 2));
    b.a = b.partials = b.bytes = b.dy;
    if (!o.weight_gradient) return b;
    const int64_t slices = tiles_of(pixels, kSlice<T>);
    large = wants_large_weight(o.in.outputs, f.channels, slices, device) &&
            weight_bytes(LargeTile{}) <= device.shared_per_block;
    b.weight = weight_plan(large, o.in.outputs, f.channels, slices, resident(large, device, weight_bytes));
    b.a = b.dy + after(sizeof(T) * pixels * o.in.outputs);
    b.partials = b.a + after(sizeof(T) * pixels * f.channels);
    const int64_t tile = large ? kLargeSide * kLargeSide : kSmallSide * kSmallSide;
    b.bytes = b.partials + (b.weight.splits > 1 ? sizeof(float) * b.weight.column_tiles * b.weight.splits * tile : 0);
    return b;
  }

  static size_t backward_sums_workspace(const BackwardSumsOperands& o, const Device& device) {
    return backward(o, device).bytes;
  }

  static void launch_backward_sums(const BackwardSumsOperands& o, const Device& device, void* stream) {
    const Features& f = o.in.features;
    const Backward b = backward(o, device);
    auto* const workspace = static_cast<unsigned char*>(o.workspace);
    Kept<T> kept{};
    if (o.weight_gradient) kept = {reinterpret_cast<T*>(workspace + b.dy), reinterpret_cast<T*>(workspace + b.a)};
    with_tile(b.gradient.large, [&](auto tile) {
      using Shape = decltype(tile);
      const size_t shared = BackwardLayout<T, Shape>(f).bytes();
      simt::launch({b.gradient.column_tiles * int64_t{b.gradient.splits}, Shape::kThreads, 1, shared, stream},
                   gradient_product<T, TENSOR_CORES, Shape>, o, b.gradient, kept);
    });
    if (!o.weight_gradient) return;
    const WeightOperands weight{kept.dy,
                                kept.a,
                                f.pixels(),
                                o.in.outputs,
                                f.channels,
                                o.weight_gradient,
                                o.in.pointwise.is_float32,
                                reinterpret_cast<float*>(workspace + b.partials),
                                o.tickets};
    with_tile(b.weight.large, [&](auto tile) {
      using Shape = decltype(tile);
      const int64_t grid = b.weight.column_tiles * int64_t{b.weight.splits};
      simt::launch({grid, Shape::kThreads, 1, WeightLayout<T, Shape>::kBytes, stream},
                   weight_product<T, TENSOR_CORES, Shape>, weight, b.weight);
    });
  }
};

template <class T, bool TENSOR_CORES>
constexpr ProductFunctions product_functions() {
  using P = Products<T, TENSOR_CORES>;
  return {P::take,
          P::pointwise_workspace,
          P::launch_pointwise,
          P::launch_inference,
          P::backward_sums_workspace,
          P::launch_backward_sums};
}

}  // namespace fflfast::cuda
