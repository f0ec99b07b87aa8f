// Exponential and logarithm of vectors. Included by the kernel files only (see vec.h).
#pragma once

#include "vec.h"

namespace fflfast {
namespace FFLFAST_ISA {

// exp(d/divisor) = 2^(d·k), k = log2(e)/divisor, for many d and one positive divisor.
//
// k is kept in two parts: with a fused multiply-add the reduced argument d·k − n is then exact to its last bit, and
// what is left is the error of d itself. So the power h^P of an exponential of (z − m)/P is as good as exp(z − m).
template <class A>
struct Exponent {
  typename Vec<A>::Reg high, low, least;

  explicit FFLFAST_INLINE Exponent(double divisor) {
    const long double k = 1.44269504088896340736L / divisor;
    const A k_high = static_cast<A>(k);
    high = set<A>(k_high);
    low = set<A>(static_cast<A>(k - k_high));
    least = set<A>(static_cast<A>(Vec<A>::kUnderflow / k));
  }
};

// Minimax on [−1/2, 1/2]: relative error below 2e-9.
FFLFAST_INLINE FloatReg exp2_fraction(FloatReg f) {
  FloatReg p = set(0.000153457880148f);
  p = fma(p, f, set(0.00133999576064f));
  p = fma(p, f, set(0.00961848924745f));
  p = fma(p, f, set(0.0555032871188f));
  p = fma(p, f, set(0.240226468861f));
  p = fma(p, f, set(0.693147205767f));
  return fma(p, f, set(1.0f));
}

// The Taylor series: relative error below 1e-17.
FFLFAST_INLINE DoubleReg exp2_fraction(DoubleReg f) {
  constexpr double kTaylor[] = {1.3691488853904129e-12, 2.5678435993488205e-11, 4.4455382718708115e-10,
                                7.0549116208011233e-9,  1.01780860092397e-7,    1.3215486790144309e-6,
                                1.525273380405984e-5,   0.0001540353039338161,  0.0013333558146428443,
                                0.0096181291076284772,  0.05550410866482158,    0.24022650695910071,
                                0.69314718055994531,    1.0};
  DoubleReg p = set(kTaylor[0]);
  for (int i = 1; i < 14; ++i) p = fma(p, f, set(kTaylor[i]));
  return p;
}

// −inf gives 0, NaN stays, results below the normal numbers are rounded, not flushed.
template <class A>
FFLFAST_INLINE typename Vec<A>::Reg exp(typename Vec<A>::Reg d, const Exponent<A>& c) {
  d = larger(c.least, d);
  const typename Vec<A>::Reg n = nearest(d * c.high);
  const typename Vec<A>::Reg f = fma(d, c.low, fma(d, c.high, -n));
  return scale<A>(exp2_fraction(f), n);
}

// Natural logarithm of x ≥ 0: x = 2^k·f with f in [√½, √2), log f = 2·artanh((f − 1)/(f + 1)). log 0 = −inf.
template <class A>
FFLFAST_INLINE typename Vec<A>::Reg log(typename Vec<A>::Reg x) {
  typedef typename Vec<A>::Reg Reg;
  typedef typename Vec<A>::Bits Bits;
  constexpr int kMantissa = Vec<A>::kMantissaBits;
  constexpr A kLift = static_cast<A>(static_cast<double>(uint64_t{1} << 54));
  const Bits kRootHalf = (Bits)set<A>(A(0.70710678118654752));
  const auto tiny = x < set<A>(sizeof(A) == 4 ? A(0x1p-126) : A(0x1p-1022));
  const Reg lifted = tiny ? x * kLift : x;
  const Bits k = ((Bits)lifted - kRootHalf) >> kMantissa;
  const Reg f = (Reg)((Bits)lifted - (k << kMantissa));
  // 1.5·2^mantissa + k has k in its low bits.
  Reg exponent = (Reg)((Bits)set<A>(Vec<A>::kRounder) + k) - Vec<A>::kRounder;
  exponent = tiny ? exponent - A(54) : exponent;
  const Reg s = (f - A(1)) / (f + A(1)), s2 = s * s;
  Reg series = set<A>(sizeof(A) == 4 ? A(1.0 / 11) : A(1.0 / 23));
  for (int i = sizeof(A) == 4 ? 9 : 21; i > 1; i -= 2) series = fma(series, s2, set<A>(static_cast<A>(1.0 / i)));
  series = fma(series, s2, set<A>(A(1)));
  const Reg high = set<A>(sizeof(A) == 4 ? A(0.693145751953125) : A(0.69314718036912382));
  const Reg low = set<A>(sizeof(A) == 4 ? A(1.42860682030941723e-6) : A(1.9082149292705877e-10));
  const Reg result = fma(exponent, high, fma(s + s, series, exponent * low));
  const Reg edge = x == Reg{} ? Reg{} - A(__builtin_inf()) : x + x;
  return (x > Reg{}) & (x < set<A>(A(__builtin_inf()))) ? result : edge;
}

}  // namespace FFLFAST_ISA
}  // namespace fflfast
