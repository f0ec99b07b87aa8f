// The forward products y = W·a, a = relu(scale1·h + shift1), whose left side comes from x on the way:
//
//   y[p, o] = Σ_c a[p, c] · W[o, c]        p a pixel of the batch, c a channel of the virtual concat
//
// A block owns kM pixels × kN outputs and goes over the channels in slices (one block of channels of one map each). It
// brings x with its halo and the channels' numbers to shared memory one slice ahead, and W while it forms a there: nine
// fma a number in a window that slides along the pixels, rounded to the dtype of the product. So x is read from memory
// once, and from the L2 cache and formed again for each further tile of outputs.
//
// pointwise stores y and, where wanted, merges the moments of y as stored over a block's tiles, then over blocks. In
// inference a block owns whole images × kN outputs; relu(scale2·y + shift2) is summed over each image's pixels in
// order, and y is not stored.
// Bytes: A·e read; pointwise writes P·O·e. FLOPs: 2·P·C·O, and 18·A for each tile of outputs. Launches: one each.
#pragma once

#include "fusion_moments.cuh"
#include "fusion_product_tile.cuh"

namespace fflfast::cuda {

// Where a block's shared memory holds what: the slices and then, in the same place, the tile's sums; records after.
template <class T, class Shape>
struct ForwardLayout {
  int x_rows;

  FFLFAST_HOST_DEVICE explicit ForwardLayout(const Features& f) : x_rows(Shape::kM + 2 * product_halo(f)) {}
  static constexpr size_t kA = slice_bytes<T, Lines::kAlong>(Shape::kM), kW = slice_bytes<T, Lines::kAlong>(Shape::kN);
  static constexpr int kParked = Shape::kM == kLargeSide ? 20 : 0;
  static constexpr size_t kPark = kA + kW, kNumbers = kPark + park_bytes<Shape>(kParked);
  static constexpr size_t kX = kNumbers + 2 * kChannelNumbersBytes<T>;
  FFLFAST_HOST_DEVICE size_t x_bytes() const { return tile_bytes<T, kSlice<T>>(x_rows); }
  FFLFAST_HOST_DEVICE size_t records() const {
    const size_t slices = kX + 2 * x_bytes();
    return slices > kStagedBytes<Shape> ? slices : kStagedBytes<Shape>;
  }
};

template <class T, bool TENSOR_CORES, class Shape>
struct ForwardProduct {
  static constexpr int kM = Shape::kM, kN = Shape::kN, kLane = kLaneChannels<T>;
  static constexpr int kPitch = slice_pitch<T, Lines::kAlong>(kM);
  using Layout = ForwardLayout<T, Shape>;
  using Product = TileProduct<T, TENSOR_CORES, Shape, Lines::kAlong, Lines::kAlong>;

  const ProductOperands& in;
  TilePlace* place;
  unsigned char* shared;
  Layout at;

  FFLFAST_DEVICE ForwardProduct(const ProductOperands& in, unsigned char* shared)
      : in(in), place(reinterpret_cast<TilePlace*>(shared)), shared(shared + kPlaceBytes), at(in.features) {}

  FFLFAST_DEVICE T* a() const { return reinterpret_cast<T*>(shared); }
  FFLFAST_DEVICE T* w() const { return reinterpret_cast<T*>(shared + Layout::kA); }
  FFLFAST_DEVICE float* parked() const { return reinterpret_cast<float*>(shared + Layout::kPark); }
  FFLFAST_DEVICE float* numbers(int turn) const {
    return reinterpret_cast<float*>(shared + Layout::kNumbers + turn * kChannelNumbersBytes<T>);
  }
  FFLFAST_DEVICE float* records() const { return reinterpret_cast<float*>(shared + at.records()); }
  FFLFAST_DEVICE PixelTile<T> x(const ChannelBlock& block, int turn) const {
    return halo_tile(in.features, block, reinterpret_cast<T*>(shared + Layout::kX + turn * at.x_bytes()), *place, kM);
  }

  FFLFAST_DEVICE void bring_x(int slice) const {
    const ChannelBlock block = channel_block<kSlice<T>>(in.features, slice);
    load_pixels<T, kSlice<T>>(in.features, block, place->around, x(block, slice & 1));
    load_channel_numbers<T>(in, block, numbers(slice & 1));
  }

