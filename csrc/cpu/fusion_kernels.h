// The stages of the fused feature fusion on one instruction set: everything but the matrix products (fusion.cpp).
// Included by the kernel files only (see vec.h).
//
// Of x (A numbers) nothing is ever copied as a whole: each stage reads the feature maps where they lie, a tile at a
// time, and computes the depthwise output again, nine products a number, which costs less than reading it would.
//   statistics   reads A
//   activate     reads A, writes a, a chunk of images at a time, for the product to read from the cache
//   mask         reads A and ∂L/∂a, writes ∂L/∂z in its place
//   inputs       reads A and ∂L/∂z, writes A
#pragma once

#include "fusion_tile.h"

namespace fflfast {
namespace FFLFAST_ISA {

// ---- feature maps --------------------------------------------------------------------------------------------------

// Pixels that are summed on their own before they join a longer sum, for the sake of rounding.
constexpr int64_t kPart = 32;

struct Unit {
  const ChannelBlock& block;
  int64_t chunk;
  FFLFAST_INLINE Unit(const FusionPlan& plan, int64_t unit)
      : block(plan.block[unit % plan.num_blocks]), chunk(unit / plan.num_blocks) {}
};

// Calls body(image, first row, rows) for the images of a chunk.
template <class Body>
FFLFAST_INLINE void for_each_image(const FusionPlan& plan, int64_t chunk, const Body& body) {
  const int64_t first = chunk % plan.strips * plan.strip_rows;
  const int64_t rows = first + plan.strip_rows < plan.height ? plan.strip_rows : plan.height - first;
  const int64_t begin = chunk / plan.strips * plan.images_per_chunk, end = begin + plan.images_per_chunk;
  for (int64_t b = begin; b < (end < plan.batch ? end : plan.batch); ++b) body(b, first, rows);
}

inline Tile load_image(const FusionPlan& plan, const ChannelBlock& block, int64_t image, int64_t first, int64_t rows,
                       float* memory) {
  const Tile tile{memory, first, rows, plan.width};
  const FeatureMap& map = plan.map[block.map];
  load_tile(tile, map.data + image * map.strides.batch + block.first * map.strides.channel, map.strides, block.lanes,
            plan.height);
  return tile;
}

// Sum k of a block's channels over a chunk.
template <class Value>
FFLFAST_INLINE void write_partial(const FusionPlan& plan, const Unit& unit, int sums, int k, const Value& value) {
  double* to = plan.partial + (unit.chunk * sums + k) * plan.channels + unit.block.channel;
  for (int c = 0; c < unit.block.lanes; ++c) to[c] = value(c);
}

// A chunk's mean and M2 from the rounded mean, Σ (v − mean) and Σ (v − mean)². An infinite mean stays what it is.
FFLFAST_INLINE double exact_mean(float mean, float rest, double count) {
  return rest == rest ? mean + rest / count : static_cast<double>(mean);
}
FFLFAST_INLINE double exact_m2(float square, float rest, double count) {
  return square - static_cast<double>(rest) * rest / count;
}

FFLFAST_INLINE FloatReg load_some(const float* p, int lanes) {
  return lanes == kLanes ? load(p) : load_tail(p, lanes, 0.0f);
}

FFLFAST_INLINE void store_some(float* p, FloatReg v, int lanes) {
  if (lanes == kLanes)
    store(p, v);
  else
    store_tail(p, v, lanes);
}

int64_t scratch_numbers(const FusionPlan& plan) {
  const int64_t rows = plan.strip_rows;
  return Tile::size(rows + 4, plan.width) + Tile::size(rows + 2, plan.width) + plan.chunk_pixels() * kLanes;
}

// Mean and M2 of h over each chunk: two passes over the chunk's values in the cache, the second one corrected by what
// the rounded mean leaves over.
void statistics(const FusionPlan& plan, int64_t begin, int64_t end, float* scratch) {
  float* values = scratch + Tile::size(plan.strip_rows + 2, plan.width);
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit(plan, u);
    const Taps taps = load_taps(plan, unit.block.channel, false);
    FloatReg sum{};
    int64_t n = 0;
    for_each_image(plan, unit.chunk, [&](int64_t image, int64_t first, int64_t rows) {
      const Tile x = load_image(plan, unit.block, image, first - 1, rows + 2, scratch);
      for (int64_t i = first; i < first + rows; ++i, n += plan.width)
        convolve_row(taps, x, i, [&](int64_t j, FloatReg h) {
          store(values + (n + j) * kLanes, h);
          sum += h;
        });
    });
    const FloatReg mean = sum * (1.0f / static_cast<float>(n));
    FloatReg rest{}, m2{};
    for (int64_t p0 = 0; p0 < n; p0 += kPart) {
      FloatReg off[4] = {}, square[4] = {};
      const auto add = [&](int64_t p, int k) {
        const FloatReg d = load(values + p * kLanes) - mean;
        off[k] += d;
        square[k] = fma(d, d, square[k]);
      };
      const int64_t end_of_part = p0 + kPart < n ? p0 + kPart : n;
      int64_t p = p0;
      for (; p + 4 <= end_of_part; p += 4)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) add(p + k, k);
      for (; p < end_of_part; ++p) add(p, 0);
      rest += (off[0] + off[1]) + (off[2] + off[3]);
      m2 += (square[0] + square[1]) + (square[2] + square[3]);
    }
    const double count = static_cast<double>(n);
    write_partial(plan, unit, 2, 0, [&](int c) { return exact_mean(mean[c], rest[c], count); });
    write_partial(plan, unit, 2, 1, [&](int c) { return exact_m2(m2[c], rest[c], count); });
  }
}

