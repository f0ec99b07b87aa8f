// The fast form's shortcut: one exponential a logit, every other one a power of it. Included by the kernel files only
// (see vec.h); without this file the rows take RowKernel.
//
// With P = K·T and h_i = exp((z_i − m_i)/P): exp((z_i − m_i)/T) = h_i^K, exp(z_i − m_i) = h_i^P, and the mean of K
// logits tensors has exp((u − Σ m_j/K)/T) = Π_j h_j. That shift is not the mixture's maximum but at or above it, so
// a product can be lost in underflow where the direct form would keep it: such a row is computed again directly.
// FFL with two sub-networks: 3 exponentials an element in place of 14, and no second look at the logits.
#pragma once

#include <cstdlib>

#include "row_kernel.h"

namespace fflfast {
namespace FFLFAST_ISA {

// x^n; N = 0 leaves n to the run time.
template <int N>
FFLFAST_INLINE FloatReg power(FloatReg x, int n) {
  if (N == 1) return x;
  if (N == 2) return x * x;
  if (N == 3) return x * x * x;
  if (N == 4) return (x * x) * (x * x);
  FloatReg square = x, result = n & 1 ? x : set(1.0f);
  for (int rest = n >> 1; rest > 0; rest >>= 1) {
    square *= square;
    if (rest & 1) result *= square;
  }
  return result;
}

// Calls body(Count<N>) with N = n where n is small, else with N = 0.
template <class Body>
FFLFAST_INLINE void with_small(int n, const Body& body) {
  switch (n) {
    case 1: return body(Count<1>{});
    case 2: return body(Count<2>{});
    case 3: return body(Count<3>{});
    case 4: return body(Count<4>{});
    default: return body(Count<0>{});
  }
}

class PowerKernel : public RowKernel<float> {
 public:
  explicit PowerKernel(const Plan& plan)
      : RowKernel<float>(plan),
        members_(plan.power / static_cast<int>(plan.temperature)),
        temperature_(static_cast<int>(plan.temperature)),
        root_(plan.power),
        roots_(static_cast<float*>(std::aligned_alloc(64, 4 * static_cast<uint64_t>(root_stride() * num_logits_)))) {}
  PowerKernel(const PowerKernel&) = delete;
  PowerKernel& operator=(const PowerKernel&) = delete;
  ~PowerKernel() { std::free(roots_); }

  void forward(int64_t row, double* total) {
    if (roots_ == nullptr) return RowKernel<float>::forward(row, total);
    if (!start(row, total)) return;
    find_maxima();
    depth_ = FloatReg{};
    find_sums([this](int64_t begin, double* plain, double* tempered) { compute_roots(begin, plain, tempered); });
    if (!products_hold(depth_)) return RowKernel<float>::forward(row, total);
    finish(total, [this](int64_t begin, double*, double*) { compute_powers(begin); });
  }

 protected:
  // Whole cache lines, with room for the last vector.
  int64_t root_stride() const { return (plan_.classes + 31) / 16 * 16; }
  float* roots(int i, int64_t begin) { return roots_ + i * root_stride() + begin; }

  // Whether every product of a finite element is above 2^−100: `depth` is how far these lie below their shift.
  bool products_hold(FloatReg depth) const {
    return max_lanes<float>(depth) < 69.0f * static_cast<float>(temperature_);
  }

  const int members_, temperature_;
  const Exponent<float> root_;
  float* const roots_;  // h of a row

 private:

  // h, its powers and their sums.
  void compute_roots(int64_t begin, double* plain_sum, double* tempered_sum) {
    const int n = block_size(begin);
    for (int i = 0; i < num_logits_; ++i) {
      if (!plan_.loaded[i]) continue;
      with_small(members_, [&](auto k) {
        with_small(temperature_, [&](auto t) {
          compute_roots_of<decltype(k)::kCount, decltype(t)::kCount>(i, begin, n, plain_sum + i, tempered_sum + i);
        });
      });
    }
    for (int d = num_logits_; d < num_distributions_; ++d) {
      if (!plan_.tempered[d]) continue;
      const float *root[kMaxLogits], *shifted[kMaxLogits];
      const int count = members(d, begin, root, shifted);
      const auto share = set(1.0f / static_cast<float>(count));
      FloatReg sum{}, depth = depth_;
      for (int c = 0; c < n; c += Vec<float>::kWidth) {
        auto product = load(root[0] + c), u = load(shifted[0] + c);
        for (int j = 1; j < count; ++j) {
          product *= load(root[j] + c);
          u += load(shifted[j] + c);
        }
        u *= share;
        store(d_[d] + c, u);
        store(tempered_at(d) + c, product);
        sum += product;
        depth = larger(u == -infinity<float>() ? FloatReg{} : -u, depth);
      }
      depth_ = depth;
      tempered_sum[d] += sum_lanes<float>(sum);
    }
  }

  template <int K, int T>
  void compute_roots_of(int i, int64_t begin, int n, double* plain_sum, double* tempered_sum) {
    const bool kept = plan_.classes <= kBlock;
    float *const h = roots(i, begin), *const d_out = d_[i];
    float *const e_out = tempered_at(i), *const full_out = kept ? plain_[i] : e_out;
    const auto m = set(top_[i]);
    const Exponent<float> root = root_;
    FloatReg sum{}, sum_plain{};
    for_each_vector(logits(i) + begin, n, -infinity<float>(), [&](int c, auto z) {
      const auto d = z - m;
      const auto x = exp<float>(d, root);
      const auto e = power<K>(x, members_), full = power<T>(e, temperature_);
      store(d_out + c, d);
      store(h + c, x);
      store(full_out + c, full);
      store(e_out + c, e);
      sum += e;
      sum_plain += full;
    });
    *tempered_sum += sum_lanes<float>(sum);
    *plain_sum += sum_lanes<float>(sum_plain);
  }

  // The powers of a block of h.
  void compute_powers(int64_t begin) {
    const int n = block_size(begin);
    for (int i = 0; i < num_logits_; ++i) {
      if (!plan_.loaded[i]) continue;
      const float* const h = roots(i, begin);
      float *const e_out = tempered_at(i), *const full_out = plain_[i];
      with_small(members_, [&](auto k) {
        with_small(temperature_, [&](auto t) {
          for (int c = 0; c < n; c += Vec<float>::kWidth) {
            const auto e = power<decltype(k)::kCount>(load(h + c), members_);
            store(e_out + c, e);
            store(full_out + c, power<decltype(t)::kCount>(e, temperature_));
          }
        });
      });
    }
    for (int d = num_logits_; d < num_distributions_; ++d) {
      if (!plan_.tempered[d]) continue;
      const float *root[kMaxLogits], *shifted[kMaxLogits];
      const int count = members(d, begin, root, shifted);
      for (int c = 0; c < n; c += Vec<float>::kWidth) {
        auto product = load(root[0] + c);
        for (int j = 1; j < count; ++j) product *= load(root[j] + c);
        store(tempered_at(d) + c, product);
      }
    }
  }

  int members(int d, int64_t begin, const float** root, const float** shifted) {
    int count = 0;
    for (int i = 0; i < num_logits_; ++i) {
      if (!mixed(d, i)) continue;
      root[count] = roots(i, begin);
      shifted[count++] = d_[i];
    }
    return count;
  }

  FloatReg depth_;
};

}  // namespace FFLFAST_ISA
}  // namespace fflfast
