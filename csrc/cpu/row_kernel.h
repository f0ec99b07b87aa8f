// The rows of the loss by direct exponentials: any graph, any dtype. Included by the kernel files only (see vec.h).
//
// A row is swept in blocks that stay in the first-level cache: maxima (which bring the row into the cache), sums and
// divergences, then gradients, for which the exponentials are computed again unless the row is a single block. With ε
// the divergences need the row sums first and take a sweep of their own. The backward of the base form is the gradient
// sweep alone, on the statistics that the forward wrote; rounded alike, they give the same bits.
//
// Sums run in vectors over a block and in double over blocks, losses in double over rows.
#pragma once

#include "blocks.h"
#include "plan.h"

namespace fflfast {
namespace FFLFAST_ISA {

template <class S>
class RowKernel {
 public:
  typedef Accumulation<S> A;

  explicit RowKernel(const Plan& plan)
      : plan_(plan),
        graph_(plan.graph),
        num_logits_(plan.graph.num_logits),
        num_distributions_(plan.graph.num_logits + plan.graph.num_mixtures),
        same_(plan.temperature == 1.0),
        one_(1.0),
        divisor_(plan.temperature) {
    for (int i = 0; i < num_logits_; ++i) plain_[i] = same_ && plan.tempered[i] ? tempered_at(i) : plain_buffer_[i];
  }

  // Whether a row counts; `bad` where its class index is out of range.
  bool counted(int64_t row, bool* bad) const {
    *bad = false;
    if (plan_.index == nullptr) return true;
    const int64_t y = plan_.index[row];
    *bad = y != plan_.ignore_index && (y < 0 || y >= plan_.classes);
    return y != plan_.ignore_index;
  }

  // Adds the row's loss and terms to total[0 … num_terms] and writes whatever else the plan asks for.
  void forward(int64_t row, double* total) {
    if (!start(row, total)) return;
    find_maxima();
    find_mixture_maxima();
    const auto compute = [this](int64_t begin, double* plain, double* tempered) {
      compute_block(begin, plain, tempered);
    };
    find_sums(compute);
    if (plan_.eps != 0) find_divergences();
    finish(total, compute);
  }

  void backward(int64_t row) {
    bool bad;
    if (!counted(row, &bad) || bad) return finish_without_reading(row, bad);
    row_ = row;
    read_statistics();
    write_gradients([this](int64_t begin, double* plain, double* tempered) { compute_block(begin, plain, tempered); });
  }

 protected:
  // False where the row is not to be read, and everything about it is done.
  bool start(int64_t row, double* total) {
    row_ = row;
    bool bad;
    if (counted(row, &bad) && !bad) return true;
    if (bad)
      for (int k = 0; k <= plan_.num_terms; ++k) total[k] = __builtin_nan("");
    finish_without_reading(row, bad);
    return false;
  }

  template <class Compute>
  void finish(double* total, const Compute& compute) {
    const double loss = add_terms(total);
    total[0] += loss;
    if (plan_.row_loss != nullptr) static_cast<A*>(plan_.row_loss)[row_] = static_cast<A>(loss);
    if (plan_.statistics != nullptr) write_statistics();
    write_gradients(compute);
  }

  const S* logits(int i) const { return static_cast<const S*>(plan_.logits[i]) + row_ * plan_.row_stride[i]; }
  A* tempered_at(int d) { return tempered_buffer_[d]; }
  bool mixed(int d, int i) const { return graph_.mixture[d - num_logits_][i] != 0; }

  // An ignored row: zeros. A bad one: NaN.
  void finish_without_reading(int64_t row, bool bad) {
    const A value = bad ? static_cast<A>(__builtin_nan("")) : A(0);
    if (plan_.row_loss != nullptr) static_cast<A*>(plan_.row_loss)[row] = value;
    if (plan_.statistics != nullptr && plan_.grad_loss == nullptr)
      for (int k = 0; k < plan_.width; ++k) statistics(row)[k] = A(0);
    for (int i = 0; i < num_logits_; ++i) {
      if (plan_.gradient[i] == nullptr) continue;
      S* out = static_cast<S*>(plan_.gradient[i]) + row * plan_.classes;
      for (int64_t c = 0; c < plan_.classes; c += kBlock)
        combine<S, A>(out + c, block_size(c), 0, nullptr, nullptr, value, wide_);
    }
  }

