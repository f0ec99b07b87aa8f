// The second norm, its ReLU and the pool; its backward sums; and the running statistics of both norms.
#pragma once

#include "fusion_features.cuh"
#include "fusion_launch_policy.h"
#include "fusion_pixels.h"

namespace fflfast::cuda {

// pooled = Σ_p relu(z) / (H·W) with z = scale2·y + shift2, and what the backward pass needs of a whole image's y, since
// the pool spreads its gradient evenly:
//
//   count₊ = Σ_p 1[z > 0],   S₊ = Σ_p 1[z > 0] · ŷ
//
// A thread has V adjacent channels (16 bytes, where O allows) and every `parts`-th pixel of an image; the parts are
// added in order through shared memory, a number a thread. Bytes: B·H·W·O·e read, B·O·(e + 8) written. Launches: one.
template <class T, int V>
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(256, 2) void pool(const FFLFAST_GRID_CONSTANT PoolCall o, const PoolShape shape) {
  const auto [lanes, parts, images] = shape;
  const int thread = simt::thread_index(), threads = simt::block_size();
  const int lane = thread % lanes, part = thread / lanes % parts;
  const int64_t packs = o.channels / V, columns = (packs + lanes - 1) / lanes;
  const int64_t pack = simt::block_index() % columns * lanes + lane;
  const int64_t first_image = simt::block_index() / columns * images, image = first_image + thread / (lanes * parts);
  float sums[3][V];
  FFLFAST_UNROLL
  for (int k = 0; k < 3; ++k)
    FFLFAST_UNROLL
    for (int v = 0; v < V; ++v) sums[k][v] = 0.0f;
  if (pack < packs && image < o.batch) {
    NormFactors norm[V];
    FFLFAST_UNROLL
    for (int v = 0; v < V; ++v) norm[v] = factors(o.norm, static_cast<int>(pack) * V + v);
    const T* const y = static_cast<const T*>(o.y) + image * o.pixels * o.channels + pack * V;
    FFLFAST_UNROLL_BY(4)
    for (int p = part; p < o.pixels; p += parts) {
      const Pack<T, V> values = simt::load_streaming<T, V>(y + int64_t{p} * o.channels);
      FFLFAST_UNROLL
      for (int v = 0; v < V; ++v) {
        const float value = simt::convert<float>(values[v]), z = norm[v].normed(value);
        sums[0][v] += relu(z);
        sums[1][v] += z <= 0.0f ? 0.0f : 1.0f;  // active where NaN too, as ReLU's gradient in PyTorch
        sums[2][v] += z <= 0.0f ? 0.0f : norm[v].hat(value);
      }
    }
  }
  float* const shared = simt::shared_memory<float>();
  FFLFAST_UNROLL
  for (int k = 0; k < 3; ++k)
    FFLFAST_UNROLL
    for (int v = 0; v < V; ++v) shared[(k * V + v) * threads + thread] = sums[k][v];
  simt::sync_block<41>();
  const int numbers = lanes * V;  // of an image, adjacent in memory
  for (int i = thread; i < images * 3 * numbers; i += threads) {
    const int at = i / (3 * numbers), k = i / numbers % 3, channel = i % numbers;
    const int64_t b = first_image + at, c = simt::block_index() % columns * numbers + channel;
    if (b >= o.batch || c >= o.channels) continue;
    const float* const column = shared + (k * V + channel % V) * threads + at * lanes * parts + channel / V;
    float sum = column[0];
    for (int other = 1; other < parts; ++other) sum += column[other * lanes];
    if (k == 0)
      static_cast<T*>(o.pooled)[b * o.channels + c] = simt::convert<T>(sum / static_cast<float>(o.pixels));
    else
      o.active[((k - 1) * o.batch + b) * o.channels + c] = sum;
  }
}

// dβ2 = Σ_b g · count₊ and dγ2 = Σ_b g · S₊ with g = grad / (H·W): no pass over y. A block has kSumLanes channels, its
// threads every kSumThreads / kSumLanes-th image; the threads of a channel are added in a tree of fixed shape.
// Bytes: B·O·(e + 8) read. Launches: one.
template <class T>
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(kSumThreads) void backward_pool(const FFLFAST_GRID_CONSTANT PoolSumsCall o) {
  float* const shared = simt::shared_memory<float>();
  const int thread = simt::thread_index(), ways = simt::block_size() / kSumLanes;
  const int64_t c = simt::block_index() * kSumLanes + thread % kSumLanes, plane = o.batch * o.channels;
  const float pixels = static_cast<float>(o.pixels);
  float bias = 0.0f, weight = 0.0f;
  if (c < o.channels) {
    FFLFAST_UNROLL_BY(4)
    for (int64_t b = thread / kSumLanes; b < o.batch; b += ways) {
      const int64_t at = b * o.channels + c;
      const float g = simt::convert<float>(static_cast<const T*>(o.grad)[at]) / pixels;
      bias = ::fmaf(g, o.active[at], bias);
      weight = ::fmaf(g, o.active[plane + at], weight);
    }
  }
  shared[thread] = bias;
  shared[simt::block_size() + thread] = weight;
  for (int half = simt::block_size() / 2; half >= kSumLanes; half /= 2) {
    simt::sync_block<51>();
    if (thread >= 2 * half) continue;
    const int own = thread < half ? thread : simt::block_size() + thread - half;  // half of them each
    shared[own] += shared[own + half];
  }
  const int k = thread / kSumLanes;  // what this thread has added up last
  if (k < 2 && c < o.channels) o.sums[k * o.channels + c] = shared[k * simt::block_size() + thread % kSumLanes];
}

// mean ← (1 − m)·mean + m·batch mean, and the variance likewise with M2/(count − 1); m is the momentum, or 1/batches.
// A block a norm, so that the counter is read by all before it is written. Bytes: 24 a channel. Launches: one.
FFLFAST_KERNEL FFLFAST_LAUNCH_BOUNDS(kRunningThreads) void update_running(const FFLFAST_GRID_CONSTANT RunningCall o) {
  const RunningNorm& norm = o.norm[simt::block_index()];
  const int64_t batches = norm.batches ? *norm.batches + 1 : 0;
  simt::sync_block<61>();
  if (norm.batches && simt::thread_index() == 0) *norm.batches = batches;
  const float m = norm.momentum < 0.0f ? 1.0f / static_cast<float>(batches) : norm.momentum;
  const float unbiased = (norm.count ? *norm.count : norm.known_count) - 1.0f;
  for (int c = simt::thread_index(); c < norm.channels; c += simt::block_size()) {
    norm.mean[c] = (1.0f - m) * norm.mean[c] + m * norm.moments[c];
    norm.variance[c] = (1.0f - m) * norm.variance[c] + m * (norm.moments[norm.channels + c] / unbiased);
  }
}

}  // namespace fflfast::cuda
