// exp and log of a vector, accurate to about one unit in the last place over the range the kernel needs.
// The polynomials were fitted for this file by Lawson iteration (float) or are truncated Taylor series
// (double); their relative errors: exp 3e-9 / 4e-18, log 9e-9 / 1e-17.
//
// Where every temperature takes an exponential of its own, float computes in base 2: kLog2 is what inverse
// temperatures are multiplied by there, and logarithms and t are in bits.
#pragma once

#include "several.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

#if defined(__AVX512F__)
// The masked forms of instructions, with every lane wanted: gcc 12 warns of its own headers in the others.
constexpr __mmask16 kAll = 0xffff;
#endif

template <class T>
constexpr T kSmallestNormal = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);

// exp(x) is smaller than that at this x and below. Exponentials are those of the larger of x and this, whose
// result in the arithmetic here, 2^-127 or 2^-1023 times a number between one and two, is a subnormal number.
template <class T>
constexpr T kVanishes = sizeof(T) == 4 ? T(-87.95) : T(-708.9);

// y >= 0, with zero in place of subnormal numbers: by itself only where FlushSubnormals does not have the
// processor read them as zeros
template <class V>
CMIM_INLINE V flushed(V y) {
#if defined(__x86_64__)
  return y;
#else
  return y < kSmallestNormal<typename LaneOf<V>::type> ? V{} : y;
#endif
}

// 2^n p for p near 1, with n in the lowest bits of the mantissa of `shifted`
template <class T>
CMIM_INLINE Vec<T> times_power_of_two(Vec<T> p, Vec<T> shifted) {
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52;
  return flushed(bits<Vec<T>>(bits<Unsigned<T>>(p) + (bits<Unsigned<T>>(shifted) << kMantissa)));
}

