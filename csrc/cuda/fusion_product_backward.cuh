// The product through which the gradient comes back to z, the output of the first norm:
//
//   dy = scale2 · (g · 1[scale2·y + shift2 > 0] − [training2] (dβ2 + ŷ · dγ2) / count2),   g = ∂L/∂pooled / (H·W)
//   dz[p, c] = 1[z > 0] · Σ_o dy[p, o] · W[o, c],   dβ1 = Σ_p dz,   dγ1 = Σ_p dz · ĥ
//
// A block owns kM pixels × kN channels (whole blocks of channels) and goes over the outputs in slices: y and W come to
// shared memory while the slice before is being multiplied, and y becomes dy in its place. Behind the product stand the
// mask and ĥ, for which h is computed again from x, one block of channels after the other. Where the weight's gradient
// is wanted, dy and a = relu(z), which are at hand here, are left in memory as the products take them
// (fusion_product_weight.cuh): forming them again for each tile of that product would cost more than the product.
// Bytes: P·O·e of y and A·e of x read, A·e of dz written (with the weight's gradient (A + P·O)·e more). FLOPs: 2·P·C·O
// and 18·A. y is read again, from L2, by each tile of channels. Launches: one.
#pragma once

#include "fusion_moments.cuh"
#include "fusion_product_tile.cuh"

namespace fflfast::cuda {

// What the gradient's product leaves for the weight's; null: not wanted.
template <class T>
struct Kept {
  T* dy;  // (P, O)
  T* a;   // (P, C)
};

// The numbers of an output, lines of kSlice: dy = (active ? g · slope : 0) − offset − (y − mean) · share.
constexpr int kSlopeLine = 2, kOffsetLine = 3, kMiddleLine = 4, kShareLine = 5, kOutputLines = 6;

// Shared memory: the slices; then in the same place the sums, a tile of x and its channels' numbers; records after.
template <class T, class Shape>
struct BackwardLayout {
  static constexpr int kPitchA = slice_pitch<T, Lines::kAlong>(Shape::kM);
  static constexpr int kPitchB = slice_pitch<T, Lines::kAcross>(Shape::kN);
  static constexpr size_t kA = slice_bytes<T, Lines::kAlong>(Shape::kM);
  static constexpr size_t kB = slice_bytes<T, Lines::kAcross>(Shape::kN);
  static constexpr int kParked = Shape::kM == kLargeSide ? 24 : 0;
  static constexpr size_t kOutputs = sizeof(float) * kOutputLines * kSlice<T>;
  static constexpr size_t kStagedNumbers = kStagedBytes<Shape>, kX = kStagedNumbers + kChannelNumbersBytes<T>;
  int images;  // that a tile may have a part of
  int x_rows;

  FFLFAST_HOST_DEVICE explicit BackwardLayout(const Features& f)
      : images((Shape::kM - 1 + f.image() - 1) / f.image() + 1), x_rows(Shape::kM + 2 * product_halo(f)) {}
  FFLFAST_HOST_DEVICE size_t grads() const { return sizeof(T) * kSlice<T> * images; }
  FFLFAST_HOST_DEVICE size_t turn() const { return kA + kB + kOutputs + grads(); }
  FFLFAST_HOST_DEVICE size_t records() const {
    const size_t slices = 2 * turn() + park_bytes<Shape>(kParked), after = kX + tile_bytes<T, kSlice<T>>(x_rows);
    return slices > after ? slices : after;
  }
  FFLFAST_HOST_DEVICE size_t bytes() const {
    return kPlaceBytes + records() + sizeof(float) * (2 * Shape::kN * (Shape::kThreads / simt::kWarpSize) + 1);
  }
};

template <class T, bool TENSOR_CORES, class Shape>
struct GradientProduct {
  static constexpr int kM = Shape::kM, kN = Shape::kN, kK = kSlice<T>, kLane = kLaneChannels<T>, kBlocks = kN / kK;
  using Layout = BackwardLayout<T, Shape>;
  using Product = TileProduct<T, TENSOR_CORES, Shape, Lines::kAlong, Lines::kAcross>;
  static constexpr int kPitchA = Layout::kPitchA, kPitchB = Layout::kPitchB;

