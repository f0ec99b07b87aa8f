// The threads that share a row, and the numbers they find together: lanes of one warp, a whole block, or the blocks of
// a thread-block cluster, which read each other's shared memory.
#pragma once

#include "distill_loss_common.cuh"

namespace fflfast::cuda {

// Shared memory of the on-chip kernel: totals of each group | flag | a count a warp | two records a group | numbers
// under reduction | the rows, as chunks of 16 bytes. `record`: what a group notes of its row; `numbers`: the most that
// one reduction takes.
struct RowsLayout {
  int lanes, groups, warps, cluster, columns, record, numbers, logits;
  int slots;  // chunks of one logits tensor that a thread holds

  FFLFAST_HOST_DEVICE RowsLayout(int lanes, int block, int cluster, int columns, int record, int numbers, int logits,
                                 int64_t classes, int element_size)
      : lanes(lanes), groups(block / lanes), warps(block / simt::kWarpSize), cluster(cluster), columns(columns),
        record(record), numbers(numbers), logits(logits) {
    // One chunk more where a row begins between two 16-byte addresses.
    const int64_t chunks = (classes * element_size + 15) / 16 + 1, threads = int64_t{lanes} * cluster;
    slots = static_cast<int>((chunks + threads - 1) / threads);
  }

  FFLFAST_HOST_DEVICE bool wide() const { return lanes > simt::kWarpSize; }
  FFLFAST_HOST_DEVICE int flag_offset() const { return 8 * groups * columns; }
  FFLFAST_HOST_DEVICE int counts_offset() const { return flag_offset() + 8; }
  FFLFAST_HOST_DEVICE int record_offset() const { return counts_offset() + 8 * warps; }
  FFLFAST_HOST_DEVICE int exchange_offset() const { return record_offset() + 8 * groups * record; }
  FFLFAST_HOST_DEVICE int rows_offset() const {
    const int exchange = wide() ? 4 * (warps + 3) * numbers : 0;
    return (exchange_offset() + exchange + 127) / 128 * 128;
  }
  FFLFAST_HOST_DEVICE size_t bytes() const {
    return static_cast<size_t>(rows_offset()) + size_t{16} * groups * logits * lanes * static_cast<size_t>(slots);
  }
};

struct Maximum {
  FFLFAST_DEVICE static float of(float a, float b) { return ::fmaxf(a, b); }
};
struct Sum {
  FFLFAST_DEVICE static float of(float a, float b) { return a + b; }
};

struct Group {
  int lanes;      // of this block
  int lane;       // in the row's threads of this block
  unsigned rank, ranks;
  int warps;
  float* exchange;  // (warps + 3, numbers)
  int numbers;
  int turn = 0;

  FFLFAST_DEVICE int threads() const { return lanes * static_cast<int>(ranks); }
  FFLFAST_DEVICE int thread() const { return lanes * static_cast<int>(rank) + lane; }
  FFLFAST_DEVICE bool leads() const { return thread() == 0; }

  // Combines N numbers over the row's threads, each thread getting the same bits; numbers without their bit in `wanted`
  // are left as they are. Sites SITE … SITE + 3.
  //
  // Across warps: a line a warp, barrier, one line a block, barrier of the cluster, one line of the whole, barrier.
  // The block's lines alternate between two places: a block that passes the cluster's barrier may write its next line
  // while a slower one still reads this one, but not the line after, as the barrier between has seen the slower block.
  template <int SITE, class Combine, int N>
  FFLFAST_DEVICE void reduce(float (&v)[N], uint64_t wanted) {
    for (int mask = lanes < simt::kWarpSize ? lanes / 2 : simt::kWarpSize / 2; mask > 0; mask >>= 1) {
      FFLFAST_UNROLL
      for (int n = 0; n < N; ++n)
        if (wanted >> n & 1) v[n] = Combine::of(v[n], simt::shuffle_xor<SITE>(v[n], mask));
    }
    if (lanes <= simt::kWarpSize) return;
    float* const of_warp = exchange;
    float* const of_block = exchange + (warps + turn) * numbers;
    float* const whole = exchange + (warps + 2) * numbers;
    turn ^= 1;
    if (simt::lane_index() == 0) {
      FFLFAST_UNROLL
      for (int n = 0; n < N; ++n) of_warp[simt::warp_index() * numbers + n] = v[n];
    }
    simt::sync_block<SITE + 1>();
    for (int n = simt::thread_index(); n < N; n += simt::block_size()) {
      float all = of_warp[n];
      for (int w = 1; w < warps; ++w) all = Combine::of(all, of_warp[w * numbers + n]);
      (ranks > 1 ? of_block : whole)[n] = all;
    }
    if (ranks > 1) {
      simt::sync_cluster<SITE + 2>();
      for (int n = simt::thread_index(); n < N; n += simt::block_size()) {
        float all = *simt::cluster_map(of_block + n, 0);
        for (unsigned r = 1; r < ranks; ++r) all = Combine::of(all, *simt::cluster_map(of_block + n, r));
        whole[n] = all;
      }
    }
    simt::sync_block<SITE + 3>();
    FFLFAST_UNROLL
    for (int n = 0; n < N; ++n) v[n] = whole[n];
  }
};

}  // namespace fflfast::cuda
