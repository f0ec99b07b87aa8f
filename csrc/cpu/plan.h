// One call's work as plain data: what the registering file (baseline code) fills in and the kernel files read.
#pragma once

#include "../distill_graph.h"

namespace fflfast {

constexpr int kMaxDistributions = kMaxLogits + kMaxMixtures;
// A gradient is a sum of exponentials: a logits tensor's own two, and one of each other distribution.
constexpr int kMaxPieces = 2 + kMaxDistributions;

enum class Storage : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// weight·exponential/(its row sum). Basis b < M is softmax(z_b), basis M + d is softmax(u_d / T).
struct Piece {
  int basis;
  double weight;
};

struct Plan {
  GraphOf<double> graph;
  int64_t rows, classes;
  const void* logits[kMaxLogits];
  int64_t row_stride[kMaxLogits];
  void* gradient[kMaxLogits];  // contiguous rows; null where not wanted
  const int64_t* index;        // class indices, or null
  const void* soft;            // probabilities, or null
  int64_t soft_stride;
  int64_t ignore_index;
  double temperature, kl_weight, ce_weight, smoothing, eps;

  bool plain[kMaxLogits];            // softmax(z_i) is needed: i has a cross-entropy term
  bool tempered[kMaxDistributions];  // softmax(u_d / T) is needed: d is an end of an edge
  bool loaded[kMaxLogits];           // z_i is read at all

  // The gradient of z_i: Σ pieces − uniform − (one-hot target), each times the row's scale.
  Piece piece[kMaxLogits][kMaxPieces];
  int num_pieces[kMaxLogits];
  double uniform[kMaxLogits];
  double target_weight[kMaxLogits];  // μ·ce_i
  bool trainable;                    // some active edge has a teacher with gradient

  int power;  // P where the fast form may take every exponential as a power of exp((z − m)/P) (power_kernel.h), else 0

  int num_terms;
  int width;               // of a row of statistics
  double scale;            // what a row's loss weighs in the whole: 1/n or 1
  const void* grad_loss;   // null in the forward
  int64_t grad_stride;     // 1 where each row has its own, else 0
  void* statistics;        // base form: written by the forward, read by the backward; null in the fast form
  void* row_loss;          // reduction none: one number a row
  int64_t rows_per_chunk;  // rows whose terms one thread adds up; depends on the shape alone
  double* partial;         // chunk × (1 + num_terms): loss, then terms
};

struct Kernels {
  const char* name;
  // Rows of chunks [begin, end), forward; gradients too where the plan wants them.
  void (*forward)(const Plan&, Storage, int64_t begin, int64_t end);
  void (*backward)(const Plan&, Storage, int64_t begin, int64_t end);
  // Numbers [0, count) of one gradient tensor.
  void (*scale)(void* gradient, Storage, double factor, int64_t count);
};

// Null where the machine or the compiler's target has no such instructions.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace fflfast