  const BackwardSumsOperands& o;
  const Kept<T>& kept;
  TilePlace* place;
  unsigned char* shared;
  Layout at;
  int first_block;  // of channels, of this tile
  int blocks;       // of the virtual concat

  FFLFAST_DEVICE GradientProduct(const BackwardSumsOperands& o, const Kept<T>& kept, int tile, unsigned char* shared)
      : o(o), kept(kept), place(reinterpret_cast<TilePlace*>(shared)), shared(shared + kPlaceBytes), at(o.in.features),
        first_block(tile * kBlocks), blocks(channel_blocks<kK>(o.in.features)) {}

  FFLFAST_DEVICE T* a(int turn) const { return reinterpret_cast<T*>(shared + turn * at.turn()); }
  FFLFAST_DEVICE T* b(int turn) const { return reinterpret_cast<T*>(shared + turn * at.turn() + Layout::kA); }
  FFLFAST_DEVICE float* numbers(int turn) const {
    return reinterpret_cast<float*>(shared + turn * at.turn() + Layout::kA + Layout::kB);
  }
  FFLFAST_DEVICE T* grads(int turn) const {
    return reinterpret_cast<T*>(shared + turn * at.turn() + Layout::kA + Layout::kB + Layout::kOutputs);
  }

  FFLFAST_DEVICE float* parked() const { return reinterpret_cast<float*>(shared + 2 * at.turn()); }
  FFLFAST_DEVICE float* records() const { return reinterpret_cast<float*>(shared + at.records()); }

  FFLFAST_DEVICE void bring(int slice) const {
    const int output = slice * kK, turn = slice & 1, outputs = o.in.outputs, count = outputs - output;
    copy_lines<T, kM, kK, Shape::kThreads>(static_cast<const T*>(o.y) + place->first * outputs + output, outputs,
                                           place->pixels, count, a(turn), kPitchA);
    const auto last = o.in.features.by_image(static_cast<unsigned>(place->phase + place->pixels - 1));
    copy_part<T, kK>(static_cast<const T*>(o.grad) + place->around.image * outputs + output, outputs,
                     static_cast<int>(last) + 1, count, grads(turn), kK, at.images);
    FFLFAST_ROLLED
    for (int k = 0; k < kBlocks; ++k) {
      ChannelBlock block{0, 0, 0, 0};
      if (first_block + k < blocks) block = channel_block<kK>(o.in.features, first_block + k);
      copy_weights<T, kK, Shape::kThreads>(o.in, output, block, b(turn) + k * kK, kPitchB);
    }
    load_output_numbers(output, numbers(turn));
  }

  FFLFAST_DEVICE void load_output_numbers(int output, float* to) const {
    const int column = simt::thread_index(), own = output + column, outputs = o.in.outputs;
    if (column >= kK) return;
    NormFactors n{0.0f, 0.0f, 0.0f, 0.0f};
    float bias = 0.0f, weight = 0.0f;
    if (own < outputs) {
      n = factors(o.norm2, own);
      if (o.norm2.training) {
        const float count = count_of(o.norm2);
        bias = o.sums2[own] / count;
        weight = o.sums2[outputs + own] / count;
      }
    }
    to[column] = n.scale;
    to[kK + column] = n.shift;
    to[kSlopeLine * kK + column] = n.scale / static_cast<float>(o.in.features.image());
    to[kOffsetLine * kK + column] = n.scale * bias;
    to[kMiddleLine * kK + column] = n.mean;
    to[kShareLine * kK + column] = n.scale * (n.rstd * weight);
  }

