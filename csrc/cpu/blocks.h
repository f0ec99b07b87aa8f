// Loops over one block of a row: what every form of the kernel is made of. Included by the kernel files only (see
// vec.h). A block's buffers hold whole vectors; beyond the row's end d is −inf and every exponential 0.
#pragma once

#include "elementary.h"

namespace fflfast {
namespace FFLFAST_ISA {

constexpr int kBlock = 256;

template <int N>
struct Count {
  static constexpr int kCount = N;
};

template <class A>
FFLFAST_INLINE int padded(int n) {
  return (n + Vec<A>::kWidth - 1) / Vec<A>::kWidth * Vec<A>::kWidth;
}

// Calls body(offset, load) for each vector of n numbers at z, where load() gives the vector, padded with `fill`.
template <class S, class Body>
FFLFAST_INLINE void for_each_vector(const S* z, int n, Accumulation<S> fill, const Body& body) {
  constexpr int kWidth = Vec<Accumulation<S>>::kWidth;
  int c = 0;
  for (; c + kWidth <= n; c += kWidth) body(c, load(z + c));
  if (c < n) body(c, load_tail(z + c, n - c, fill));
}

template <class A>
inline A infinity() {
  return static_cast<A>(__builtin_inf());
}

// The maximum of z; NaN does not show here, but in every sum.
template <class S>
inline Accumulation<S> maximum(const S* z, int64_t n) {
  typedef Accumulation<S> A;
  constexpr int kWidth = Vec<A>::kWidth;
  typename Vec<A>::Reg top[4];
  for (auto& t : top) t = set<A>(-infinity<A>());
  int64_t c = 0;
  for (; c + 4 * kWidth <= n; c += 4 * kWidth)
    for (int j = 0; j < 4; ++j) top[j] = larger(load(z + c + j * kWidth), top[j]);
  for (; c + kWidth <= n; c += kWidth) top[0] = larger(load(z + c), top[0]);
  if (c < n) top[1] = larger(load_tail(z + c, static_cast<int>(n - c), -infinity<A>()), top[1]);
  return max_lanes<A>(larger(larger(top[0], top[1]), larger(top[2], top[3])));
}

// d = z − top.
template <class S>
inline void shift(const S* z, int n, Accumulation<S> top, Accumulation<S>* d) {
  typedef Accumulation<S> A;
  const auto m = set<A>(top);
  for_each_vector(z, n, -infinity<A>(), [&](int c, auto v) { store(d + c, v - m); });
}

// sum (+)= a·x, the start of a mixture or one more member.
template <class S>
inline void accumulate(const S* z, int n, Accumulation<S> a, bool first, Accumulation<S>* u) {
  typedef Accumulation<S> A;
  const auto weight = set<A>(a);
  for_each_vector(z, n, -infinity<A>(), [&](int c, auto v) {
    store(u + c, first ? weight * v : fma(weight, v, load(u + c)));
  });
}

template <class A>
inline void add_constant(A* u, int n, A x) {
  for (int c = 0; c < n; c += Vec<A>::kWidth) store(u + c, load(u + c) + x);
}

// e = exp(d/divisor); returns the sum.
template <class A>
inline double exponentials(const A* d, int n, const Exponent<A>& divisor, A* e) {
  constexpr int kWidth = Vec<A>::kWidth;
  typename Vec<A>::Reg sum{};
  for (int c = 0; c < n; c += kWidth) {
    const auto v = exp<A>(load(d + c), divisor);
    store(e + c, v);
    sum += v;
  }
  return sum_lanes<A>(sum);
}

// Σ x of n numbers.
template <class A>
inline double plain_sum(const A* x, int n) {
  typename Vec<A>::Reg sum{};
  for_each_vector(x, n, A(0), [&](int, auto v) { sum += v; });
  return sum_lanes<A>(sum);
}

// Σ e·(a − b), where e = 0 adds nothing.
template <class A>
inline double weighted_difference(const A* e, const A* a, const A* b, int n) {
  constexpr int kWidth = Vec<A>::kWidth;
  typename Vec<A>::Reg even{}, odd{};
  int c = 0;
  for (; c + kWidth < n; c += 2 * kWidth) {
    even = add_where_nonzero(even, load(e + c), load(a + c) - load(b + c));
    odd = add_where_nonzero(odd, load(e + c + kWidth), load(a + c + kWidth) - load(b + c + kWidth));
  }
  if (c < n) even = add_where_nonzero(even, load(e + c), load(a + c) - load(b + c));
  return sum_lanes<A>(even + odd);
}

// Σ e·d, where e = 0 adds nothing.
template <class A>
inline double weighted_sum(const A* e, const A* d, int n) {
  typename Vec<A>::Reg sum{};
  for (int c = 0; c < n; c += Vec<A>::kWidth) sum = add_where_nonzero(sum, load(e + c), load(d + c));
  return sum_lanes<A>(sum);
}

// The log-ratio ℓ = log q − log p_s of an edge, 0 beyond the row's end, with log p_s = d_s·inverse_t − log_s.
// With ε, q = e_t/S_t + ε; without, log q = d_t·inverse_t − log_t.
template <class A>
inline void log_ratio(const A* e_t, const A* d_t, const A* d_s, int n, A inverse_sum, A eps, A inverse_t, A log_t,
                      A log_s, A* out) {
  constexpr int kWidth = Vec<A>::kWidth;
  const A offset = log_s - log_t;
  for (int c = 0; c < n; c += kWidth) {
    if (eps != 0) {
      const auto q = fma(load(e_t + c), set<A>(inverse_sum), set<A>(eps));
      store(out + c, log<A>(q) - fma(load(d_s + c), set<A>(inverse_t), set<A>(-log_s)));
    } else {
      store(out + c, fma(load(d_t + c) - load(d_s + c), set<A>(inverse_t), set<A>(offset)));
    }
  }
  for (int c = n; c < padded<A>(n); ++c) out[c] = 0;
}

// Σ q·ℓ of n numbers, q = e·inverse_sum + eps, where q = 0 adds nothing.
template <class A>
inline double divergence(const A* e, const A* ratio, int n, A inverse_sum, A eps) {
  typename Vec<A>::Reg sum{};
  for (int c = 0; c < n; c += Vec<A>::kWidth)
    sum = add_where_nonzero(sum, fma(load(e + c), set<A>(inverse_sum), set<A>(eps)), load(ratio + c));
  return sum_lanes<A>(sum);
}

// out += weight·p·(ℓ − mean), where p = e·inverse_sum = 0 adds nothing.
template <class A>
inline void add_teacher_gradient(const A* e, const A* ratio, int n, A inverse_sum, A mean, A weight, A* out) {
  for (int c = 0; c < n; c += Vec<A>::kWidth) {
    const auto p = load(e + c) * set<A>(inverse_sum);
    store(out + c, add_where_nonzero(load(out + c), p * set<A>(weight), load(ratio + c) - set<A>(mean)));
  }
}

// out = constant + Σ_k factor[k]·term[k], written as S. At most four terms a pass, the sums between passes in `wide`.
template <class S, class A>
inline void combine(S* out, int n, int count, const A* const* term, const A* factor, A constant, A* wide) {
  constexpr int kWidth = Vec<A>::kWidth;
  int done = 0;
  for (bool first = true; first || done < count; first = false) {
    const int now = count - done < 4 ? count - done : 4;
    const bool last = done + now == count;
    const A *t0 = now > 0 ? term[done] : wide, *t1 = now > 1 ? term[done + 1] : wide;
    const A *t2 = now > 2 ? term[done + 2] : wide, *t3 = now > 3 ? term[done + 3] : wide;
    const auto pass = [&](auto terms) {
      constexpr int kTerms = decltype(terms)::kCount;
      typename Vec<A>::Reg f[4];
      for (int j = 0; j < kTerms; ++j) f[j] = set<A>(factor[done + j]);
      for (int c = 0; c < n; c += kWidth) {
        auto g = first ? set<A>(constant) : load(wide + c);
        if (kTerms > 0) g = fma(f[0], load(t0 + c), g);
        if (kTerms > 1) g = fma(f[1], load(t1 + c), g);
        if (kTerms > 2) g = fma(f[2], load(t2 + c), g);
        if (kTerms > 3) g = fma(f[3], load(t3 + c), g);
        if (!last)
          store(wide + c, g);
        else if (c + kWidth <= n)
          store(out + c, g);
        else
          store_tail(out + c, g, n - c);
      }
    };
    if (now == 0) pass(Count<0>{});
    if (now == 1) pass(Count<1>{});
    if (now == 2) pass(Count<2>{});
    if (now == 3) pass(Count<3>{});
    if (now == 4) pass(Count<4>{});
    done += now;
  }
}

}  // namespace FFLFAST_ISA
}  // namespace fflfast
