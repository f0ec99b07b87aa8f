// Vectors of float and double for one instruction set, on the compiler's vector extensions; intrinsics only where those
// have no word for it. FFLFAST_ISA names the namespace and FFLFAST_VECTOR_BYTES the width. Every function a kernel file
// uses lives in that namespace, and none comes from a standard template: were one inline function compiled in two files
// with different flags, the linker would keep one of them for both, and a plain machine could meet AVX-512 code.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FFLFAST_INLINE inline __attribute__((always_inline))

namespace fflfast {
namespace FFLFAST_ISA {

// Storage types of the 16-bit formats; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

constexpr int kBytes = FFLFAST_VECTOR_BYTES;

typedef float FloatReg __attribute__((vector_size(kBytes)));
typedef int32_t IntReg __attribute__((vector_size(kBytes)));
typedef uint32_t WordReg __attribute__((vector_size(kBytes)));
typedef uint16_t ShortReg __attribute__((vector_size(kBytes / 2)));
typedef double DoubleReg __attribute__((vector_size(kBytes)));
typedef int64_t LongReg __attribute__((vector_size(kBytes)));

template <class A>
struct Vec;

template <>
struct Vec<float> {
  typedef FloatReg Reg;
  typedef IntReg Bits;
  static constexpr int kWidth = kBytes / 4;
  static constexpr int kExponentBias = 127, kMantissaBits = 23;
  static constexpr float kUnderflow = -160.0f;  // 2^this is zero
  static constexpr float kRounder = 12582912.0f;  // 1.5·2^23: adding and subtracting it rounds to an integer
};

template <>
struct Vec<double> {
  typedef DoubleReg Reg;
  typedef LongReg Bits;
  static constexpr int kWidth = kBytes / 8;
  static constexpr int kExponentBias = 1023, kMantissaBits = 52;
  static constexpr double kUnderflow = -1100.0;
  static constexpr double kRounder = 6755399441055744.0;  // 1.5·2^52
};

template <class A>
FFLFAST_INLINE typename Vec<A>::Reg set(A x) {
  return typename Vec<A>::Reg{} + x;
}

// ---- loads and stores ------------------------------------------------------------------------------------------

template <class A>
FFLFAST_INLINE typename Vec<A>::Reg load(const A* p) {
  typename Vec<A>::Reg v;
  __builtin_memcpy(&v, p, kBytes);
  return v;
}

template <class A>
FFLFAST_INLINE void store(A* p, typename Vec<A>::Reg v) {
  __builtin_memcpy(p, &v, kBytes);
}

// A store past the caches, for what is not read again soon; p is aligned to a vector.
FFLFAST_INLINE void stream(float* p, FloatReg v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}

// Orders streamed numbers before whatever the thread does next.
FFLFAST_INLINE void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

FFLFAST_INLINE FloatReg load(const BFloat16* p) {
  ShortReg s;
  __builtin_memcpy(&s, p, kBytes / 2);
  return (FloatReg)(__builtin_convertvector(s, WordReg) << 16);
}

FFLFAST_INLINE void store(BFloat16* p, FloatReg v) {
  const WordReg u = (WordReg)v;
  // Round to nearest even; a NaN keeps a bit of its mantissa.
  const WordReg rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const ShortReg s = __builtin_convertvector(v == v ? rounded : (u >> 16) | 0x40, ShortReg);
  __builtin_memcpy(p, &s, kBytes / 2);
}

FFLFAST_INLINE FloatReg load(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  ShortReg s;
  __builtin_memcpy(&s, p, kBytes / 2);
  const WordReg h = __builtin_convertvector(s, WordReg);
  // As a float of the same bits, shifted, the number is 2^112 too small; infinities and NaN need the whole exponent.
  const FloatReg scaled = (FloatReg)((h & 0x7fff) << 13) * 0x1p112f;
  const WordReg special = (h & 0x7c00) == 0x7c00 ? (WordReg{} + 0x7f800000u) : WordReg{};
  return (FloatReg)((WordReg)scaled | special | ((h & 0x8000) << 16));
#endif
}

FFLFAST_INLINE void store(Half* p, FloatReg v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const WordReg u = (WordReg)v, magnitude = u & 0x7fffffff, sign = (u >> 16) & 0x8000;
  const WordReg normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 adding 0.5 leaves the mantissa of the subnormal, rounded, in the low bits.
  const WordReg subnormal = (WordReg)((FloatReg)magnitude + 0.5f) - 0x3f000000;
  const WordReg special = magnitude > 0x7f800000 ? (WordReg{} + 0x7e00u) : (WordReg{} + 0x7c00u);
  WordReg h = magnitude < 0x38800000 ? subnormal : normal;
  h = magnitude >= 0x477ff000 ? special : h;
  const ShortReg s = __builtin_convertvector(h | sign, ShortReg);
  __builtin_memcpy(p, &s, kBytes / 2);
#endif
}

template <class S>
struct AccumulationOf {
  typedef float Type;
};
template <>
struct AccumulationOf<double> {
  typedef double Type;
};
template <class S>
using Accumulation = typename AccumulationOf<S>::Type;

// The first n < width numbers; the others are `fill`, which the storage type holds exactly.
template <class S>
FFLFAST_INLINE typename Vec<Accumulation<S>>::Reg load_tail(const S* p, int n, Accumulation<S> fill) {
  typedef Accumulation<S> A;
  alignas(kBytes) S storage[Vec<A>::kWidth];
  alignas(kBytes) A wide[Vec<A>::kWidth];
  for (int i = 0; i < Vec<A>::kWidth; ++i) storage[i] = S{};
  for (int i = 0; i < n; ++i) storage[i] = p[i];
  store(wide, load(storage));
  for (int i = n; i < Vec<A>::kWidth; ++i) wide[i] = fill;
  return load(wide);
}

template <class S>
FFLFAST_INLINE void store_tail(S* p, typename Vec<Accumulation<S>>::Reg v, int n) {
  alignas(kBytes) S storage[Vec<Accumulation<S>>::kWidth];
  store(storage, v);
  for (int i = 0; i < n; ++i) p[i] = storage[i];
}

#if defined(__AVX512F__)
template <>
FFLFAST_INLINE FloatReg load_tail(const float* p, int n, float fill) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p);
}
template <>
FFLFAST_INLINE DoubleReg load_tail(const double* p, int n, double fill) {
  return _mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>((1u << n) - 1), p);
}
template <>
FFLFAST_INLINE void store_tail(float* p, FloatReg v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
}
template <>
FFLFAST_INLINE void store_tail(double* p, DoubleReg v, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v);
}
#endif

