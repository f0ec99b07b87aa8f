// The gradient of the pointwise weight, dW[o, c] = Σ_p dy[p, o] · a[p, c], from what the gradient's product has left in
// memory. A block owns kM outputs × kN channels and a run of slices of pixels; both sides come to shared memory as they
// lie, asynchronously, two slices ahead. The sums of the splits are added by the last block of a tile, in order.
// Bytes: (A + P·O)·e read, once more from L2 by each further tile; 8·splits·C·O for the splits. FLOPs: 2·P·C·O.
// Launches: one.
#pragma once

#include "fusion_moments.cuh"
#include "fusion_product_tile.cuh"

namespace fflfast::cuda {

struct WeightOperands {
  const void* dy;  // (P, O)
  const void* a;   // (P, C)
  int64_t pixels;
  int32_t outputs, channels;
  void* gradient;  // (O, C)
  int32_t is_float32;
  float* partials;  // of each tile and split, kM × kN
  Tickets tickets;
};

constexpr int kWeightStages = 3;

template <class T, class Shape>
struct WeightLayout {
  static constexpr size_t kA = slice_bytes<T, Lines::kAcross>(Shape::kM);
  static constexpr size_t kB = slice_bytes<T, Lines::kAcross>(Shape::kN);
  static constexpr size_t kStage = kA + kB;
  static constexpr size_t kFlag =
      kWeightStages * kStage > kStagedBytes<Shape> ? kWeightStages * kStage : kStagedBytes<Shape>;
  static constexpr size_t kBytes = kFlag + sizeof(int);
};

template <class T, bool TENSOR_CORES, class Shape>
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(Shape::kThreads, kBlocksBeside<TENSOR_CORES, Shape>)
void weight_product(const FFLFAST_GRID_CONSTANT WeightOperands o, const FFLFAST_GRID_CONSTANT ProductPlan plan) {
  using Layout = WeightLayout<T, Shape>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kK = kSlice<T>, kThreads = Shape::kThreads;
  unsigned char* const shared = simt::shared_memory<unsigned char>();
  const SplitGrid grid{plan.column_tiles, plan.splits};
  const int across = (o.channels + kN - 1) / kN, tile = grid.channel_block();
  const int output = tile / across * kM, channel = tile % across * kN;
  // plan.row_tiles: slices of pixels; a split has a run of them.
  const int64_t begin = grid.split() * plan.row_tiles / plan.splits;
  const int slices = static_cast<int>((grid.split() + 1) * plan.row_tiles / plan.splits - begin);
  const auto a = [&](int slice) { return reinterpret_cast<T*>(shared + slice % kWeightStages * Layout::kStage); };
  const auto b = [&](int slice) { return a(slice) + Layout::kA / sizeof(T); };
  const auto bring = [&](int slice) {
    if (slice < slices) {
      const int64_t p0 = (begin + slice) * kK, left = o.pixels - p0;
      const int lines = left < kK ? static_cast<int>(left) : kK;
      copy_lines<T, kK, kM, kThreads>(static_cast<const T*>(o.dy) + p0 * o.outputs + output, o.outputs, lines,
                                      o.outputs - output, a(slice), slice_pitch<T, Lines::kAcross>(kM));
      copy_lines<T, kK, kN, kThreads>(static_cast<const T*>(o.a) + p0 * o.channels + channel, o.channels, lines,
                                      o.channels - channel, b(slice), slice_pitch<T, Lines::kAcross>(kN));
    }
    simt::copy_async_commit();
  };
  TileProduct<T, TENSOR_CORES, Shape, Lines::kAcross, Lines::kAcross> product;
  product.clear();
  FFLFAST_ROLLED
  for (int slice = 1 - kWeightStages; slice < slices; ++slice) {
    simt::copy_async_wait<143, kWeightStages - 2>();
    simt::sync_block<144>();
    bring(slice + kWeightStages - 1);
    if (slice >= 0) product.template add<145>(a(slice), b(slice));
  }
  simt::sync_block<148>();
  float* const staged = reinterpret_cast<float*>(shared);
  product.stage(staged, [](float sum) { return sum; });
  simt::sync_block<149>();

  // A staged tile to the gradient.
  const auto write = [&](int of) {
    const int rows = o.outputs - of / across * kM, columns = o.channels - of % across * kN;
    const int64_t offset = int64_t{of / across * kM} * o.channels + of % across * kN;
    if (std::is_same_v<T, float> || o.is_float32 != 0)
      write_staged<float, kN>(staged, kStagedPitch<Shape>, rows < kM ? rows : kM, columns,
                              static_cast<float*>(o.gradient) + offset, o.channels);
    else
      write_staged<T, kN>(staged, kStagedPitch<Shape>, rows < kM ? rows : kM, columns,
                          static_cast<T*>(o.gradient) + offset, o.channels);
  };
  if (plan.splits == 1) return write(tile);
  const auto partial = [&](int of, int64_t split) {
    return o.partials + (int64_t{of} * plan.splits + split) * (kM * kN);
  };
  constexpr int kPacks = kN / 4;
  for (int i = simt::thread_index(); i < kM * kPacks; i += kThreads) {
    const float* const from = staged + i / kPacks * kStagedPitch<Shape> + i % kPacks * 4;
    simt::store_streaming<float, 4>(partial(tile, grid.split()) + 4 * i,
                                    *reinterpret_cast<const Pack<float, 4>*>(from));
  }
  simt::fence_device();
  simt::sync_block<150>();
  const int counters = plan.column_tiles < kFusionCounters ? plan.column_tiles : kFusionCounters;
  const int counter = tile % counters, sharing = (plan.column_tiles - counter + counters - 1) / counters;
  if (!is_last_of<151>(counter_of(o.tickets, counter), sharing * plan.splits,
                       reinterpret_cast<int*>(shared + Layout::kFlag)))
    return;
  FFLFAST_ROLLED
  for (int of = counter; of < plan.column_tiles; of += counters) {
    FFLFAST_ROLLED
    for (int i = simt::thread_index(); i < kM * kPacks; i += kThreads) {
      Pack<float, 4> sum{};
      for (int split = 0; split < plan.splits; ++split) {
        const auto part = simt::load_device<float, 4>(partial(of, split) + 4 * i);
        FFLFAST_UNROLL
        for (int k = 0; k < 4; ++k) sum[k] += part[k];
      }
      *reinterpret_cast<Pack<float, 4>*>(staged + i / kPacks * kStagedPitch<Shape> + i % kPacks * 4) = sum;
    }
    simt::sync_block<152>();
    write(of);
    simt::sync_block<153>();
  }
}

}  // namespace fflfast::cuda