// a = relu(scale·h + shift) as rows.
void activate(const FusionPlan& plan, int64_t begin, int64_t end, float* scratch) {
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit(plan, u);
    const ChannelBlock& block = unit.block;
    const Taps taps = load_taps(plan, block.channel, false);
    const FloatReg scale = load(plan.scale + block.channel), shift = load(plan.shift + block.channel);
    for_each_image(plan, unit.chunk, [&](int64_t image, int64_t first, int64_t rows) {
      const Tile x = load_image(plan, block, image, first - 1, rows + 2, scratch);
      for (int64_t i = first; i < first + rows; ++i) {
        float* to = plan.rows + (image * plan.pixels() + i * plan.width) * plan.channels + block.channel;
        convolve_row(taps, x, i, [&](int64_t j, FloatReg h) {
          store_some(to + j * plan.channels, larger(FloatReg{}, fma(scale, h, shift)), block.lanes);
        });
      }
    });
  }
}

// ∂L/∂z = ∂L/∂a where z > 0 or NaN, as ReLU's gradient in PyTorch; in place; its sum and its sum times ĥ.
void mask(const FusionPlan& plan, int64_t begin, int64_t end, float* scratch) {
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit(plan, u);
    const ChannelBlock& block = unit.block;
    const Taps taps = load_taps(plan, block.channel, false);
    const FloatReg scale = load(plan.scale + block.channel), shift = load(plan.shift + block.channel);
    const FloatReg mean = load(plan.mean + block.channel), rstd = load(plan.rstd + block.channel);
    FloatReg sum{}, hat_sum{};
    for_each_image(plan, unit.chunk, [&](int64_t image, int64_t first, int64_t rows) {
      const Tile x = load_image(plan, block, image, first - 1, rows + 2, scratch);
      for (int64_t i = first; i < first + rows; ++i) {
        float* at = plan.rows + (image * plan.pixels() + i * plan.width) * plan.channels + block.channel;
        FloatReg row{}, hat_row{};  // summed on their own too
        convolve_row(taps, x, i, [&](int64_t j, FloatReg h) {
          float* here = at + j * plan.channels;
          const FloatReg dz = fma(scale, h, shift) <= 0.0f ? FloatReg{} : load_some(here, block.lanes);
          store_some(here, dz, block.lanes);
          row += dz;
          hat_row = fma(dz, (h - mean) * rstd, hat_row);
        });
        sum += row;
        hat_sum += hat_row;
      }
    });
    write_partial(plan, unit, 2, 0, [&](int c) { return sum[c]; });
    write_partial(plan, unit, 2, 1, [&](int c) { return hat_sum[c]; });
  }
}

// sums[t] += Σ dh·x over a row, x one tap away.
FFLFAST_INLINE void add_weight_gradient(const Tile& x, const Tile& dh, int64_t row, FloatReg* sums) {
  FloatReg part[9] = {};
  for (int64_t j = 0; j < x.width; ++j) {
    const FloatReg d = load(dh.at(row, j));
    const float* from = x.at(row - 1, j - 1);
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) part[t] = fma(d, load(from + t / 3 * x.pitch() + t % 3 * kLanes), part[t]);
  }
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) sums[t] += part[t];
}

