// Sums over pixels inside a launch: moments by Chan's formula, and plain sums. The threads' numbers are merged through
// the block's shared memory into a record of the block in memory; the block that finishes last of those that share a
// block of channels merges their records. All in a fixed order, whatever order the blocks ran in, in float32.
//
// SITE numbers in the fusion's library: 1 … 99 here and in the kernels of feature maps, from 101 on in the products.
#pragma once

#include "fusion_operands.h"
#include "last_block.cuh"
#include "simt.h"

namespace fflfast::cuda {

#ifdef FFLFAST_EMULATE
static unsigned fusion_tickets[kFusionTickets * kFusionCounters];
#else
static __device__ unsigned fusion_tickets[kFusionTickets * kFusionCounters];
#endif

FFLFAST_DEVICE unsigned* counter_of(const Tickets& tickets, int counter) {
  return (tickets.own ? tickets.own : fusion_tickets + int64_t{kFusionCounters} * tickets.slot) + counter;
}

// A record of R numbers that is a sum.
struct MergeSums {
  template <int R>
  static FFLFAST_DEVICE void merge(float (&into)[R], const float (&from)[R]) {
    FFLFAST_UNROLL
    for (int k = 0; k < R; ++k) into[k] += from[k];
  }
};

// A record of moments: how many values, their mean as a sum of two numbers (the second what rounding the first leaves),
// and M2 = Σ (v − mean)². So a mean of 1000 leaves a deviation of 1e-3 all its digits.
constexpr int kMoments = 4;

struct MergeMoments {
  static FFLFAST_DEVICE void merge(float (&into)[kMoments], const float (&from)[kMoments]) {
    if (from[0] == 0.0f) return;
    if (into[0] == 0.0f) {  // a mean of 0 would round the other
      FFLFAST_UNROLL
      for (int k = 0; k < kMoments; ++k) into[k] = from[k];
      return;
    }
    const float count = into[0] + from[0], share = from[0] / count;
    const float difference = (from[1] - into[1]) + (from[2] - into[2]);
    const float rest = ::fmaf(difference, share, into[2]), mean = into[1] + rest, part = mean - into[1];
    into[3] += ::fmaf(difference * difference, into[0] * share, from[3]);
    into[2] = (into[1] - (mean - part)) + (rest - part);  // the rounding of `mean`, exactly
    into[1] = mean;
    into[0] = count;
  }
};

FFLFAST_DEVICE float mean_of(const float (&moments)[kMoments]) { return moments[1] + moments[2]; }

// Merges the first `count` of G values into a record of moments: two passes over registers, and what is summed is small
// wherever the values lie.
template <int G, int V>
FFLFAST_DEVICE void add_moments(const float (&values)[G][V], int v, int count, float (&into)[kMoments]) {
  if (count <= 0) return;
  const float near = into[0] == 0.0f ? values[0][v] : into[1], number = static_cast<float>(count < G ? count : G);
  float sum = 0.0f, squares = 0.0f;
  FFLFAST_UNROLL
  for (int n = 0; n < G; ++n) sum += n < count ? values[n][v] - near : 0.0f;
  const float mean = sum / number;
  FFLFAST_UNROLL
  for (int n = 0; n < G; ++n) {
    const float difference = n < count ? (values[n][v] - near) - mean : 0.0f;
    squares = ::fmaf(difference, difference, squares);
  }
  const float record[kMoments] = {number, near, mean, squares};
  MergeMoments::merge(into, record);
}

// The record of one of several parts of a channel, in the block's shared memory: parts · R · KC numbers.
template <int KC, int R>
FFLFAST_DEVICE void put_record(float* shared, int part, int channel, const float (&record)[R]) {
  FFLFAST_UNROLL
  for (int k = 0; k < R; ++k) shared[(part * R + k) * KC + channel] = record[k];
}

template <int KC, int R>
FFLFAST_DEVICE void get_record(const float* shared, int part, int channel, float (&record)[R]) {
  FFLFAST_UNROLL
  for (int k = 0; k < R; ++k) record[k] = shared[(part * R + k) * KC + channel];
}

// Part 0 first, then the others in order.
template <int KC, int R, class Merge>
FFLFAST_DEVICE void merge_parts(const float* shared, int parts, int channel, float (&record)[R]) {
  get_record<KC>(shared, 0, channel, record);
  for (int part = 1; part < parts; ++part) {
    float other[R];
    get_record<KC>(shared, part, channel, other);
    Merge::merge(record, other);
  }
}

// The blocks of one launch: `splits` of them share each of `channel_blocks` blocks of channels.
struct SplitGrid {
  int channel_blocks;
  int64_t splits;
  FFLFAST_DEVICE int channel_block() const { return static_cast<int>(simt::block_index() % channel_blocks); }
  FFLFAST_DEVICE int64_t split() const { return simt::block_index() / channel_blocks; }
};

// Numbers in memory for the records of a launch.
constexpr int64_t record_numbers(int64_t channel_blocks, int64_t splits, int channels, int record) {
  return splits > 1 ? channel_blocks * splits * channels * record : 0;
}

// The end of a launch: the records in `shared` (of `parts` threads a channel, before a barrier) become one a channel of
// each block of channels, and emit(block of channels, channel, record) is called once for each. `records` is memory of
// record_numbers, `shared` has (block size / KC) · R · KC numbers and one more. Sites SITE … SITE + 4.
template <int SITE, int KC, int R, class Merge, class Emit>
FFLFAST_DEVICE void finish_splits(const SplitGrid& grid, float* shared, int parts, float* records,
                                  const Tickets& tickets, const Emit& emit) {
  const int thread = simt::thread_index(), channel = thread % KC, own_block = grid.channel_block();
  float record[R];
  simt::sync_block<SITE>();
  if (thread < KC) {
    merge_parts<KC, R, Merge>(shared, parts, channel, record);
    if (grid.splits == 1) {
      emit(own_block, channel, record);
    } else {
      put_record<KC>(records + (own_block * grid.splits + grid.split()) * R * KC, 0, channel, record);
    }
  }
  if (grid.splits == 1) return;
  simt::sync_block<SITE + 1>();
  // As many counters as there are blocks of channels, or each for several of them.
  const int counters = grid.channel_blocks < kFusionCounters ? grid.channel_blocks : kFusionCounters;
  const int counter = own_block % counters;
  const int sharing = (grid.channel_blocks - counter + counters - 1) / counters;
  const int ways = simt::block_size() / KC, way = thread / KC;
  int* const flag = reinterpret_cast<int*>(shared + ways * R * KC);
  if (!is_last_of<SITE + 2>(counter_of(tickets, counter), sharing * grid.splits, flag)) return;
  for (int block = counter; block < grid.channel_blocks; block += counters) {
    const float* const own = records + block * grid.splits * R * KC;
    FFLFAST_UNROLL
    for (int k = 0; k < R; ++k) record[k] = 0.0f;
    for (int64_t split = way; split < grid.splits; split += ways) {
      float other[R];
      FFLFAST_UNROLL
      for (int k = 0; k < R; ++k)
        other[k] = simt::load_device<float, 1>(own + (split * R + k) * KC + channel)[0];
      Merge::merge(record, other);
    }
    put_record<KC>(shared, way, channel, record);
    simt::sync_block<SITE + 3>();
    if (thread < KC) {
      merge_parts<KC, R, Merge>(shared, ways, channel, record);
      emit(block, channel, record);
    }
    simt::sync_block<SITE + 4>();
  }
}

}  // namespace fflfast::cuda