  int block_size(int64_t begin) const {
    return static_cast<int>(plan_.classes - begin < kBlock ? plan_.classes - begin : kBlock);
  }

  A* statistics(int64_t row) const { return static_cast<A*>(plan_.statistics) + 1 + row * plan_.width; }

  void find_maxima() {
    for (int i = 0; i < num_logits_; ++i)
      if (plan_.loaded[i]) top_[i] = maximum(logits(i), plan_.classes);
  }

  void find_mixture_maxima() {
    for (int d = num_logits_; d < num_distributions_; ++d) {
      if (!plan_.tempered[d]) continue;
      top_[d] = -infinity<A>();
      for (int64_t begin = 0; begin < plan_.classes; begin += kBlock) {
        mix(d, begin);
        const A top = maximum(d_[d], block_size(begin));
        top_[d] = top > top_[d] ? top : top_[d];
      }
    }
  }

  // d ← the mixture's logits, from the logits themselves both times, so that the maximum is met exactly.
  void mix(int d, int64_t begin) {
    bool first = true;
    for (int i = 0; i < num_logits_; ++i) {
      if (!mixed(d, i)) continue;
      const A weight = static_cast<A>(graph_.mixture[d - num_logits_][i]);
      accumulate(logits(i) + begin, block_size(begin), weight, first, d_[d]);
      first = false;
    }
  }

  // Shifted logits and exponentials of a block; adds their sums.
  void compute_block(int64_t begin, double* plain_sum, double* tempered_sum) {
    const int n = block_size(begin);
    for (int i = 0; i < num_logits_; ++i) {
      if (!plan_.loaded[i]) continue;
      shift(logits(i) + begin, n, top_[i], d_[i]);
      if (plan_.tempered[i]) tempered_sum[i] += exponentials(d_[i], n, divisor_, tempered_at(i));
      if (plan_.plain[i] && plain_[i] == plain_buffer_[i]) plain_sum[i] += exponentials(d_[i], n, one_, plain_[i]);
    }
    for (int d = num_logits_; d < num_distributions_; ++d) {
      if (!plan_.tempered[d]) continue;
      mix(d, begin);
      add_constant(d_[d], n, -top_[d]);
      tempered_sum[d] += exponentials(d_[d], n, divisor_, tempered_at(d));
    }
    if (plan_.soft != nullptr) load_soft_target(begin, n);
  }

  // y' = y(1 − α) + α/C of a block.
  void load_soft_target(int64_t begin, int n) {
    const A* y = static_cast<const A*>(plan_.soft) + row_ * plan_.soft_stride + begin;
    const auto keep = set<A>(static_cast<A>(1.0 - plan_.smoothing));
    const auto share = set<A>(static_cast<A>(plan_.smoothing / static_cast<double>(plan_.classes)));
    for_each_vector(y, n, A(0), [&](int c, auto v) { store(y_ + c, fma(v, keep, share)); });
    for (int c = n; c < padded<A>(n); ++c) y_[c] = 0;
  }

  // `compute` fills the buffers of a block and adds to the sums.
  template <class Compute>
  void find_sums(const Compute& compute) {
    double plain[kMaxLogits] = {}, tempered[kMaxDistributions] = {}, difference[kMaxEdges];
    for (int e = 0; e < graph_.num_edges; ++e) difference[e] = 0;
    for (int i = 0; i < num_logits_; ++i) shifted_sum_[i] = target_sum_[i] = 0;
    soft_mass_ = 0;
    for (int64_t begin = 0; begin < plan_.classes; begin += kBlock) {
      const int n = block_size(begin);
      compute(begin, plain, tempered);
      if (plan_.eps == 0)
        for (int e = 0; e < graph_.num_edges; ++e) {
          const int t = graph_.edge[e].teacher, s = graph_.edge[e].student;
          difference[e] += weighted_difference(tempered_at(t), d_[t], d_[s], n);
        }
      if (plan_.soft != nullptr)
        soft_mass_ += plain_sum(y_, n);
      for (int i = 0; i < num_logits_; ++i) {
        if (!plan_.plain[i]) continue;
        if (plan_.soft != nullptr)
          target_sum_[i] += weighted_sum(y_, d_[i], n);
        else if (plan_.smoothing != 0)
          shifted_sum_[i] += plain_sum(d_[i], n);
      }
    }
    for (int i = 0; i < num_logits_; ++i)
      if (plain_[i] != plain_buffer_[i]) plain[i] = tempered[i];
    settle_sums(plain, tempered, difference);
  }