// dh = scale·(∂L/∂z − the norm's share) in a second tile; from it ∂L/∂x and, with x, the nine sums of the weight.
void inputs(const FusionPlan& plan, int64_t begin, int64_t end, float* scratch) {
  float* const second = scratch + Tile::size(plan.strip_rows + 4, plan.width);
  float* const result = second + Tile::size(plan.strip_rows + 2, plan.width);
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit(plan, u);
    const ChannelBlock& block = unit.block;
    const FeatureMap& map = plan.map[block.map];
    if (map.gradient == nullptr && plan.partial == nullptr) continue;
    const Taps taps = load_taps(plan, block.channel, false), reverse = load_taps(plan, block.channel, true);
    const FloatReg scale = load(plan.scale + block.channel);
    const FloatReg mean = load(plan.mean + block.channel), rstd = load(plan.rstd + block.channel);
    const FloatReg bias = load(plan.bias_share + block.channel), weight = load(plan.weight_share + block.channel);
    FloatReg sums[9] = {};
    for_each_image(plan, unit.chunk, [&](int64_t image, int64_t first, int64_t rows) {
      const Tile x = load_image(plan, block, image, first - 2, rows + 4, scratch);
      const Tile dh{second, first - 1, rows + 2, plan.width};
      clear_frame(dh, plan.height);
      for (int64_t i = first > 0 ? first - 1 : 0; i < plan.height && i <= first + rows; ++i) {
        const float* dz = plan.rows + (image * plan.pixels() + i * plan.width) * plan.channels + block.channel;
        if (plan.training) {
          convolve_row(taps, x, i, [&](int64_t j, FloatReg h) {
            const FloatReg rest = load_some(dz + j * plan.channels, block.lanes) - bias;
            store(dh.at(i, j), scale * (rest - (h - mean) * rstd * weight));
          });
        } else {
          for (int64_t j = 0; j < plan.width; ++j)
            store(dh.at(i, j), scale * load_some(dz + j * plan.channels, block.lanes));
        }
        if (plan.partial != nullptr && i >= first && i < first + rows) add_weight_gradient(x, dh, i, sums);
      }
      if (map.gradient == nullptr) return;
      for (int64_t i = 0; i < rows; ++i)
        convolve_row(reverse, dh, first + i, [&](int64_t j, FloatReg dx) {
          store(result + (i * plan.width + j) * kLanes, dx);
        });
      const Strides& to = map.gradient_strides;
      store_block(result, map.gradient + image * to.batch + block.first * to.channel, to, block.lanes, first, rows,
                  plan.width);
    });
    if (plan.partial == nullptr) continue;
    for (int t = 0; t < 9; ++t) write_partial(plan, unit, 9, t, [&](int c) { return sums[t][c]; });
  }
}

// ---- y -------------------------------------------------------------------------------------------------------------

// Calls body(Count of vectors, first column, lanes of the last vector) for the columns of y.
template <int N>
struct Vectors {
  static constexpr int kCount = N;
};

template <class Body>
FFLFAST_INLINE void for_each_columns(int64_t columns, const Body& body) {
  int64_t o = 0;
  for (; o + 4 * kLanes <= columns; o += 4 * kLanes) body(Vectors<4>{}, o, kLanes);
  for (; o + kLanes <= columns; o += kLanes) body(Vectors<1>{}, o, kLanes);
  if (o < columns) body(Vectors<1>{}, o, static_cast<int>(columns - o));
}

// Mean and M2 of each column over chunks of rows.
void moments(const PoolPlan& plan, int64_t rows, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kMomentRows, n = first + kMomentRows < rows ? kMomentRows : rows - first;
    const double count = static_cast<double>(n);
    double* to = plan.partial + chunk * 2 * plan.columns;
    for_each_columns(plan.columns, [&](auto vectors, int64_t o, int lanes) {
      constexpr int kCount = decltype(vectors)::kCount;
      const float* y = plan.y + first * plan.columns + o;
      FloatReg mean[kCount] = {}, off[kCount] = {}, m2[kCount] = {};
      for (int64_t r = 0; r < n; ++r)
        for (int k = 0; k < kCount; ++k) mean[k] += load_some(y + r * plan.columns + k * kLanes, lanes);
      for (int k = 0; k < kCount; ++k) mean[k] *= 1.0f / static_cast<float>(n);
      for (int64_t r0 = 0; r0 < n; r0 += kPart) {
        FloatReg part_off[kCount] = {}, part_m2[kCount] = {};
        for (int64_t r = r0; r < (r0 + kPart < n ? r0 + kPart : n); ++r)
          for (int k = 0; k < kCount; ++k) {
            const FloatReg d = load_some(y + r * plan.columns + k * kLanes, lanes) - mean[k];
            part_off[k] += d;
            part_m2[k] = fma(d, d, part_m2[k]);
          }
        for (int k = 0; k < kCount; ++k) {
          off[k] += part_off[k];
          m2[k] += part_m2[k];
        }
      }
      for (int k = 0; k < kCount; ++k)
        for (int c = 0; c < lanes; ++c) {
          to[o + k * kLanes + c] = exact_mean(mean[k][c], off[k][c], count);
          to[plan.columns + o + k * kLanes + c] = exact_m2(m2[k][c], off[k][c], count);
        }
    });
  }
}