  FFLFAST_DEVICE void form_a(int slice) const {
    const float* const n = numbers(slice & 1);
    const auto scale = of_lane<T>(n + kScaleLine * kSlice<T>), shift = of_lane<T>(n + kShiftLine * kSlice<T>);
    T* const own = a() + simt::lane_index() * kLane;
    const PixelTile<T> tile = x(channel_block<kSlice<T>>(in.features, slice), slice & 1);
    each_depthwise(in.features, tile, n, *place, [&](int pixel, const float(&h)[kLane]) {
      Pack<T, kLane> pack;
      FFLFAST_UNROLL
      for (int v = 0; v < kLane; ++v) pack[v] = simt::convert<T>(relu(::fmaf(scale[v], h[v], shift[v])));
      *reinterpret_cast<Pack<T, kLane>*>(own + pixel * kPitch) = pack;
    });
  }

  // The sums of `pixels` pixels from p0 and of outputs from `output`, staged in shared memory until the next call,
  // which begins with a barrier. Rows and columns that are not there hold anything. Sites SITE … SITE + 9.
  template <int SITE, class Round>
  FFLFAST_DEVICE const float* run(int64_t p0, int pixels, int output, const Round& round) const {
    const int slices = channel_blocks<kSlice<T>>(in.features);
    Product product;
    product.clear();
    simt::sync_block<SITE>();
    if (simt::thread_index() == 0) find_place(in.features, p0, pixels, place);
    FFLFAST_ROLLED
    for (int slice = -1; slice < slices; ++slice) {
      product.template park<Layout::kParked>(parked());
      simt::copy_async_wait<SITE + 1, 0>();
      simt::sync_block<SITE + 2>();
      if (slice >= 0)
        copy_weights<T, kN, Shape::kThreads>(in, output, channel_block<kSlice<T>>(in.features, slice), w(), kPitch);
      simt::copy_async_commit();
      if (slice + 1 < slices) bring_x(slice + 1);
      simt::copy_async_commit();
      if (slice < 0) continue;
      form_a(slice);
      simt::copy_async_wait<SITE + 3, 1>();
      simt::sync_block<SITE + 4>();
      product.template unpark<Layout::kParked>(parked());
      product.template add<SITE + 5>(a(), w());
    }
    simt::sync_block<SITE + 8>();
    product.stage(reinterpret_cast<float*>(shared), round);
    simt::sync_block<SITE + 9>();
    return reinterpret_cast<const float*>(shared);
  }
};

// Shared memory of a block: the threads' records and a flag (finish_splits).
template <class T, class Shape>
size_t pointwise_bytes(const Features& f) {
  return kPlaceBytes + ForwardLayout<T, Shape>(f).records() + sizeof(float) * (kMoments * Shape::kThreads + 1);
}

template <class T, bool TENSOR_CORES, class Shape>
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(Shape::kThreads, kBlocksBeside<TENSOR_CORES, Shape>)
void pointwise_product(const FFLFAST_GRID_CONSTANT PointwiseOperands o, const FFLFAST_GRID_CONSTANT ProductPlan plan) {
  constexpr int kM = Shape::kM, kN = Shape::kN, kParts = Shape::kThreads / kN, kRows = kM / kParts, kGroup = 8;
  const ForwardProduct<T, TENSOR_CORES, Shape> forward(o.in, simt::shared_memory<unsigned char>());
  const SplitGrid grid{plan.column_tiles, plan.splits};
  const int output = grid.channel_block() * kN;
  // A thread has one column and kRows rows of it for the moments, which it keeps in shared memory from tile to tile.
  float* const records = forward.records();
  {
    const float nothing[kMoments] = {0.0f, 0.0f, 0.0f, 0.0f};
    put_record<kN>(records, simt::thread_index() / kN, simt::thread_index() % kN, nothing);
  }
  FFLFAST_ROLLED
  for (auto tile = static_cast<int>(grid.split()); tile < plan.row_tiles; tile += plan.splits) {
    const int64_t left = o.in.features.pixels() - int64_t{tile} * kM;
    const auto stored = [](float sum) { return simt::convert<float>(simt::convert<T>(sum)); };
    const float* const staged = forward.template run<101>(int64_t{tile} * kM, left < kM ? static_cast<int>(left) : kM,
                                                          output, stored);
    const int pixels = forward.place->pixels;  // rather than kept in a register through the product, as is the address
    write_staged<T, kN>(staged, kStagedPitch<Shape>, pixels, o.in.outputs - output,
                        static_cast<T*>(o.y) + forward.place->first * o.in.outputs + output, o.in.outputs);
    if (o.moments) {
      const int column = simt::thread_index() % kN, part = simt::thread_index() / kN;
      float moments[kMoments];
      get_record<kN>(records, part, column, moments);
      FFLFAST_ROLLED
      for (int row = part * kRows; row < (part + 1) * kRows && row < pixels; row += kGroup) {
        float values[kGroup][1];
        FFLFAST_UNROLL
        for (int n = 0; n < kGroup; ++n) values[n][0] = staged[(row + n) * kStagedPitch<Shape> + column];
        add_moments(values, 0, pixels - row < kGroup ? pixels - row : kGroup, moments);
      }
      put_record<kN>(records, part, column, moments);
    }
  }
  if (!o.moments) return;
  finish_splits<111, kN, kMoments, MergeMoments>(
      grid, records, kParts, static_cast<float*>(o.workspace), o.tickets,
      [&](int tile, int c, const float(&record)[kMoments]) {
        const int out = tile * kN + c;
        if (out >= o.in.outputs) return;
        o.moments[out] = mean_of(record);
        o.moments[o.in.outputs + out] = record[3];
      });
}

// Shared memory of a block: behind the slices, the sums of each image and column, of the upper and lower rows of tiles.
template <class T, class Shape>
size_t inference_bytes(const Features& f, int images) {
  return kPlaceBytes + ForwardLayout<T, Shape>(f).records() + sizeof(float) * 2 * images * Shape::kN;
}

// plan.splits: the groups of images, plan.row_tiles: images of a group.
template <class T, bool TENSOR_CORES, class Shape>
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(Shape::kThreads, kBlocksBeside<TENSOR_CORES, Shape>)
void inference_product(const FFLFAST_GRID_CONSTANT InferenceOperands o, const FFLFAST_GRID_CONSTANT ProductPlan plan) {
  constexpr int kM = Shape::kM, kN = Shape::kN, kParts = 2, kRows = kM / kParts;
  static_assert(Shape::kThreads == kParts * kN, "a thread has a column and half of the rows");
  const ForwardProduct<T, TENSOR_CORES, Shape> forward(o.in, simt::shared_memory<unsigned char>());
  const Features& f = o.in.features;
  const SplitGrid grid{plan.column_tiles, plan.splits};
  const int output = grid.channel_block() * kN, image = f.image();
  const int64_t first_image = grid.split() * plan.row_tiles, left = f.batch - first_image;
  const int images = left < plan.row_tiles ? static_cast<int>(left) : static_cast<int>(plan.row_tiles);
  // A thread has one column and the upper or lower rows of it.
  const auto own_sums = [&](int part) {
    return forward.records() + part * plan.row_tiles * kN + simt::thread_index() % kN;
  };
  for (int k = 0; k < images; ++k) own_sums(simt::thread_index() / kN)[k * kN] = 0.0f;
  const int all = images * image;
  FFLFAST_ROLLED
  for (int first = 0; first < all; first += kM) {
    const int pixels = all - first < kM ? all - first : kM;
    const float* const staged =
        forward.template run<116>(first_image * image + first, pixels, output, [](float sum) { return sum; });
    const int column = simt::thread_index() % kN, part = simt::thread_index() / kN;
    NormFactors norm{0.0f, 0.0f, 0.0f, 0.0f};
    if (output + column < o.in.outputs) norm = factors(o.norm2, output + column);
    float* const sums = own_sums(part);
    int row = part * kRows;
    const int last = row + kRows < pixels ? row + kRows : pixels;
    FFLFAST_ROLLED
    while (row < last) {
      const int k = (first + row) / image, rest = (k + 1) * image - first;
      const int stop = last < rest ? last : rest;
      float sum = 0.0f;
      FFLFAST_ROLLED
      for (; row < stop; ++row) sum += relu(norm.normed(staged[row * kStagedPitch<Shape> + column]));
      sums[k * kN] += sum;
    }
  }
  simt::sync_block<126>();
  const int own = output + simt::thread_index();
  if (simt::thread_index() >= kN || own >= o.in.outputs) return;
  for (int k = 0; k < images; ++k) {
    const float sum = own_sums(0)[k * kN] + own_sums(1)[k * kN];
    static_cast<T*>(o.pooled)[(first_image + k) * o.in.outputs + own] =
        simt::convert<T>(sum / static_cast<float>(image));
  }
}

}  // namespace fflfast::cuda