  // Divergences from Σ e_t (d_t − d_s), where there is no ε.
  void settle_sums(const double* plain, const double* tempered, const double* difference) {
    for (int i = 0; i < num_logits_; ++i) plain_sum_[i] = static_cast<A>(plain[i]);
    for (int d = 0; d < num_distributions_; ++d) tempered_sum_[d] = static_cast<A>(tempered[d]);
    take_logarithms();
    for (int e = 0; e < graph_.num_edges; ++e) {
      const int t = graph_.edge[e].teacher, s = graph_.edge[e].student;
      divergence_[e] = difference[e] / (plan_.temperature * static_cast<double>(tempered_sum_[t])) + log_tempered(s) -
                       log_tempered(t);
      ratio_[e] = static_cast<A>(divergence_[e]);
    }
  }

  // Of all sums at once, as a vector of them costs what one costs.
  void take_logarithms() { for_all_sums(log_, [](auto sums) { return log<double>(sums); }); }
  void take_inverses() { for_all_sums(inverse_, [](auto sums) { return 1.0 / sums; }); }

  template <class Function>
  void for_all_sums(double* out, const Function& function) {
    for (int d = 0; d < num_distributions_; ++d) out[d] = static_cast<double>(tempered_sum_[d]);
    for (int i = 0; i < num_logits_; ++i) out[num_distributions_ + i] = static_cast<double>(plain_sum_[i]);
    for (int k = 0; k < num_distributions_ + num_logits_; k += Vec<double>::kWidth)
      store(out + k, function(load(out + k)));
  }

  double log_tempered(int d) const { return log_[d]; }
  double log_plain(int i) const { return log_[num_distributions_ + i]; }

  // One over the sum of a piece's exponentials.
  double inverse_of(const Piece& piece) const {
    const int plain = piece.basis + num_distributions_, tempered = piece.basis - num_logits_;
    return inverse_[piece.basis < num_logits_ ? plain : tempered];
  }

  // With ε: Σ q·ℓ, and Σ p·ℓ for trainable teachers.
  void find_divergences() {
    double unused[kMaxDistributions] = {}, mean[kMaxEdges];
    for (int e = 0; e < graph_.num_edges; ++e) divergence_[e] = mean[e] = 0;
    for (int64_t begin = 0; begin < plan_.classes; begin += kBlock) {
      const int n = block_size(begin);
      if (plan_.classes > kBlock) compute_block(begin, unused, unused);
      for (int e = 0; e < graph_.num_edges; ++e) {
        const int t = graph_.edge[e].teacher;
        compute_log_ratio(e, n);
        divergence_[e] += divergence(tempered_at(t), ratio_buffer_, n, inverse_sum(t), static_cast<A>(plan_.eps));
        if (!graph_.edge[e].detach) mean[e] += divergence(tempered_at(t), ratio_buffer_, n, inverse_sum(t), A(0));
      }
    }
    for (int e = 0; e < graph_.num_edges; ++e) ratio_[e] = static_cast<A>(mean[e]);
  }

  A inverse_sum(int d) const { return static_cast<A>(1.0 / static_cast<double>(tempered_sum_[d])); }

  void compute_log_ratio(int e, int n) {
    const int t = graph_.edge[e].teacher, s = graph_.edge[e].student;
    log_ratio(tempered_at(t), d_[t], d_[s], n, inverse_sum(t), static_cast<A>(plan_.eps),
              static_cast<A>(1.0 / plan_.temperature), static_cast<A>(log_tempered(t)),
              static_cast<A>(log_tempered(s)), ratio_buffer_);
  }

  double cross_entropy(int i) const {
    // A target of no mass at all asks for nothing, even of a row that has no distribution.
    if (plan_.soft != nullptr) return (soft_mass_ != 0 ? log_plain(i) * soft_mass_ : 0.0) - target_sum_[i];
    alignas(kBytes) A value[Vec<A>::kWidth];
    store(value, load_tail(logits(i) + plan_.index[row_], 1, A(0)));
    const double right = log_plain(i) - (static_cast<double>(value[0]) - static_cast<double>(top_[i]));
    if (plan_.smoothing == 0) return right;
    const double all = log_plain(i) - shifted_sum_[i] / static_cast<double>(plan_.classes);
    return (1.0 - plan_.smoothing) * right + plan_.smoothing * all;
  }