// ---- arithmetic ------------------------------------------------------------------------------------------------

// a·b + c, rounded once where the machine can.
FFLFAST_INLINE FloatReg fma(FloatReg a, FloatReg b, FloatReg c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

FFLFAST_INLINE DoubleReg fma(DoubleReg a, DoubleReg b, DoubleReg c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger one; `b` where either is NaN, so that a NaN there stays.
FFLFAST_INLINE FloatReg larger(FloatReg a, FloatReg b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

FFLFAST_INLINE DoubleReg larger(DoubleReg a, DoubleReg b) {
#if defined(__AVX512F__)
  return _mm512_max_pd(a, b);
#elif defined(__AVX2__)
  return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

// The nearest integer of a number below 2^21.
FFLFAST_INLINE FloatReg nearest(FloatReg x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (x + Vec<float>::kRounder) - Vec<float>::kRounder;
#endif
}

FFLFAST_INLINE DoubleReg nearest(DoubleReg x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (x + Vec<double>::kRounder) - Vec<double>::kRounder;
#endif
}

// x·2^n for an integer n that may lead into the subnormals; rounded once.
template <class A>
FFLFAST_INLINE typename Vec<A>::Reg scale(typename Vec<A>::Reg x, typename Vec<A>::Reg n) {
  typedef typename Vec<A>::Bits Bits;
  // The low bits of n + 1.5·2^mantissa are those of the integer. Two factors, as one would leave the exponent's range.
  const Bits i = (Bits)(n + Vec<A>::kRounder) - (Bits)set<A>(Vec<A>::kRounder);
  const Bits half = i >> 1, rest = i - half;
  const auto power = [](Bits k) {
    return (typename Vec<A>::Reg)((k + Vec<A>::kExponentBias) << Vec<A>::kMantissaBits);
  };
  return x * power(half) * power(rest);
}

#if defined(__AVX512F__)
template <>
FFLFAST_INLINE FloatReg scale<float>(FloatReg x, FloatReg n) {
  return _mm512_scalef_ps(x, n);
}
template <>
FFLFAST_INLINE DoubleReg scale<double>(DoubleReg x, DoubleReg n) {
  return _mm512_scalef_pd(x, n);
}
#endif

// sum + e·x, where e = 0 adds nothing whatever x is.
FFLFAST_INLINE FloatReg add_where_nonzero(FloatReg sum, FloatReg e, FloatReg x) {
#if defined(__AVX512F__)
  return _mm512_mask3_fmadd_ps(e, x, sum, _mm512_cmp_ps_mask(e, _mm512_setzero_ps(), _CMP_NEQ_UQ));
#else
  return fma(e, e != 0.0f ? x : FloatReg{}, sum);
#endif
}

FFLFAST_INLINE DoubleReg add_where_nonzero(DoubleReg sum, DoubleReg e, DoubleReg x) {
#if defined(__AVX512F__)
  return _mm512_mask3_fmadd_pd(e, x, sum, _mm512_cmp_pd_mask(e, _mm512_setzero_pd(), _CMP_NEQ_UQ));
#else
  return fma(e, e != 0.0 ? x : DoubleReg{}, sum);
#endif
}

// ---- a vector's own sum and maximum, always in one order ----------------------------------------------------------

// Folds a vector onto its first lane, half onto half.
template <class A, class Fold>
FFLFAST_INLINE A fold(typename Vec<A>::Reg v, const Fold& with) {
  typedef typename Vec<A>::Bits Bits;
  Bits lane{};
  for (int i = 0; i < Vec<A>::kWidth; ++i) lane[i] = i;
  for (int width = Vec<A>::kWidth / 2; width > 0; width /= 2) v = with(v, __builtin_shuffle(v, lane ^ width));
  return v[0];
}

template <class A>
FFLFAST_INLINE double sum_lanes(typename Vec<A>::Reg v) {
  return static_cast<double>(fold<A>(v, [](auto a, auto b) { return a + b; }));
}

template <class A>
FFLFAST_INLINE A max_lanes(typename Vec<A>::Reg v) {
  return fold<A>(v, [](auto a, auto b) { return larger(a, b); });
}

}  // namespace FFLFAST_ISA
}  // namespace fflfast
