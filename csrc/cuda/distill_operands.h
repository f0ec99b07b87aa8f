// What the kernels of the distillation loss are launched with: addresses and numbers, by value.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fflfast::cuda {

constexpr int kOperandLogits = 16;
constexpr int kTickets = 16384;

enum TargetKind : int32_t { kNoTarget = 0, kIndexTarget = 1, kSoftTarget = 2 };
enum ReductionKind : int32_t { kPerRow = 0, kMeanOfRows = 1, kSumOfRows = 2 };

// Where n, the number of counted rows, comes from while gradients are written.
enum CountKind : int32_t {
  kCountNotNeeded = 0,
  kCountKnown = 1,     // the host knows it
  kCountByBlock = 2,   // each block counts the whole target
  kCountInMemory = 3,  // an earlier launch left it in `count`
};

// A number that the host knows, or that lies on the device in the accumulation dtype.
struct Number {
  double value = 0.0;
  const void* device = nullptr;
};

struct Operands {
  int64_t rows, classes;
  const void* logits[kOperandLogits];
  int64_t stride[kOperandLogits];     // of a row, in elements
  void* gradients[kOperandLogits];    // contiguous (rows, classes); null where not wanted
  int32_t writes_gradients;
  TargetKind target_kind;
  const void* target;
  int64_t target_stride;
  int64_t ignore_index;
  Number temperature, kl_weight, ce_weight;
  double label_smoothing, target_eps;
  ReductionKind reduction;
  CountKind count_kind;
  int64_t known_count;
  const int64_t* count;
  const void* grad_loss;              // null: 1
  const void* statistics_in;          // not null: the backward pass, which sums nothing
  void* statistics_out;               // null: not wanted
  int32_t statistics_width, num_terms;
  void* loss;                         // (rows,) or one number
  void* terms;
  double* partials;                   // one line of 2 + num_terms a block
  unsigned* ticket;                   // null: number `ticket_slot` of the library's own
  int32_t ticket_slot;
};

// How a kernel is launched; see launch_policy.h.
struct Geometry {
  int lanes = 32;   // threads of one block that share a row: a power of two up to 32, or the whole block
  int block = 128;
  int cluster = 1;  // blocks that share a row
  int64_t grid = 1;
  size_t shared = 0;
};

}  // namespace fflfast::cuda
