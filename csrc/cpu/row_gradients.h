// The gradient sweep of a row. The end of row_kernel.h.
#pragma once

#include "row_kernel.h"

namespace fflfast {
namespace FFLFAST_ISA {

template <class S>
template <class Compute>
void RowKernel<S>::write_gradients(const Compute& compute) {
  bool wanted = false;
  for (int i = 0; i < num_logits_; ++i) wanted |= plan_.gradient[i] != nullptr;
  if (!wanted) return;
  double weight = plan_.scale;
  if (plan_.grad_loss != nullptr)
    weight *= static_cast<double>(static_cast<const A*>(plan_.grad_loss)[row_ * plan_.grad_stride]);
  set_terms(weight);
  double unused[kMaxDistributions] = {};
  const bool kept = plan_.classes <= kBlock && plan_.grad_loss == nullptr;
  for (int64_t begin = 0; begin < plan_.classes; begin += kBlock) {
    if (!kept) compute(begin, unused, unused);
    if (plan_.trainable) compute_teacher_gradients(begin, weight);
    for (int i = 0; i < num_logits_; ++i)
      if (plan_.gradient[i] != nullptr) write_gradient_block(i, begin, weight);
  }
}

// The factor of each exponential in each gradient of this row.
template <class S>
void RowKernel<S>::set_terms(double weight) {
  take_inverses();
  for (int i = 0; i < num_logits_; ++i) {
    int count = 0;
    const double mass = plan_.soft != nullptr ? soft_mass_ : 1.0;
    for (int k = 0; k < plan_.num_pieces[i]; ++k) {
      const Piece& piece = plan_.piece[i][k];
      const bool plain = piece.basis < num_logits_;
      const int d = plain ? piece.basis : piece.basis - num_logits_;
      term_[i][count] = plain ? plain_[d] : tempered_at(d);
      factor_[i][count++] = static_cast<A>(weight * piece.weight * (plain ? mass : 1.0) * inverse_of(piece));
    }
    if (plan_.soft != nullptr && plan_.target_weight[i] != 0) {
      term_[i][count] = y_;
      factor_[i][count++] = static_cast<A>(-weight * plan_.target_weight[i]);
    }
    if (plan_.trainable) {
      term_[i][count] = extra_[i];
      factor_[i][count++] = A(1);
    }
    count_[i] = count;
  }
}

template <class S>
void RowKernel<S>::write_gradient_block(int i, int64_t begin, double weight) {
  const int n = block_size(begin);
  S* out = static_cast<S*>(plan_.gradient[i]) + row_ * plan_.classes + begin;
  const A constant = static_cast<A>(-weight * plan_.uniform[i]);
  const int64_t y = plan_.index != nullptr && plan_.target_weight[i] != 0 ? plan_.index[row_] - begin : -1;
  const bool here = y >= 0 && y < n;
  const A share = static_cast<A>(weight * plan_.target_weight[i] * (1.0 - plan_.smoothing));
  if constexpr (sizeof(S) == sizeof(A)) {
    combine<S, A>(out, n, count_[i], term_[i], factor_[i], constant, wide_);
    if (here) out[y] -= share;
  } else if (!here) {
    combine<S, A>(out, n, count_[i], term_[i], factor_[i], constant, wide_);
  } else {
    // The target's class is put right before the gradient is rounded to S.
    combine<A, A>(wide_, padded<A>(n), count_[i], term_[i], factor_[i], constant, wide_);
    wide_[y] -= share;
    for_each_vector(wide_, n, A(0), [&](int c, auto v) {
      if (c + Vec<A>::kWidth <= n)
        store(out + c, v);
      else
        store_tail(out + c, v, n - c);
    });
  }
}

// ∂L/∂u_t = λ T w p_t (ℓ − ⟨p_t, ℓ⟩), spread over a mixture by its coefficients.
template <class S>
void RowKernel<S>::compute_teacher_gradients(int64_t begin, double weight) {
  const int n = block_size(begin);
  for (int i = 0; i < num_logits_; ++i)
    for (int c = 0; c < padded<A>(n); ++c) extra_[i][c] = 0;
  for (int e = 0; e < graph_.num_edges; ++e) {
    const double edge_weight = weight * plan_.kl_weight * plan_.temperature * graph_.edge[e].weight;
    if (graph_.edge[e].detach || plan_.kl_weight * graph_.edge[e].weight == 0) continue;
    const int t = graph_.edge[e].teacher;
    // A student without mass where the teacher has some: the loss is +inf there and has no gradient.
    const bool lost = !(ratio_[e] - ratio_[e] == 0);
    if (!lost) compute_log_ratio(e, n);
    for (int i = 0; i < num_logits_; ++i) {
      const double share = t < num_logits_ ? (t == i ? 1.0 : 0.0) : graph_.mixture[t - num_logits_][i];
      if (share == 0 || plan_.gradient[i] == nullptr) continue;
      if (lost)
        add_constant(extra_[i], n, static_cast<A>(__builtin_nan("")));
      else
        add_teacher_gradient(tempered_at(t), ratio_buffer_, n, inverse_sum(t), ratio_[e],
                             static_cast<A>(edge_weight * share), extra_[i]);
    }
  }
}

}  // namespace FFLFAST_ISA
}  // namespace fflfast