  // y of a slice becomes dy where it lies; the tiles of the first channels leave it in memory.
  FFLFAST_DEVICE void form_dy(int slice) const {
    constexpr int kWidth = kPack<T>, kPacks = kK / kWidth;
    const int turn = slice & 1, output = slice * kK, outputs = o.in.outputs, pixels = place->pixels;
    const float* const n = numbers(turn);
    T* const memory = first_block == 0 && kept.dy ? kept.dy + place->first * outputs + output : nullptr;
    const bool packs = memory != nullptr && aligned(memory, outputs);
    FFLFAST_ROLLED
    for (int i = simt::thread_index(); i < kM * kPacks; i += Shape::kThreads) {
      const int row = i / kPacks, c = i % kPacks * kWidth;
      if (row >= pixels) continue;
      T* const own = a(turn) + row * kPitchA + c;
      auto y = *reinterpret_cast<const Pack<T, kWidth>*>(own);
      const unsigned image = o.in.features.by_image(static_cast<unsigned>(place->phase + row));
      const auto grad = *reinterpret_cast<const Pack<T, kWidth>*>(grads(turn) + image * kK + c);
      FFLFAST_UNROLL
      for (int k = 0; k < kWidth; ++k) {
        const float* const of = n + c + k;
        const float value = simt::convert<float>(y[k]);
        const bool active = !(::fmaf(of[0], value, of[kK]) <= 0.0f);  // where NaN too, as in PyTorch
        const float g = active ? simt::convert<float>(grad[k]) * of[kSlopeLine * kK] : 0.0f;
        y[k] = simt::convert<T>(::fmaf(of[kMiddleLine * kK] - value, of[kShareLine * kK], g - of[kOffsetLine * kK]));
      }
      *reinterpret_cast<Pack<T, kWidth>*>(own) = y;
      if (memory == nullptr) continue;
      T* const to = memory + static_cast<int64_t>(row) * outputs + c;
      if (packs && output + c + kWidth <= outputs) {
        *reinterpret_cast<Pack<T, kWidth>*>(to) = y;
      } else {
        FFLFAST_UNROLL
        for (int k = 0; k < kWidth; ++k)
          if (output + c + k < outputs) to[k] = y[k];
      }
    }
  }

  // The product of `pixels` pixels from p0, staged; begins with a barrier. Sites SITE … SITE + 7.
  template <int SITE>
  FFLFAST_DEVICE void multiply(int64_t p0, int pixels) const {
    const int slices = (o.in.outputs + kK - 1) / kK;
    Product product;
    product.clear();
    simt::sync_block<SITE>();
    if (simt::thread_index() == 0) find_place(o.in.features, p0, pixels, place);
    FFLFAST_ROLLED
    for (int slice = -1; slice < slices; ++slice) {
      product.template park<Layout::kParked>(parked());
      simt::copy_async_wait<SITE + 1, 0>();
      simt::sync_block<SITE + 2>();
      if (slice + 1 < slices) bring(slice + 1);
      simt::copy_async_commit();
      if (slice < 0) continue;
      form_dy(slice);
      simt::sync_block<SITE + 3>();
      product.template unpark<Layout::kParked>(parked());
      product.template add<SITE + 4>(a(slice & 1), b(slice & 1));
    }
    simt::sync_block<SITE + 7>();
    product.stage(reinterpret_cast<float*>(shared), [](float sum) { return sum; });
  }

