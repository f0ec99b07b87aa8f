// The power form (power_kernel.h) for the graphs that people train most, known when this is compiled: everything about
// an element stays in registers, h alone goes to memory between the two sweeps. Included by the kernel files only (see
// vec.h); without this file these graphs take PowerKernel.
#pragma once

#include "power_kernel.h"

namespace fflfast {
namespace FFLFAST_ISA {

// N sub-networks and the fused classifier: fused → each sub-network, mean of the sub-networks → fused.
template <int N>
struct FflShape {
  static constexpr int kLogits = N + 1, kMembers = N, kMixtures = 1, kEdges = N + 1;
  static constexpr bool plain(int) { return true; }
  static constexpr bool student(int) { return true; }
  static constexpr int teacher_of(int e) { return e < N ? N : N + 1; }
  static constexpr int student_of(int e) { return e; }
};

// Two networks that teach each other.
struct DmlShape {
  static constexpr int kLogits = 2, kMembers = 1, kMixtures = 0, kEdges = 2;
  static constexpr bool plain(int) { return true; }
  static constexpr bool student(int) { return true; }
  static constexpr int teacher_of(int e) { return 1 - e; }
  static constexpr int student_of(int e) { return e; }
};

// A student and a teacher that learns nothing.
struct KdShape {
  static constexpr int kLogits = 2, kMembers = 1, kMixtures = 0, kEdges = 1;
  static constexpr bool plain(int i) { return i == 0; }
  static constexpr bool student(int i) { return i == 0; }
  static constexpr int teacher_of(int) { return 1; }
  static constexpr int student_of(int) { return 0; }
};

template <class Shape>
class ShapeKernel : public PowerKernel {
 public:
  static constexpr int M = Shape::kLogits, V = Shape::kMixtures, D = M + V, E = Shape::kEdges;

  explicit ShapeKernel(const Plan& plan)
      : PowerKernel(plan),
        streams_(plan.classes % 16 == 0 && plan.rows * plan.classes >= kStreamedFrom) {}
  ~ShapeKernel() {
    if (streams_) finish_streams();
  }

  // Whether the plan is of this shape, with every weight in use.
  static bool fits(const Plan& plan) {
    const GraphOf<double>& graph = plan.graph;
    if (graph.num_logits != M || graph.num_mixtures != V || graph.num_edges != E || plan.smoothing != 0) return false;
    for (int i = 0; i < M; ++i) {
      if (plan.plain[i] != Shape::plain(i) || (plan.gradient[i] != nullptr) != Shape::student(i)) return false;
      if (plan.plain[i] && plan.target_weight[i] == 0) return false;
    }
    for (int j = 0; j < M && V > 0; ++j)
      if ((graph.mixture[0][j] != 0) != (j < Shape::kMembers)) return false;
    for (int e = 0; e < E; ++e)
      if (graph.edge[e].teacher != Shape::teacher_of(e) || graph.edge[e].student != Shape::student_of(e) ||
          graph.edge[e].weight * plan.kl_weight == 0)
        return false;
    return true;
  }

  void forward(int64_t row, double* total) {
    if (roots_ == nullptr) return RowKernel<float>::forward(row, total);
    if (!start(row, total)) return;
    find_maxima();
    bool done = false;
    with_small(temperature_, [&](auto t) { done = sweep_sums<decltype(t)::kCount>(); });
    if (!done) return RowKernel<float>::forward(row, total);
    total[0] += add_terms(total);
    find_factors();
    with_small(temperature_, [&](auto t) { sweep_gradients<decltype(t)::kCount>(); });
    for (int i = 0; i < M; ++i)
      if (Shape::plain(i))
        static_cast<float*>(plan_.gradient[i])[row_ * plan_.classes + plan_.index[row_]] -=
            static_cast<float>(plan_.scale * plan_.target_weight[i]);
  }

 private:
  // Gradients that no cache holds until they are read are not written through one: 64-byte rows of tensors of 16 MB.
  static constexpr int64_t kStreamedFrom = int64_t{1} << 22;

  // A number of each distribution.
  struct Element {
    FloatReg of[D];
  };

  // Every distribution's exp((u − its shift)/T), from the roots.
  static FFLFAST_INLINE Element exponentials_of(const Element& root) {
    Element e;
    for (int i = 0; i < M; ++i) e.of[i] = power<Shape::kMembers>(root.of[i], Shape::kMembers);
    for (int v = M; v < D; ++v) {
      e.of[v] = root.of[0];
      for (int j = 1; j < Shape::kMembers; ++j) e.of[v] *= root.of[j];
    }
    return e;
  }

