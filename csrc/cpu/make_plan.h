// From the operators' arguments to the plan that the kernels follow.
#pragma once

#include "../distill_arguments.h"
#include "plan.h"

namespace fflfast {

inline Storage storage_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return Storage::kFloat64;
    case Dtype::kBFloat16: return Storage::kBFloat16;
    case Dtype::kFloat16: return Storage::kFloat16;
    default: return Storage::kFloat32;
  }
}

// Number of rows that are not ignored, at least 1.
inline int64_t count_rows(const Plan& plan) {
  if (plan.index == nullptr) return plan.rows;
  int64_t count = 0;
  for (int64_t r = 0; r < plan.rows; ++r) count += plan.index[r] != plan.ignore_index;
  return count > 0 ? count : 1;
}

inline void add_piece(Plan* plan, int i, int basis, double weight) {
  for (int k = 0; k < plan->num_pieces[i]; ++k)
    if (plan->piece[i][k].basis == basis) {
      plan->piece[i][k].weight += weight;
      return;
    }
  plan->piece[i][plan->num_pieces[i]++] = {basis, weight};
}

// The gradients as sums of softmaxes, the divergences' first: where student and teacher agree they cancel to nothing,
// and then p − y is rounded once. A term whose weight is zero has no piece, so that it adds nothing even where it is
// not finite.
inline void plan_gradients(Plan* plan) {
  const GraphOf<double>& graph = plan->graph;
  const double classes = static_cast<double>(plan->classes);
  for (int e = 0; e < graph.num_edges; ++e) {
    const EdgeOf<double>& edge = graph.edge[e];
    const double weight = plan->kl_weight * plan->temperature * edge.weight;
    if (plan->kl_weight * edge.weight == 0) continue;
    add_piece(plan, edge.student, graph.num_logits + edge.student, weight * (1.0 + plan->eps * classes));
    add_piece(plan, edge.student, graph.num_logits + edge.teacher, -weight);
    plan->uniform[edge.student] += weight * plan->eps;
    plan->trainable |= !edge.detach;
  }
  for (int i = 0; i < graph.num_logits; ++i) {
    plan->target_weight[i] = plan->ce_weight * graph.ce_weight[i];
    if (plan->target_weight[i] == 0) continue;
    add_piece(plan, i, i, plan->target_weight[i]);
    if (plan->soft == nullptr) plan->uniform[i] += plan->target_weight[i] * plan->smoothing / classes;
  }
}

// P = K·T where T is an integer, every used mixture is the mean of K logits tensors and nothing but row sums of
// exponentials is asked for; else 0. A power has P times the relative error of h: with more than 8 (6 where a product
// adds to it) gradients that are mostly cross-entropy, λ small or 0, would leave the contract. Measured.
inline int common_power(const Plan& plan) {
  constexpr int kMostPower = 8, kMostPowerOfProducts = 6;
  const GraphOf<double>& graph = plan.graph;
  if (plan.soft != nullptr || plan.eps != 0 || plan.trainable || graph.num_edges == 0) return 0;
  if (!(plan.temperature >= 1 && plan.temperature <= kMostPower)) return 0;
  const int temperature = static_cast<int>(plan.temperature);
  if (temperature != plan.temperature) return 0;
  int members = 0;
  for (int v = 0; v < graph.num_mixtures; ++v) {
    if (!plan.tempered[graph.num_logits + v]) continue;
    int count = 0;
    for (int i = 0; i < graph.num_logits; ++i) count += graph.mixture[v][i] != 0;
    for (int i = 0; i < graph.num_logits; ++i)
      if (graph.mixture[v][i] != 0 && graph.mixture[v][i] != 1.0 / count) return 0;
    if (members != 0 && members != count) return 0;
    members = count;
  }
  const int power = temperature * (members == 0 ? 1 : members);
  return power <= (members > 1 ? kMostPowerOfProducts : kMostPower) ? power : 0;
}

inline Plan make_plan(const DistillArguments& a) {
  Plan plan{};
  plan.graph = a.exact;
  const GraphOf<double>& graph = plan.graph;
  plan.rows = a.rows;
  plan.classes = a.classes;
  for (int i = 0; i < graph.num_logits; ++i) {
    plan.logits[i] = a.logits[i];
    plan.row_stride[i] = a.row_stride[i];
  }
  if (a.target_kind == Target::kIndex) plan.index = static_cast<const int64_t*>(a.target);
  if (a.target_kind == Target::kProbabilities) plan.soft = a.target;
  plan.soft_stride = a.target_stride;
  plan.ignore_index = a.ignore_index;
  plan.temperature = a.temperature.value;
  plan.kl_weight = a.kl_weight.value;
  plan.ce_weight = a.ce_weight.value;
  plan.smoothing = a.label_smoothing;
  plan.eps = a.target_eps;
  for (int i = 0; i < graph.num_logits; ++i) plan.plain[i] = plan.loaded[i] = graph.ce_weight[i] != 0;
  for (int e = 0; e < graph.num_edges; ++e)
    for (const int d : {graph.edge[e].teacher, graph.edge[e].student}) {
      plan.tempered[d] = true;
      for (int i = 0; i < graph.num_logits; ++i)
        plan.loaded[i] |= d < graph.num_logits ? i == d : graph.mixture[d - graph.num_logits][i] != 0;
    }
  plan.num_terms = a.num_terms();
  plan.width = graph.width();
  plan.scale = a.reduction == Reduction::kMean ? 1.0 / static_cast<double>(count_rows(plan)) : 1.0;
  // A thousand numbers a chunk; part of the result's definition, so it must not depend on threads or machine.
  plan.rows_per_chunk = a.classes >= 1024 ? 1 : 1024 / a.classes;
  plan_gradients(&plan);
  return plan;
}

inline int64_t num_chunks(const Plan& plan) { return (plan.rows + plan.rows_per_chunk - 1) / plan.rows_per_chunk; }

}  // namespace fflfast