// exp(x) for -1e6 <= x <= 0 (a little above is fine) and for -inf; 0 below the smallest normal number; NaN
// for NaN.
#if defined(__AVX512F__)
CMIM_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  const Vec<float> n = _mm512_maskz_roundscale_ps(kAll, x * 0x1.715476p0f, _MM_FROUND_TO_NEAREST_INT);
  // Log 2 rounded to a float makes this the exponential of 1.000000003 x, for every x alike.
  const Vec<float> r = x - n * 0x1.62e430p-1f;
  Vec<float> p = r * 0x1.6db4e6p-10f + 0x1.123be0p-7f;
  p = p * r + 0x1.55545ep-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // What would be subnormal is flushed, as the kernel has the processor do. With n = -inf this is 0 whatever
  // p.
  return _mm512_maskz_scalef_ps(kAll, p, n);
}
#else
template <class V, OnlyOf<V, float> = 0>
CMIM_INLINE V exp_nonpositive(const V& x) {
  const float magic = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits of the mantissa
  const V y = at_least(x, kVanishes<float>);
  const V shifted = y * 0x1.715476p0f + magic;
  const V n = shifted - magic;
  V r = y - n * 0x1.62e4p-1f;
  r = r - n * 0x1.7f7d1cp-20f;
  V p = r * 0x1.6db4e6p-10f + 0x1.123be0p-7f;
  p = p * r + 0x1.55545ep-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  return map<float>([](auto shifted, auto p)
                        CMIM_INLINE_LAMBDA { return times_power_of_two<float>(p, shifted); },
                    shifted, p);
}
#endif
// kTerms: of the Taylor series from the quadratic one on; 7 for a relative error of 3e-10
template <int kTerms = 12, class V, OnlyOf<V, double> = 0>
CMIM_INLINE V exp_nonpositive(const V& x) {
  const double magic = 0x1.8p52;
  const V y = at_least(x, kVanishes<double>);
  const V shifted = y * 0x1.71547652b82fep0 + magic;
  const V n = shifted - magic;
  V r = y - n * 0x1.62e42fee00000p-1;
  r = r - n * 0x1.a39ef35793c76p-33;
  constexpr double inverse_factorial[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                          1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                          1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
  V p = r * inverse_factorial[kTerms - 1] + inverse_factorial[kTerms - 2];
  for (int m = kTerms - 3; m >= 0; --m) p = p * r + inverse_factorial[m];
  p = p * (r * r) + r + 1.0;
  return map<double>([](auto shifted, auto p)
                         CMIM_INLINE_LAMBDA { return times_power_of_two<double>(p, shifted); },
                     shifted, p);
}
// The same for any x <= 0
template <class V>
CMIM_INLINE V exp_of_any(const V& x) {
#if defined(__AVX512F__)
  return exp_nonpositive(at_least(x, kVanishes<typename LaneOf<V>::type>));
#else
  return exp_nonpositive(x);
#endif
}

template <class T>
constexpr double kLog2 = sizeof(T) == 4 ? 1.4426950408889634 : 1.0;

// exp(a x / kLog2<T>), for several x or several a or one of each: in float, 2^(a x), which takes fewer
// instructions than exp of a product and does not round it. The same domain. least: the x where that
// vanishes, kVanishes<T> kLog2<T> / a.
#if defined(__AVX512F__)
alignas(64) constexpr float kRootsOfTwo[16] = {
    0x1p0f,         0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fep+0f,  0x1.3dea64p+0f,
    0x1.4bfdaep+0f, 0x1.5ab07ep+0f, 0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
    0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f,
};
CMIM_INLINE Vec<float> exp_scaled(Vec<float> x, float a, float) {
  // a x = n + f, |f| <= 1/32: the lowest four bits of n, which counts sixteenths, choose its root of two. One
  // register holds them all; with the wider range of a polynomial alone, three terms more are needed.
  const float magic = 0x1.8p19f;
  const Vec<float> shifted = x * a + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> f = x * a - n;
  const Vec<float> root =
      _mm512_maskz_permutexvar_ps(kAll, bits<__m512i>(shifted), load<Vec<float>>(kRootsOfTwo));
  Vec<float> p = f * 0x1.c6ac6ap-5f + 0x1.ebfff4p-3f;
  p = p * f + 0x1.62e43p-1f;
  return _mm512_maskz_scalef_ps(kAll, p * (root * f) + root, n);  // which rounds n down
}
#else
template <class V, class A, OnlyOf<V, float> = 0>
CMIM_INLINE auto exp_scaled(const V& x, const A& a, const A& least) {
  const float magic = 0x1.8p23f;
  const auto y = at_least(x, least);
  const auto shifted = y * a + magic;
  const auto n = shifted - magic;
  const auto f = y * a - n;
  auto p = f * 0x1.416b5cp-13f + 0x1.5f0830p-10f;
  p = p * f + 0x1.3b2de0p-7f;
  p = p * f + 0x1.c6af7cp-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  return map<float>([](auto shifted, auto p)
                        CMIM_INLINE_LAMBDA { return times_power_of_two<float>(p, shifted); },
                    shifted, p);
}
#endif
template <class V, class A, OnlyOf<V, double> = 0>
CMIM_INLINE auto exp_scaled(const V& x, const A& a, const A&) {
  return exp_nonpositive(a * x);
}

// log(x), with kBits its binary logarithm, for normal x > 0; NaN for NaN; of no meaning for zero and
// subnormal x.
#if defined(__AVX512F__)
// x = 2^e m with 3/4 <= m < 3/2, and five bits of it choose c near 1/m: log x = e log 2 - log c + log1p(m c -
// 1). The c were searched for numbers whose logarithm is a float to 1e-11; those on both sides of m = 1 are
// 1, so that the error is relative there too.
alignas(64) constexpr float kNearInverse[32] = {
    // of the mantissa, which is 2 m from the sixteenth on
    0x1p0f,         0x1.e9108ap-1f, 0x1.dae26cp-1f, 0x1.cd9256p-1f, 0x1.c0f664p-1f, 0x1.b4f388p-1f,
    0x1.a9885ep-1f, 0x1.9ec00ap-1f, 0x1.94a16p-1f,  0x1.8ad852p-1f, 0x1.8193acp-1f, 0x1.78a7f4p-1f,
    0x1.702518p-1f, 0x1.680344p-1f, 0x1.6062bep-1f, 0x1.58fe2p-1f,  0x1.51e5bap-1f, 0x1.4b0196p-1f,
    0x1.445d44p-1f, 0x1.3e2198p-1f, 0x1.38289ep-1f, 0x1.3242a8p-1f, 0x1.2cb5a4p-1f, 0x1.27364ap-1f,
    0x1.220812p-1f, 0x1.1ce7d8p-1f, 0x1.181988p-1f, 0x1.135bb2p-1f, 0x1.0eb8cep-1f, 0x1.0a5ffep-1f,
    0x1.062a52p-1f, 0x1p-1f,
};
alignas(64) constexpr float kMinusLog[32] = {
    0.0f,
    0x1.777088p-5f,
    0x1.343c96p-4f,
    0x1.a8b41ap-4f,
    0x1.0d13c2p-3f,
    0x1.449d2ap-3f,
    0x1.7ad84cp-3f,
    0x1.af6864p-3f,
    0x1.e1ff84p-3f,
    0x1.0a113ap-2f,
    0x1.2263ep-2f,
    0x1.3a5c26p-2f,
    0x1.51c3aep-2f,
    0x1.68a33ap-2f,
    0x1.7e908cp-2f,
    0x1.9446d4p-2f,
    -0x1.1c39fp-2f,
    -0x1.07206ep-2f,
    -0x1.e4bdaap-3f,
    -0x1.bd00b6p-3f,
    -0x1.963036p-3f,
    -0x1.6f1eecp-3f,
    -0x1.49a94p-3f,
    -0x1.23dfb4p-3f,
    -0x1.ff3b0ep-4f,
    -0x1.b63148p-4f,
    -0x1.708294p-4f,
    -0x1.2a9442p-4f,
    -0x1.ca0d78p-5f,
    -0x1.4572acp-5f,
    -0x1.85e754p-6f,
    0.0f,
};
template <bool kBits = false>
CMIM_INLINE Vec<float> log_positive(Vec<float> x, float offset = 0) {
  const __m512i bin = _mm512_maskz_srli_epi32(kAll, bits<__m512i>(x), 18);  // the lowest five bits count
  const Vec<float> c =
      _mm512_permutex2var_ps(load<Vec<float>>(kNearInverse), bin, load<Vec<float>>(kNearInverse + 16));
  const Vec<float> l =
      _mm512_permutex2var_ps(load<Vec<float>>(kMinusLog), bin, load<Vec<float>>(kMinusLog + 16));
  const Vec<float> mantissa = _mm512_maskz_getmant_ps(kAll, x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  const Vec<float> e = _mm512_maskz_getexp_ps(kAll, x * 0x1.555556p0f);  // 4/3 rounded up
  const Vec<float> r = mantissa * c - 1.0f;                              // in [-1/64, 1/32]
  Vec<float> p = r * -0x1.f3ac00p-3f + 0x1.555dfcp-2f;
  p = p * r - 0x1.000028p-1f;
  const Vec<float> rest = l + (p * (r * r) + r);
  if constexpr (kBits) return rest * float(kLog2<float>) + (e + offset);
  return (e * 0x1.62e4p-1f + offset) + (e * 0x1.7f7d1cp-20f + rest);
}
#else
// of x = 2^n (1 + f), as it stands in a float's bits
CMIM_INLINE Unsigned<float> exponent_of(Vec<float> x) {
  return (bits<Unsigned<float>>(x) - 0x3f3504f3u) & 0xff800000u;  // 1/sqrt(2)
}
template <bool kBits = false, class V, OnlyOf<V, float> = 0, class B = float>
CMIM_INLINE V log_positive(const V& x, const B& offset = 0) {
  const V f = map<float>(
      [](auto x)
          CMIM_INLINE_LAMBDA { return bits<Vec<float>>(bits<Unsigned<float>>(x) - exponent_of(x)) - 1.0f; },
      x);
  const V n = map<float>(  // 2^23 times as large
      [](auto x) CMIM_INLINE_LAMBDA {
        return __builtin_convertvector(bits<Int<float>>(exponent_of(x)), Vec<float>);
      },
      x);
  V p = f * -0.076344457f + 0.127615749f;
  p = p * f + -0.131602008f;
  p = p * f + 0.142017596f;
  p = p * f + -0.166233556f;
  p = p * f + 0.200012268f;
  p = p * f + -0.250008211f;
  p = p * f + 0.333333317f;
  const V f2 = f * f;
  p = p * f - 0.5f;
  const V y = kBits ? (p * f2 + f) * float(kLog2<float>) + (n * 0x1p-23f + offset)
                    : (p * f2 + n * 0x1.7f7d1cp-43f + f) + (n * 0x1.62e4p-24f + offset);
  return y + x * 0.0f;  // carries a NaN through
}
#endif
constexpr uint64_t kHalfRoot = 0x3fe6a09e667f3bcd;  // 1/sqrt(2)
CMIM_INLINE Unsigned<double> bits_from_half_root(Vec<double> x) {
  return bits<Unsigned<double>>(x) + (uint64_t(1023) << 52) - kHalfRoot;
}
// kTerms: of the series; 5 for an error of 2e-11
template <bool kBits = false, int kTerms = 11, class V, OnlyOf<V, double> = 0, class B = double>
CMIM_INLINE V log_positive(const V& x, const B& offset = 0) {
  static_assert(!kBits, "double computes in base e throughout");
  // The exponent, 1023 more than it is and so never negative, as the low bits of 2^52: few processors convert
  // 64-bit integers.
  const V n = map<double>(
      [](auto x) CMIM_INLINE_LAMBDA {
        return bits<Vec<double>>((bits_from_half_root(x) >> 52) | (uint64_t(1023 + 52) << 52)) -
               (0x1p52 + 1023);
      },
      x);
  const V f = map<double>(
      [](auto x) CMIM_INLINE_LAMBDA {
        return bits<Vec<double>>((bits_from_half_root(x) & 0xfffffffffffff) + kHalfRoot) - 1.0;
      },
      x);
  const V s = f / (f + 2.0), s2 = s * s;  // log(1 + f) = 2 atanh(s) = f - s (f - R(s^2))
  V p = s2 * (2.0 / (2 * kTerms + 1)) + 2.0 / (2 * kTerms - 1);
  for (int odd = 2 * kTerms - 3; odd >= 3; odd -= 2) p = p * s2 + 2.0 / odd;
  const V low = n * 0x1.a39ef35793c76p-33 - s * (f - p * s2);
  return (low + f) + (n * 0x1.62e42fee00000p-1 + offset) + x * 0.0;
}

// psi(t) = t e^t - e^t + 1 = sum_{m >= 2} t^m (m - 1) / m!, the summand of the generalised KL divergence over
// Q: a polynomial for |t| <= 1/8, where the closed form would cancel. ratio = e^t.
CMIM_INLINE Vec<double> psi(Vec<double> t, Vec<double> ratio) {
  Vec<double> p = splat(9.0 / 3628800);
  constexpr double c[] = {8.0 / 362880, 7.0 / 40320, 6.0 / 5040, 5.0 / 720,
                          4.0 / 120,    3.0 / 24,    2.0 / 6,    1.0 / 2};
  for (double k : c) p = p * t + k;
  const Vec<double> near = p * (t * t), far = ratio * t - ratio + 1.0;
  return ((t < 0.125) & (t > -0.125)) ? near : far;
}

// The remaining functions serve clusters that have nearly collapsed, where everything is small.

// exp(x) - 1 for |x| <= 0.005 with 2 as the order, 0.07 with 4, 1.05 with 8, as of psi_ratio
template <int kOrder = 8, class V>
CMIM_INLINE V expm1_small(const V& x) {
  V p;
  if constexpr (kOrder == 2) {  // Taylor series: what is left out is x^3/24 and x^4/120 of the result
    p = x * 0.0416666667f + 0.166666667f;
  } else if constexpr (kOrder == 4) {
    p = x * 0.00833333333f + 0.0416666667f;
    p = p * x + 0.166666667f;
  } else {
    p = x * 2.7570751e-06f + 2.54742057e-05f;
    p = p * x + 0.000198490944f;
    p = p * x + 0.00138835356f;
    p = p * x + 0.00833326571f;
    p = p * x + 0.0416668198f;
    p = p * x + 0.166666681f;
  }
  p = p * x + 0.5f;
  return p * (x * x) + x;
}

// log(1 + f) for -0.42 <= f <= 0.7
template <class V>
CMIM_INLINE V log1p_small(const V& f) {
  V p = f * -0.0406498491f + 0.1093682f;
  p = p * f - 0.130151417f;
  p = p * f + 0.115669035f;
  p = p * f - 0.119714728f;
  p = p * f + 0.141415391f;
  p = p * f - 0.167022056f;
  p = p * f + 0.200111735f;
  p = p * f - 0.24999196f;
  p = p * f + 0.333330994f;
  const V f2 = f * f;
  return (p * f - 0.5f) * f2 + f;
}

// psi(t) / (t e^t) = (t - 1 + e^-t) / t, so that psi's sum over Q is one over P t: |t| <= 0.02 with 2 as the
// order, 0.3 with 4, 1.5 with 8
template <int kOrder, class V>
CMIM_INLINE V psi_ratio(const V& t) {
  V p;
  if constexpr (kOrder == 2) {  // the Taylor series; what is left out is t^3/60 of the sum
    p = t * 0.0416666667f - 0.166666667f;
    p = p * t + 0.5f;
  } else if constexpr (kOrder == 4) {
    p = t * 0.00138981777f - 0.00835566469f;
    p = p * t + 0.0416667715f;
    p = p * t - 0.166666165f;
    p = p * t + 0.5f;
  } else {
    p = t * 2.79027937e-07f - 2.88356413e-06f;
    p = p * t + 2.48159154e-05f;
    p = p * t - 0.000198199448f;
    p = p * t + 0.00138885508f;
    p = p * t - 0.00833346361f;
    p = p * t + 0.0416666847f;
    p = p * t - 0.166666645f;
    p = p * t + 0.5f;
  }
  return p * t;
}

}  // namespace
}  // namespace cmim::cpu