// Per image and column: mean of relu(scale·y + shift); where wanted, the number of active pixels and their Σ ŷ.
void pool(const PoolPlan& plan, int64_t begin, int64_t end) {
  const float inverse = 1.0f / static_cast<float>(plan.pixels);
  for (int64_t image = begin; image < end; ++image)
    for_each_columns(plan.columns, [&](auto vectors, int64_t o, int lanes) {
      constexpr int kCount = decltype(vectors)::kCount;
      const float* y = plan.y + image * plan.pixels * plan.columns + o;
      FloatReg scale[kCount], shift[kCount], mean[kCount], rstd[kCount];
      FloatReg total[kCount] = {}, count[kCount] = {}, hats[kCount] = {};
      for (int k = 0; k < kCount; ++k) {
        scale[k] = load(plan.scale + o + k * kLanes);
        shift[k] = load(plan.shift + o + k * kLanes);
        mean[k] = load(plan.mean + o + k * kLanes);
        rstd[k] = load(plan.rstd + o + k * kLanes);
      }
      for (int64_t p0 = 0; p0 < plan.pixels; p0 += kPart) {
        FloatReg sum[kCount] = {}, hat[kCount] = {};
        for (int64_t p = p0; p < (p0 + kPart < plan.pixels ? p0 + kPart : plan.pixels); ++p)
          for (int k = 0; k < kCount; ++k) {
            const FloatReg v = load_some(y + p * plan.columns + k * kLanes, lanes), z = fma(scale[k], v, shift[k]);
            sum[k] += larger(FloatReg{}, z);
            if (plan.active == nullptr) continue;
            count[k] += z <= 0.0f ? FloatReg{} : FloatReg{} + 1.0f;
            hat[k] += z <= 0.0f ? FloatReg{} : (v - mean[k]) * rstd[k];
          }
        for (int k = 0; k < kCount; ++k) {
          total[k] += sum[k];
          hats[k] += hat[k];
        }
      }
      for (int k = 0; k < kCount; ++k) {
        const int64_t at = image * plan.columns + o + k * kLanes;
        store_some(plan.out + at, total[k] * inverse, lanes);
        if (plan.active == nullptr) continue;
        store_some(plan.active + at, count[k], lanes);
        store_some(plan.hat_sum + at, hats[k], lanes);
      }
    });
}

// dy = scale·(grad/(H·W) where active − the norm's share).
void grad_y(const PoolPlan& plan, int64_t begin, int64_t end) {
  const float inverse = 1.0f / static_cast<float>(plan.pixels);
  for (int64_t image = begin; image < end; ++image)
    for (int64_t p = image * plan.pixels; p < (image + 1) * plan.pixels; ++p)
      for (int64_t o = 0; o < plan.columns; o += kLanes) {
        const int lanes = plan.columns - o < kLanes ? static_cast<int>(plan.columns - o) : kLanes;
        const FloatReg v = load_some(plan.y + p * plan.columns + o, lanes), scale = load(plan.scale + o);
        const FloatReg grad = load_some(plan.grad + image * plan.columns + o, lanes) * inverse;
        FloatReg dy = fma(scale, v, load(plan.shift + o)) <= 0.0f ? FloatReg{} : grad;
        if (plan.training)
          dy = dy - load(plan.bias_share + o) -
               (v - load(plan.mean + o)) * load(plan.rstd + o) * load(plan.weight_share + o);
        store_some(plan.out + p * plan.columns + o, scale * dy, lanes);
      }
}

const FusionKernels kFusion = {kLanes, scratch_numbers, statistics, activate, mask, inputs, moments, pool, grad_y};

}  // namespace FFLFAST_ISA
}  // namespace fflfast
