// The depthwise convolution on a tile of pixels, and the numbers of a norm.
//
// h is the same in every bit wherever it is computed: nine fma in row order, zeros outside the image.
#pragma once

#include "fusion_tile.cuh"

#include <cmath>
#include <type_traits>

namespace fflfast::cuda {

// A weight as the products take it: rounded to the feature maps' dtype.
template <class T>
FFLFAST_DEVICE float read_weight(const WeightOperand& weight, int64_t index) {
  if (weight.is_float32 == 0) return simt::convert<float>(static_cast<const T*>(weight.data)[index]);
  const float value = static_cast<const float*>(weight.data)[index];
  if constexpr (std::is_same_v<T, float>) return value;
  return simt::convert<float>(simt::convert<T>(value));
}

// The nine weights of V channels from `channel` of a block, zeros where the block has none.
template <class T, int V>
FFLFAST_DEVICE void read_taps(const WeightOperand& weight, const ChannelBlock& block, int channel,
                              float (&taps)[9][V]) {
  FFLFAST_UNROLL
  for (int v = 0; v < V; ++v) {
    FFLFAST_UNROLL
    for (int t = 0; t < 9; ++t)
      taps[t][v] = channel + v < block.count ? read_weight<T>(weight, int64_t{9} * (block.whole + channel + v) + t) : 0;
  }
}

// The three pixels above each other of one column of a tap window.
template <int V>
struct Column {
  float value[3][V];
};

// Goes over `count` ≤ G pixels of a tile from row `row`, pixel (y, x) of its image, along the image's rows, and calls
// body(n, left, middle, right) with the columns around pixel n. read(row, value[V]) gives what stands in a row of the
// tile; rows outside of the image are not read. WRAPS: the pixels may go on in the next row of the image.
template <int G, int V, bool WRAPS = true, class Read, class Body>
FFLFAST_DEVICE void walk(const Features& f, int row, int y, int x, int count, const Read& read, const Body& body) {
  const int width = f.width, height = f.height;
  Column<V> columns[3];  // that of column j around pixel n is number (n + j) mod 3
  const auto fill = [&](Column<V>& column, int at, bool inside) {
    FFLFAST_UNROLL
    for (int i = 0; i < 3; ++i) {
      if (inside && (i == 1 || (i == 0 ? y > 0 : y + 1 < height))) {
        read(at + (i - 1) * width, column.value[i]);
      } else {
        FFLFAST_UNROLL
        for (int v = 0; v < V; ++v) column.value[i][v] = 0.0f;
      }
    }
  };
  fill(columns[0], row - 1, x > 0);
  fill(columns[1], row, true);
  FFLFAST_UNROLL
  for (int n = 0; n < G; ++n) {
    if (n >= count) continue;
    Column<V>&left = columns[n % 3], &middle = columns[(n + 1) % 3], &right = columns[(n + 2) % 3];
    fill(right, row + n + 1, x + 1 < width);
    body(n, left, middle, right);
    ++x;
    if constexpr (WRAPS) {
      if (x < width) continue;
      x = 0;
      y = y + 1 < height ? y + 1 : 0;
      fill(middle, row, false);
      fill(right, row + n + 1, n + 1 < count);
    }
  }
}

// A stretch of pixels of one row of an image.
struct Run {
  int first, count;  // from the begin of what is cut into runs
  int y, x;
};

// Whole rows of images, cut into runs of G pixels or fewer.
template <int G>
struct RowRuns {
  const Features& f;
  int phase;  // in its image, of the pixel that the rows begin with
  int per_row, length;

  FFLFAST_DEVICE RowRuns(const Features& f, int phase) : f(f), phase(phase), per_row((f.width + G - 1) / G) {
    length = (f.width + per_row - 1) / per_row;
  }

  FFLFAST_DEVICE int number(int pixels) const {
    return static_cast<int>(f.by_width(static_cast<unsigned>(pixels))) * per_row;
  }

  FFLFAST_DEVICE Run operator()(int index) const {
    const int row = per_row == 1 ? index : index / per_row, x = (index - row * per_row) * length;
    const auto at = static_cast<unsigned>(phase + row * f.width);
    const unsigned pixel = at - f.by_image(at) * static_cast<unsigned>(f.image());
    const int left = f.width - x;
    return {row * f.width + x, left < length ? left : length, static_cast<int>(f.by_width(pixel)), x};
  }
};

template <int V>
FFLFAST_DEVICE void sum_taps(const float (&taps)[9][V], const Column<V>& left, const Column<V>& middle,
                             const Column<V>& right, float (&sum)[V]) {
  FFLFAST_UNROLL
  for (int v = 0; v < V; ++v) {
    sum[v] = 0.0f;
    FFLFAST_UNROLL
    for (int i = 0; i < 3; ++i) {
      sum[v] = ::fmaf(taps[3 * i][v], left.value[i][v], sum[v]);
      sum[v] = ::fmaf(taps[3 * i + 1][v], middle.value[i][v], sum[v]);
      sum[v] = ::fmaf(taps[3 * i + 2][v], right.value[i][v], sum[v]);
    }
  }
}

// Calls body(n, h[V]) with h of V channels from `channel` (a multiple of V) at a run of pixels of a tile, whose first
// one is in row `row`. The tile must hold what they need of their images: `needed`.
template <int G, int V, class T, class Body>
FFLFAST_DEVICE void each_depthwise(const Features& f, const PixelTile<T>& tile, int row, const Run& run, int channel,
                                   const float (&taps)[9][V], const Body& body) {
  static_assert(V <= kLaneChannels<T>, "an access of shared memory is 4 bytes here");
  walk<G, V, false>(
      f, row, run.y, run.x, run.count,
      [&](int from, float(&value)[V]) {
        const auto pack = *reinterpret_cast<const Pack<T, V>*>(tile.at(from, channel));
        FFLFAST_UNROLL
        for (int v = 0; v < V; ++v) value[v] = simt::convert<float>(pack[v]);
      },
      [&](int n, const Column<V>& left, const Column<V>& middle, const Column<V>& right) {
        float h[V];
        sum_taps(taps, left, middle, right, h);
        body(n, h);
      });
}

// What a norm makes of channel c: z = scale · v + shift, v̂ = (v − mean) · rstd.
struct NormFactors {
  float mean, rstd, scale, shift;

  FFLFAST_DEVICE float normed(float v) const { return ::fmaf(scale, v, shift); }
  FFLFAST_DEVICE float hat(float v) const { return (v - mean) * rstd; }
};

FFLFAST_DEVICE float count_of(const NormOperand& norm) { return norm.count ? *norm.count : norm.known_count; }

FFLFAST_DEVICE NormFactors factors(const NormOperand& norm, int c) {
  NormFactors n;
  n.mean = norm.mean[c];
  n.rstd = 1.0f / ::sqrtf(norm.m2[c] / count_of(norm) + norm.eps);
  n.scale = norm.weight ? norm.weight[c] * n.rstd : n.rstd;
  n.shift = ::fmaf(-n.mean, n.scale, norm.bias ? norm.bias[c] : 0.0f);
  return n;
}

// max(z, 0) where a NaN stays one.
FFLFAST_DEVICE float relu(float z) { return z <= 0.0f ? 0.0f : z; }

}  // namespace fflfast::cuda
