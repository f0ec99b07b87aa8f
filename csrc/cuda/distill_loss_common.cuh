// What the kernels of the distillation loss have in common: numbers, the state of a row, counting rows, and the sum
// over rows inside the launch.
//
// The sum over rows: each block leaves its partial sums in memory and takes a ticket; the block with the last ticket
// adds the lines of all blocks in a fixed order, so that a launch gives the same bits every time whatever order the
// blocks ran in. Partial sums are double: 8 · (2 + terms) bytes a block, and no second launch.
#pragma once

#include "distill_operands.h"
#include "last_block.cuh"
#include "simt.h"

#include <cmath>
#include <type_traits>

namespace fflfast::cuda {

using simt::Pack;

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

FFLFAST_DEVICE float power_of_two(int k) {
#ifdef FFLFAST_EMULATE
  return std::ldexp(1.0f, k);
#else
  return __int_as_float((k + 127) << 23);
#endif
}

// 2^x for x ≤ 0 to one unit in the last place, without the special function unit: x = k + f with |f| ≤ 1/2, and the
// power series of 2^f. 2^k comes in two factors, so that what is below 2^-126 is rounded and not lost.
FFLFAST_DEVICE float exp2_series(float x) {
  const float bounded = x < -160.0f ? -160.0f : x;  // a NaN stays one
  const float k = ::rintf(bounded), f = bounded - k;
  float sum = 1.5252734e-5f;
  sum = ::fmaf(sum, f, 1.5403530e-4f);
  sum = ::fmaf(sum, f, 1.3333558e-3f);
  sum = ::fmaf(sum, f, 9.6181291e-3f);
  sum = ::fmaf(sum, f, 5.5504109e-2f);
  sum = ::fmaf(sum, f, 2.4022651e-1f);
  sum = ::fmaf(sum, f, 6.9314718e-1f);
  sum = ::fmaf(sum, f, 1.0f);
  const int whole = bounded == bounded ? static_cast<int>(k) : 0, half = whole / 2;
  return sum * power_of_two(half) * power_of_two(whole - half);
}

// The instruction's error, 2^-22, is that of a sum of few numbers, and shows where T² enlarges a small KL; among many
// classes it averages out beside what rounding log S costs.
constexpr int64_t kFewClasses = 64;

FFLFAST_DEVICE float exp2_of(float x, bool few) { return few ? exp2_series(x) : simt::exp2_approx(x); }
FFLFAST_DEVICE double exp2_of(double x, bool) { return ::exp2(x); }
FFLFAST_DEVICE float log2_of(float x) { return ::log2f(x); }
FFLFAST_DEVICE double log2_of(double x) { return ::log2(x); }
FFLFAST_DEVICE float larger(float a, float b) { return ::fmaxf(a, b); }
FFLFAST_DEVICE double larger(double a, double b) { return ::fmax(a, b); }

template <class A>
FFLFAST_DEVICE A infinity() {
  return static_cast<A>(HUGE_VALF);
}

template <class A>
FFLFAST_DEVICE A not_a_number() {
  return infinity<A>() - infinity<A>();
}

template <class A>
FFLFAST_DEVICE A read(const Number& number) {
  return number.device ? *static_cast<const A*>(number.device) : static_cast<A>(number.value);
}

template <class A>
struct Scalars {
  A temperature, kl_weight, ce_weight, smoothing, eps;
  A tempered;  // log2(e)/T: exp(x/T) = 2^(x · tempered)
  bool few;    // classes
};

template <class A>
FFLFAST_DEVICE Scalars<A> read_scalars(const Operands& o) {
  Scalars<A> s{read<A>(o.temperature), read<A>(o.kl_weight), read<A>(o.ce_weight), static_cast<A>(o.label_smoothing),
               static_cast<A>(o.target_eps), A(0), o.classes <= kFewClasses};
  s.tempered = static_cast<A>(kLog2E) / s.temperature;
  return s;
}

// Ignored rows add nothing and have gradients of zero; a bad row (counted, but its class does not exist) is NaN.
enum class RowState { kIgnored, kCounted, kBad };

// The state of a row and, for class indices, its class.
FFLFAST_DEVICE RowState row_state(const Operands& o, int64_t row, int64_t* index) {
  *index = -1;
  if (o.target_kind != kIndexTarget) return RowState::kCounted;
  *index = simt::load_cached<int64_t, 1>(static_cast<const int64_t*>(o.target) + row)[0];
  if (*index == o.ignore_index) return RowState::kIgnored;
  return *index >= 0 && *index < o.classes ? RowState::kCounted : RowState::kBad;
}

// y_c of a soft target after label smoothing.
template <class A>
FFLFAST_DEVICE A soft_target(const Operands& o, const Scalars<A>& s, int64_t row, int64_t c) {
  const A y = simt::load_cached<A, 1>(static_cast<const A*>(o.target) + row * o.target_stride + c)[0];
  return s.smoothing == A(0) ? y : y * (A(1) - s.smoothing) + s.smoothing / static_cast<A>(o.classes);
}

template <int SITE, class A>
FFLFAST_DEVICE A sum_of_warp(A value) {
  for (int mask = 16; mask > 0; mask >>= 1) value += simt::shuffle_xor<SITE>(value, mask);
  return value;
}

// How many of the rows from `begin` by `step`, for the block's first thread, are counted by the block: in every thread.
// `shared` holds one number a warp, and must not be written again before the next barrier. Sites SITE, SITE + 1.
template <int SITE>
FFLFAST_DEVICE int64_t count_in_block(const Operands& o, int64_t begin, int64_t step, int64_t* shared) {
  int64_t count = 0;
  const int64_t* target = static_cast<const int64_t*>(o.target);
  for (int64_t row = begin + simt::thread_index(); row < o.rows; row += step)
    count += simt::load_cached<int64_t, 1>(target + row)[0] != o.ignore_index;
  count = sum_of_warp<SITE>(count);
  if (simt::lane_index() == 0) shared[simt::warp_index()] = count;
  simt::sync_block<SITE + 1>();
  count = 0;
  for (int w = 0; w < simt::block_size() / simt::kWarpSize; ++w) count += shared[w];
  return count;
}

// What a row's loss weighs in the whole, before grad_loss: 1/n for a mean. Otherwise as count_in_block.
template <int SITE, class A>
FFLFAST_DEVICE A weight_of_row(const Operands& o, int64_t* shared) {
  int64_t count = 1;
  if (o.count_kind == kCountKnown) count = o.known_count;
  if (o.count_kind == kCountInMemory) count = *o.count;
  if (o.count_kind == kCountByBlock) count = count_in_block<SITE>(o, 0, simt::block_size(), shared);
  A n = static_cast<A>(count > 1 ? count : 1);
  // The backward pass finds n in the forward pass's statistics.
  if (o.statistics_in) n = *static_cast<const A*>(o.statistics_in);
  return o.reduction == kMeanOfRows ? A(1) / n : A(1);
}

template <class A>
FFLFAST_DEVICE A grad_of_row(const Operands& o, int64_t row) {
  if (!o.grad_loss) return A(1);
  return static_cast<const A*>(o.grad_loss)[o.reduction == kPerRow ? row : 0];
}

// Counters of the blocks that have finished, zero when the library is loaded and again after each launch, as they wrap:
// none is ever set by the host. Which launch takes which is decided in distill_loss.cu.
#ifdef FFLFAST_EMULATE
static unsigned tickets[kTickets];
#else
static __device__ unsigned tickets[kTickets];
#endif

// Whether this block is the last one of the launch to come here.
template <int SITE>
FFLFAST_DEVICE bool is_last_block(const Operands& o, int64_t blocks, int* shared) {
  return is_last_of<SITE>(o.ticket ? o.ticket : tickets + o.ticket_slot, blocks, shared);
}

// The sum over blocks of column `column` of o.partials, in the same order every time; the whole warp takes part.
template <int SITE>
FFLFAST_DEVICE double sum_of_blocks(const double* partials, int columns, int column, int64_t blocks) {
  double sum = 0.0;
  for (int64_t b = simt::lane_index(); b < blocks; b += simt::kWarpSize)
    sum += simt::load_device<double, 1>(partials + b * columns + column)[0];
  return sum_of_warp<SITE>(sum);
}

// The end of a forward launch: totals (shared, columns: counted rows, loss, terms) of this block, complete and seen by
// all its threads, become loss, terms and n in memory. `block` of `blocks` counts those that come here.
template <int SITE, class A>
FFLFAST_DEVICE void finish(const Operands& o, double* totals, int64_t block, int64_t blocks, int* flag) {
  const int columns = 2 + o.num_terms;
  for (int t = simt::thread_index(); t < columns; t += simt::block_size())
    simt::store_streaming<double, 1>(o.partials + block * columns + t, Pack<double, 1>{{totals[t]}});
  simt::sync_block<SITE>();
  if (!is_last_block<SITE + 1>(o, blocks, flag)) return;
  for (int t = simt::warp_index(); t < columns; t += simt::block_size() / simt::kWarpSize) {
    const double sum = sum_of_blocks<SITE + 2>(o.partials, columns, t, blocks);
    if (simt::lane_index() == 0) totals[t] = sum;
  }
  simt::sync_block<SITE + 3>();
  const double n = totals[0] > 1.0 ? totals[0] : 1.0;
  for (int t = simt::thread_index(); t < columns; t += simt::block_size()) {
    if (t == 0 && o.statistics_out) *static_cast<A*>(o.statistics_out) = static_cast<A>(n);
    if (t == 1 && o.reduction != kPerRow)
      *static_cast<A*>(o.loss) = static_cast<A>(o.reduction == kMeanOfRows ? totals[1] / n : totals[1]);
    if (t >= 2) static_cast<A*>(o.terms)[t - 2] = static_cast<A>(o.reduction == kSumOfRows ? totals[t] : totals[t] / n);
  }
}

}  // namespace fflfast::cuda