  double add_terms(double* total) {
    double loss = 0;
    int k = 1;
    for (int i = 0; i < num_logits_; ++i) {
      if (!plan_.plain[i]) continue;
      const double value = cross_entropy(i), weight = plan_.ce_weight * graph_.ce_weight[i];
      total[k++] += value;
      if (weight != 0) loss += weight * value;
    }
    for (int e = 0; e < graph_.num_edges; ++e) {
      const double value = plan_.temperature * plan_.temperature * divergence_[e];
      const double weight = plan_.kl_weight * graph_.edge[e].weight;
      total[k++] += value;
      if (weight != 0) loss += weight * value;
    }
    return loss;
  }

  void write_statistics() {
    A* out = statistics(row_);
    for (int d = 0; d < num_distributions_; ++d) {
      const bool used = d < num_logits_ ? plan_.loaded[d] : plan_.tempered[d];
      *out++ = used ? top_[d] : A(0);
    }
    for (int d = 0; d < num_distributions_; ++d) *out++ = plan_.tempered[d] ? tempered_sum_[d] : A(0);
    for (int i = 0; i < num_logits_; ++i) *out++ = plan_.plain[i] ? plain_sum_[i] : A(0);
    for (int e = 0; e < graph_.num_edges; ++e) *out++ = graph_.edge[e].detach ? A(0) : ratio_[e];
  }

  void read_statistics() {
    const A* in = statistics(row_);
    for (int d = 0; d < num_distributions_; ++d) top_[d] = *in++;
    for (int d = 0; d < num_distributions_; ++d) tempered_sum_[d] = *in++;
    for (int i = 0; i < num_logits_; ++i) plain_sum_[i] = *in++;
    for (int e = 0; e < graph_.num_edges; ++e) ratio_[e] = *in++;
    if (plan_.trainable) take_logarithms();
    soft_mass_ = 0;
    for (int64_t begin = 0; plan_.soft != nullptr && begin < plan_.classes; begin += kBlock) {
      load_soft_target(begin, block_size(begin));
      soft_mass_ += plain_sum(y_, block_size(begin));
    }
  }

  // Gradients: row_gradients.h.
  template <class Compute>
  void write_gradients(const Compute& compute);
  void set_terms(double weight);
  void write_gradient_block(int i, int64_t begin, double weight);
  void compute_teacher_gradients(int64_t begin, double weight);

  const Plan& plan_;
  const GraphOf<double>& graph_;
  const int num_logits_, num_distributions_;
  const bool same_;  // T = 1: one exponential serves both softmaxes
  const Exponent<A> one_, divisor_;
  int64_t row_ = 0;
  A top_[kMaxDistributions];
  A tempered_sum_[kMaxDistributions], plain_sum_[kMaxLogits];
  // Of the tempered sums, then of the plain ones.
  double log_[kMaxDistributions + kMaxLogits + Vec<double>::kWidth];
  double inverse_[kMaxDistributions + kMaxLogits + Vec<double>::kWidth];
  double shifted_sum_[kMaxLogits], target_sum_[kMaxLogits], soft_mass_;
  double divergence_[kMaxEdges];
  A ratio_[kMaxEdges];
  int count_[kMaxLogits];
  const A* term_[kMaxLogits][kMaxPieces + 2];
  A factor_[kMaxLogits][kMaxPieces + 2];
  A* plain_[kMaxLogits];
  alignas(kBytes) A d_[kMaxDistributions][kBlock];
  alignas(kBytes) A tempered_buffer_[kMaxDistributions][kBlock];
  alignas(kBytes) A plain_buffer_[kMaxLogits][kBlock];
  alignas(kBytes) A extra_[kMaxLogits][kBlock];
  alignas(kBytes) A y_[kBlock], wide_[kBlock], ratio_buffer_[kBlock];
};

}  // namespace FFLFAST_ISA
}  // namespace fflfast

#include "row_gradients.h"
