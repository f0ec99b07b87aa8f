// The launches of the fusion's kernels without a matrix product.
#include "fusion_pixels.h"

#include "fusion_inputs.cuh"
#include "fusion_launch_policy.h"
#include "fusion_pool.cuh"
#include "fusion_statistics.cuh"

namespace fflfast::cuda {

namespace {

// A call of one kernel with T for the storage of feature maps.
template <class Call>
auto by_storage(Storage storage, const Call& call) {
  switch (storage) {
    case Storage::kBFloat16: return call(simt::BFloat16{});
    case Storage::kFloat16: return call(simt::Half{});
    default: return call(float{});
  }
}

simt::Launch tile_launch(const RowTiles& cut, size_t shared, void* stream) {
  return {cut.channel_blocks * cut.splits, kTileThreads, 1, shared, stream};
}

template <class T, int V>
void launch_pool_of(const PoolCall& call, const simt::DeviceProperties& device, void* stream) {
  const int64_t packs = call.channels / V;
  const PoolShape shape = pool_shape(call.batch, packs, call.pixels, device.sm_count);
  const int64_t grid = (call.batch + shape.images - 1) / shape.images * ((packs + shape.lanes - 1) / shape.lanes);
  simt::launch({grid, kTileThreads, 1, sizeof(float) * 3 * V * kTileThreads, stream}, pool<T, V>, call, shape);
}

}  // namespace

bool plan_statistics(const Features& features, Storage storage, const simt::DeviceProperties& device, RowTiles* cut) {
  return by_storage(storage, [&](auto t) {
    using T = decltype(t);
    return cut_rows(features, channel_blocks<kBlockChannels<T>>(features), device, statistics_bytes<T>, cut);
  });
}

bool plan_inputs(const Features& features, Storage storage, const simt::DeviceProperties& device, RowTiles* cut) {
  return by_storage(storage, [&](auto t) {
    using T = decltype(t);
    const auto bytes = [](int pixels, int halo) { return InputsLayout<T>(pixels, halo).bytes(); };
    return cut_rows(features, channel_blocks<kBlockChannels<T>>(features), device, bytes, cut);
  });
}

int64_t statistics_records(const RowTiles& cut, Storage storage) {
  return by_storage(storage, [&](auto t) {
    return record_numbers(cut.channel_blocks, cut.splits, kBlockChannels<decltype(t)>, kMoments);
  });
}

int64_t inputs_records(const RowTiles& cut, Storage storage) {
  return by_storage(storage, [&](auto t) {
    return record_numbers(cut.channel_blocks, cut.splits, kBlockChannels<decltype(t)>, 9);
  });
}

void launch_statistics(const StatisticsCall& call, Storage storage, const RowTiles& cut, const Scratch& scratch,
                       void* stream) {
  by_storage(storage, [&](auto t) {
    using T = decltype(t);
    const simt::Launch launch = tile_launch(cut, statistics_bytes<T>(cut.pixels, cut.halo), stream);
    simt::launch(launch, depthwise_statistics<T>, call, cut, scratch);
  });
}

void launch_inputs(const InputsCall& call, Storage storage, const RowTiles& cut, const Scratch& scratch, void* stream) {
  by_storage(storage, [&](auto t) {
    using T = decltype(t);
    const simt::Launch launch = tile_launch(cut, InputsLayout<T>(cut.pixels, cut.halo).bytes(), stream);
    simt::launch(launch, backward_inputs<T>, call, cut, scratch);
  });
}

void launch_pool(const PoolCall& call, Storage storage, const simt::DeviceProperties& device, void* stream) {
  by_storage(storage, [&](auto t) {
    using T = decltype(t);
    const bool aligned = reinterpret_cast<uintptr_t>(call.y) % 16 == 0 && call.channels % kPack<T> == 0;
    aligned ? launch_pool_of<T, kPack<T>>(call, device, stream) : launch_pool_of<T, 1>(call, device, stream);
  });
}

void launch_backward_pool(const PoolSumsCall& call, Storage storage, void* stream) {
  by_storage(storage, [&](auto t) {
    const int64_t grid = (call.channels + kSumLanes - 1) / kSumLanes;
    simt::launch({grid, kSumThreads, 1, sizeof(float) * 2 * kSumThreads, stream}, backward_pool<decltype(t)>, call);
  });
}

void launch_update_running(const RunningCall& call, int norms, void* stream) {
  simt::launch({norms, kRunningThreads, 1, 0, stream}, update_running, call);
}

}  // namespace fflfast::cuda
