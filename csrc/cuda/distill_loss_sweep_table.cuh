// The graph and the shared memory of the plain kernel.
#pragma once

#include "distill_loss_common.cuh"

namespace fflfast::cuda {

constexpr int kSweepLogits = 16;
constexpr int kSweepMixtures = 16;
// Kernel arguments end at 4 KB.
template <class A>
constexpr int kSweepEdges = std::is_same_v<A, double> ? 80 : 240;

template <class A>
struct SweepTable {
  int32_t num_logits, num_mixtures, num_edges;
  int32_t trainable;  // whether any edge is
  uint32_t tempered;  // bit d: distribution d is in an edge
  A ce_weight[kSweepLogits];
  A mixture[kSweepMixtures][kSweepLogits];
  A weight[kSweepEdges<A>];
  uint8_t teacher[kSweepEdges<A>], student[kSweepEdges<A>], detach[kSweepEdges<A>];

  FFLFAST_HOST_DEVICE int distributions() const { return num_logits + num_mixtures; }
};

// Shared memory: totals, flag | record | one line of partial sums a warp | one column of staged numbers a thread.
template <class A>
struct SweepLayout {
  int distributions, logits, edges, columns, warps, threads, staged;

  FFLFAST_HOST_DEVICE SweepLayout(const SweepTable<A>& g, int num_terms, int threads, bool gradients)
      : distributions(g.distributions()), logits(g.num_logits), edges(g.num_edges), columns(2 + num_terms),
        warps(threads / simt::kWarpSize), threads(threads),
        staged(!gradients ? 0 : (g.trainable ? 3 : 2) * g.distributions()) {}

  // The record of a row: maxima, S, R (as in the statistics), Σ y'(z − m), Σ y', Σ q·ℓ and ⟨p_t, ℓ⟩.
  FFLFAST_HOST_DEVICE int maximum(int d) const { return d; }
  FFLFAST_HOST_DEVICE int sum(int d) const { return distributions + d; }
  FFLFAST_HOST_DEVICE int plain_sum(int i) const { return 2 * distributions + i; }
  FFLFAST_HOST_DEVICE int dense(int i) const { return 2 * distributions + logits + i; }
  FFLFAST_HOST_DEVICE int mass() const { return 2 * distributions + 2 * logits; }
  FFLFAST_HOST_DEVICE int kl(int e) const { return mass() + 1 + e; }
  FFLFAST_HOST_DEVICE int ratio(int e) const { return mass() + 1 + edges + e; }
  FFLFAST_HOST_DEVICE int record() const { return mass() + 1 + 2 * edges; }

  FFLFAST_HOST_DEVICE int record_offset() const { return 8 * columns + 8; }
  FFLFAST_HOST_DEVICE int partial_offset() const { return (record_offset() + int(sizeof(A)) * record() + 7) / 8 * 8; }
  FFLFAST_HOST_DEVICE int staged_offset() const {
    // The count of rows uses the same place, one 8-byte number a warp.
    return partial_offset() + (int(sizeof(A)) * record() + 8) / 8 * 8 * warps;
  }
  FFLFAST_HOST_DEVICE size_t bytes() const { return staged_offset() + sizeof(A) * staged * size_t(threads); }
};

}  // namespace fflfast::cuda