  // dz and its sums for block k of the tile's channels; `sums` is this warp's record. Begins with a barrier, as the
  // product does. Sites SITE … SITE + 2.
  template <int SITE>
  FFLFAST_DEVICE void mask(int k, float* sums) const {
    const Features& f = o.in.features;
    const ChannelBlock block = channel_block<kK>(f, first_block + k);
    float* const n = reinterpret_cast<float*>(shared + Layout::kStagedNumbers);
    const PixelTile<T> x = halo_tile(f, block, reinterpret_cast<T*>(shared + Layout::kX), *place, kM);
    simt::sync_block<SITE>();
    load_pixels<T, kK>(f, block, place->around, x);
    load_channel_numbers<T>(o.in, block, n);
    simt::copy_async_commit();
    simt::copy_async_wait<SITE + 1, 0>();
    simt::sync_block<SITE + 2>();
    const int channel = simt::lane_index() * kLane;
    const auto scale = of_lane<T>(n + kScaleLine * kK), shift = of_lane<T>(n + kShiftLine * kK);
    const auto mean = of_lane<T>(n + kMeanLine * kK), rstd = of_lane<T>(n + kRstdLine * kK);
    const float* const staged = reinterpret_cast<const float*>(shared) + k * kK + channel;
    const int64_t offset = block.whole + channel;
    const bool pairs = (offset | f.channels) % kLane == 0;
    float beta[kLane], gamma[kLane];
    FFLFAST_UNROLL
    for (int v = 0; v < kLane; ++v) beta[v] = gamma[v] = 0.0f;
    const auto write = [&](T* to, const Pack<T, kLane>& pack) {
      if (pairs && channel + kLane <= block.count) {
        *reinterpret_cast<Pack<T, kLane>*>(to) = pack;
      } else {
        FFLFAST_UNROLL
        for (int v = 0; v < kLane; ++v)
          if (channel + v < block.count) to[v] = pack[v];
      }
    };
    each_depthwise(f, x, n, *place, [&](int pixel, const float(&h)[kLane]) {
      const auto da = *reinterpret_cast<const Pack<float, kLane>*>(staged + pixel * kStagedPitch<Shape>);
      Pack<T, kLane> dz, activated;
      FFLFAST_UNROLL
      for (int v = 0; v < kLane; ++v) {
        const float z = ::fmaf(scale[v], h[v], shift[v]);
        activated[v] = simt::convert<T>(relu(z));
        dz[v] = simt::convert<T>(z <= 0.0f ? 0.0f : da[v]);
        const float rounded = simt::convert<float>(dz[v]);
        beta[v] += rounded;
        gamma[v] = ::fmaf(rounded, (h[v] - mean[v]) * rstd[v], gamma[v]);
      }
      const int64_t to = (place->first + pixel) * f.channels + offset;
      write(static_cast<T*>(o.dz) + to, dz);
      if (kept.a) write(kept.a + to, activated);
    });
    FFLFAST_UNROLL
    for (int v = 0; v < kLane; ++v) {
      sums[k * kK + channel + v] += beta[v];
      sums[kN + k * kK + channel + v] += gamma[v];
    }
  }
};

template <class T, bool TENSOR_CORES, class Shape>
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(Shape::kThreads, kBlocksBeside<TENSOR_CORES, Shape>)
void gradient_product(const FFLFAST_GRID_CONSTANT BackwardSumsOperands o, const FFLFAST_GRID_CONSTANT ProductPlan plan,
                      const FFLFAST_GRID_CONSTANT Kept<T> kept) {
  using Backward = GradientProduct<T, TENSOR_CORES, Shape>;
  constexpr int kM = Shape::kM, kN = Shape::kN, kK = kSlice<T>, kWarps = Shape::kThreads / simt::kWarpSize;
  const Features& f = o.in.features;
  const SplitGrid grid{plan.column_tiles, plan.splits};
  const Backward backward(o, kept, grid.channel_block(), simt::shared_memory<unsigned char>());
  // Of each warp two lines of kN, of which a lane has its channels' alone.
  float* const records = backward.records();
  float* const own = records + simt::warp_index() * 2 * kN;
  for (int i = simt::lane_index() * Backward::kLane; i < 2 * kN; i += kK) {
    FFLFAST_UNROLL
    for (int v = 0; v < Backward::kLane; ++v) own[i + v] = 0.0f;
  }
  FFLFAST_ROLLED
  for (auto tile = static_cast<int>(grid.split()); tile < plan.row_tiles; tile += plan.splits) {
    const int64_t p0 = int64_t{tile} * kM, left = f.pixels() - p0;
    backward.template multiply<127>(p0, left < kM ? static_cast<int>(left) : kM);
    FFLFAST_ROLLED
    for (int k = 0; k < Backward::kBlocks; ++k)
      if (backward.first_block + k < backward.blocks) backward.template mask<135>(k, own);
  }
  finish_splits<138, kN, 2, MergeSums>(
      grid, records, kWarps, static_cast<float*>(o.workspace), o.tickets,
      [&](int tile, int c, const float(&record)[2]) {
        const int index = tile * Backward::kBlocks + c / kK;
        if (index >= backward.blocks) return;
        const ChannelBlock block = channel_block<kK>(f, index);
        if (c % kK >= block.count) return;
        o.sums1[block.whole + c % kK] = record[0];
        o.sums1[f.channels + block.whole + c % kK] = record[1];
      });
}

}  // namespace fflfast::cuda