  // False where a product came too near to underflow.
  template <int T>
  bool sweep_sums() {
    constexpr int kWidth = Vec<float>::kWidth, kPart = 32 * kWidth;
    double plain[kMaxLogits] = {}, tempered[kMaxDistributions] = {}, difference[E] = {};
    FloatReg depth{}, top[M];
    const float* z[M];
    float* h[M];
    for (int i = 0; i < M; ++i) {
      z[i] = logits(i);
      h[i] = roots(i, 0);
      top[i] = set(top_[i]);
    }
    const Exponent<float> root_exponent = root_;
    const auto share = set(1.0f / Shape::kMembers);
    for (int64_t begin = 0; begin < plan_.classes; begin += kPart) {
      FloatReg sum[D] = {}, plain_part[M] = {}, part[E] = {};
      const auto body = [&](int64_t c, const Element& logit) {
        Element d, root;
        for (int i = 0; i < M; ++i) {
          d.of[i] = logit.of[i] - top[i];
          root.of[i] = exp<float>(d.of[i], root_exponent);
          store(h[i] + c, root.of[i]);
        }
        for (int v = M; v < D; ++v) {
          d.of[v] = d.of[0];
          for (int j = 1; j < Shape::kMembers; ++j) d.of[v] += d.of[j];
          d.of[v] *= share;
          depth = larger(d.of[v] == -infinity<float>() ? FloatReg{} : -d.of[v], depth);
        }
        const Element e = exponentials_of(root);
        for (int k = 0; k < D; ++k) sum[k] += e.of[k];
        for (int i = 0; i < M; ++i)
          if (Shape::plain(i)) plain_part[i] += power<T>(e.of[i], temperature_);
        for (int k = 0; k < E; ++k) {
          const int t = Shape::teacher_of(k), s = Shape::student_of(k);
          part[k] = add_where_nonzero(part[k], e.of[t], d.of[t] - d.of[s]);
        }
      };
      const int64_t end = plan_.classes - begin < kPart ? plan_.classes : begin + kPart;
      int64_t c = begin;
      Element logit;
      for (; c + kWidth <= end; c += kWidth) {
        for (int i = 0; i < M; ++i) logit.of[i] = load(z[i] + c);
        body(c, logit);
      }
      if (c < end) {
        for (int i = 0; i < M; ++i) logit.of[i] = load_tail(z[i] + c, static_cast<int>(end - c), -infinity<float>());
        body(c, logit);
      }
      for (int k = 0; k < D; ++k) tempered[k] += sum_lanes<float>(sum[k]);
      for (int i = 0; i < M; ++i) plain[i] += sum_lanes<float>(plain_part[i]);
      for (int k = 0; k < E; ++k) difference[k] += sum_lanes<float>(part[k]);
    }
    if (V > 0 && !products_hold(depth)) return false;
    settle_sums(plain, tempered, difference);
    return true;
  }

  // What each exponential weighs in each gradient of this row.
  void find_factors() {
    take_inverses();
    for (int i = 0; i < M; ++i) {
      for (int k = 0; k < plan_.num_pieces[i]; ++k) {
        const Piece& piece = plan_.piece[i][k];
        const float factor = static_cast<float>(plan_.scale * piece.weight * inverse_of(piece));
        if (piece.basis < M)
          plain_factor_[i] = factor;
        else
          tempered_factor_[i][piece.basis - M] = factor;
      }
    }
  }

  template <int T>
  void sweep_gradients() {
    constexpr int kWidth = Vec<float>::kWidth;
    float* out[M];
    const float* h[M];
    FloatReg own[M], plain[M], other[E];
    for (int i = 0; i < M; ++i) {
      h[i] = roots(i, 0);
      if (!Shape::student(i)) continue;
      out[i] = static_cast<float*>(plan_.gradient[i]) + row_ * plan_.classes;
      own[i] = set(tempered_factor_[i][i]);
      if (Shape::plain(i)) plain[i] = set(plain_factor_[i]);
    }
    for (int k = 0; k < E; ++k) other[k] = set(tempered_factor_[Shape::student_of(k)][Shape::teacher_of(k)]);
    const auto gradients = [&](int64_t c) {
      Element root, g;
      for (int i = 0; i < M; ++i) root.of[i] = load(h[i] + c);
      const Element e = exponentials_of(root);
      for (int i = 0; i < M; ++i)
        if (Shape::student(i)) g.of[i] = own[i] * e.of[i];
      for (int k = 0; k < E; ++k)
        g.of[Shape::student_of(k)] = fma(other[k], e.of[Shape::teacher_of(k)], g.of[Shape::student_of(k)]);
      for (int i = 0; i < M; ++i)
        if (Shape::plain(i)) g.of[i] = fma(plain[i], power<T>(e.of[i], temperature_), g.of[i]);
      return g;
    };
    int64_t c = 0;
    for (; c + kWidth <= plan_.classes; c += kWidth) {
      const Element g = gradients(c);
      for (int i = 0; i < M; ++i) {
        if (!Shape::student(i)) continue;
        if (streams_)
          stream(out[i] + c, g.of[i]);
        else
          store(out[i] + c, g.of[i]);
      }
    }
    if (c == plan_.classes) return;
    const Element g = gradients(c);
    for (int i = 0; i < M; ++i)
      if (Shape::student(i)) store_tail(out[i] + c, g.of[i], static_cast<int>(plan_.classes - c));
  }

  const bool streams_;
  float plain_factor_[M], tempered_factor_[M][D];
};

}  // namespace FFLFAST_ISA
}  // namespace fflfast
