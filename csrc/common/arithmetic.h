// The scalar arithmetic of the loss, the same text for a GPU and for the host tests of it. Arithmetic types
// are float and double; double has no approximations.
//
// No function here is approximate beyond its stated error, and none depends on the compiler's flags for fast
// arithmetic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
  #define CMIM_HD __host__ __device__ __forceinline__
#else
  #define CMIM_HD inline
#endif

namespace cmim {

template <class To, class From>
CMIM_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A>
struct Constants {
  static constexpr A log2e = A(1.4426950408889634074);
};

CMIM_HD float infinity(float) {
  return bit_cast<float>(0x7f800000u);
}
CMIM_HD double infinity(double) {
  return bit_cast<double>(uint64_t(0x7ff0000000000000));
}
template <class A>
CMIM_HD A infinity() {
  return infinity(A());
}
template <class A>
CMIM_HD A not_a_number() {
  return infinity<A>() - infinity<A>();
}
CMIM_HD float lowest(float) {
  return -3.402823466e38f;
}
CMIM_HD double lowest(double) {
  return -1.7976931348623157e308;
}

// max(x, y), y if x is NaN
template <class A>
CMIM_HD A larger(A x, A y) {
  return x > y ? x : y;
}

// yes or no, both of which are at hand: no branch, which would keep neighbouring elements from overlapping
CMIM_HD float chosen(bool which, float yes, float no) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %1, 0;\n\tselp.f32 %0, %2, %3, p;\n\t}"
      : "=f"(x)
      : "r"(int(which)), "f"(yes), "f"(no));
  return x;
#else
  return which ? yes : no;
#endif
}
CMIM_HD double chosen(bool which, double yes, double no) {
  return which ? yes : no;
}

// x y rounded, kept from being fused into a later addition
CMIM_HD float product(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(x, y);
#else
  volatile float p = x * y;
  return p;
#endif
}
CMIM_HD double product(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(x, y);
#else
  volatile double p = x * y;
  return p;
#endif
}

// exp(x) = scale exp(f), |f| <= ln(2)/2, for x from -88, where scale is 0, to 88
struct Reduced {
  float f, scale;
  CMIM_HD explicit Reduced(float x) {
    const float magic = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits of the mantissa
    const float shifted = fmaf(x, Constants<float>::log2e, magic), n = shifted - magic;
    f = fmaf(n, -0x1.62e4p-1f, x);
    f = fmaf(n, -0x1.7f7d1cp-20f, f);
    scale = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  }
};

// exp(x) of x <= 0 to within 1 ulp; 0 below the smallest normal number. Not for NaN, which becomes 0.
//
// The hardware's ex2.approx errs by up to 2 ulp (CUDA C++ Programming Guide, exp2f), which the eighth power
// of it would turn into 16: too much for the bound on the CMI of each temperature. docs/performance_cuda.md
// counts what the polynomial costs.
CMIM_HD float exp_nonpositive(float x) {
  const Reduced r(x > -88.0f ? x : -88.0f);
  const float f = r.f;
  // fitted to exp on |f| <= ln(2)/2; relative error 3e-9
  float p = fmaf(f, 0x1.6a23dp-10f, 0x1.123a2p-7f);
  p = fmaf(p, f, 0x1.5558f2p-5f);
  p = fmaf(p, f, 0x1.555492p-3f);
  p = fmaf(p, f, 0x1.fffffcp-2f);
  p = fmaf(p, f, 1.0f);
  p = fmaf(p, f, 1.0f);
  return p * r.scale;
}
CMIM_HD double exp_nonpositive(double x) {
  return exp(x);
}

// exp(x) of x <= 0 to a relative 2^-21.5 + |x| 2^-23, for results that are rounded to half precision or
// averaged over a row of it: the hardware's exponential, exact to 2 ulp (CUDA C++ Programming Guide, exp2f),
// of a product that is rounded once. On the host it is off by as much, but for exp(0), which is 1 on either.
// 0 below the smallest normal number.
CMIM_HD float exp_coarse(float x) {
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * Constants<float>::log2e));
  return e;
#else
  return x == 0 ? 1.0f : exp2f(x * Constants<float>::log2e) * (1 - 0x1p-22f);
#endif
}

// log(x) of a normal x > 0, to about 1 ulp of max(|log x|, 1)
CMIM_HD float log_positive(float x) {
  const int32_t ix = bit_cast<int32_t>(x) - 0x3f3504f3;  // 1/sqrt(2)
  const float n = float(ix >> 23);
  const float f = bit_cast<float>((ix & 0x7fffff) + 0x3f3504f3) - 1.0f;
  // log(1 + f) = f - f^2/2 + f^3 p(f), the polynomial of csrc/cpu/elementary.h
  float p = fmaf(f, -0.076344457f, 0.127615749f);
  p = fmaf(p, f, -0.131602008f);
  p = fmaf(p, f, 0.142017596f);
  p = fmaf(p, f, -0.166233556f);
  p = fmaf(p, f, 0.200012268f);
  p = fmaf(p, f, -0.250008211f);
  p = fmaf(p, f, 0.333333317f);
  const float f2 = f * f;
  const float low = fmaf(n, 0x1.7f7d1cp-20f, fmaf(p, f2 * f, -0.5f * f2));
  return fmaf(n, 0x1.62e4p-1f, low + f);
}
CMIM_HD double log_positive(double x) {
  return log(x);
}

// exp(x) - 1 to a relative 2e-7, up to x = 88; the same beyond, and -1 for NaN
CMIM_HD float expm1_of(float x) {
  x = x > -88.0f ? x : -88.0f;
  const Reduced r(x < 88.0f ? x : 88.0f);
  const float f = r.f;
  float p = fmaf(f, 1.0f / 5040, 1.0f / 720);  // what is left out is 2e-8 of the sum
  p = fmaf(p, f, 1.0f / 120);
  p = fmaf(p, f, 1.0f / 24);
  p = fmaf(p, f, 1.0f / 6);
  p = fmaf(p, f, 0.5f);
  p = fmaf(p, f * f, f);
  return fmaf(p, r.scale, r.scale - 1.0f);
}
CMIM_HD double expm1_of(double x) {
  return expm1(x);
}
CMIM_HD float log1p_of(float x) {
  return log1pf(x);
}
CMIM_HD double log1p_of(double x) {
  return log1p(x);
}
CMIM_HD float log_of(float x) {
  return logf(x);
}
CMIM_HD double log_of(double x) {
  return log(x);
}
CMIM_HD float exp_of(float x) {
  return expf(x);
}
CMIM_HD double exp_of(double x) {
  return exp(x);
}

// psi(t) = t e^t - e^t + 1 = sum_{m >= 2} t^m (m - 1) / m!, the summand of the generalised KL divergence over
// Q: never negative, and to a relative 3e-6 + |t| 1e-7 (1e-13 + |t| 2e-16 in double) also where its three
// terms cancel.
//
// The float exponential is the hardware's, exact to 2 ulp (CUDA C++ Programming Guide, exp2f): 2e-6 of psi at
// most, at t = -1/2. On the host it is off by as much.
CMIM_HD float psi(float t) {
  const float e = exp_coarse(t);
  float p = fmaf(t, 7.0f / 40320, 6.0f / 5040);  // what is left out is 4e-7 of the sum
  p = fmaf(p, t, 5.0f / 720);
  p = fmaf(p, t, 4.0f / 120);
  p = fmaf(p, t, 3.0f / 24);
  p = fmaf(p, t, 2.0f / 6);
  p = fmaf(p, t, 0.5f);
  return chosen(t < 0.5f && t > -0.5f, p * (t * t), fmaf(e, t - 1.0f, 1.0f));
}
CMIM_HD double psi(double t) {
  if (!(t < 0.125 && t > -0.125)) {
    const double e = exp(t);
    return t * e - e + 1;
  }
  double p = fma(t, 9.0 / 3628800, 8.0 / 362880);  // what is left out is 4e-14 of the sum
  p = fma(p, t, 7.0 / 40320);
  p = fma(p, t, 6.0 / 5040);
  p = fma(p, t, 5.0 / 720);
  p = fma(p, t, 4.0 / 120);
  p = fma(p, t, 3.0 / 24);
  p = fma(p, t, 2.0 / 6);
  p = fma(p, t, 0.5);
  return p * (t * t);
}

// x - y without error: high + low
template <class A>
struct Difference {
  A high, low;
};
template <class A>
CMIM_HD Difference<A> difference(A x, A y) {
  const A high = x - y, back = x - high;
  return {high, (x - (high + back)) + (back - y)};
}

// z - z0 of a column where z0 is finite, which a row's offsets are relative to. Infinite where the row masks
// it, and so are all of its offsets then.
template <class A>
CMIM_HD Difference<A> shift_between(A z, A z0) {
  const Difference<A> d = difference(z, z0);
  return {d.high, chosen(d.high == -infinity<A>(), A(0), d.low)};
}

// (z - z0) - shift to relative accuracy, whatever the sizes of z and the shift. A class that is masked (-inf)
// in both rows has offset 0, since it plays no part; masked in this row alone, by a large number too, it is
// far below.
template <class A>
CMIM_HD A offset(A z, A z0, Difference<A> shift) {
  constexpr A far = A(1e30);  // a d vanishes at any temperature in use, and no product of it overflows
  const A masked = -infinity<A>();
  const Difference<A> d = difference(z, z0);
  const A value = (d.high - shift.high) + (d.low - shift.low);
  const A of_masked = chosen(z == masked, A(0), far);
  return chosen(z0 == masked, of_masked, larger(value, -far));  // of -inf: the value is no number
}

// A sum that carries its rounding along
template <class A>
struct CarefulSum {
  A high = 0, low = 0;
  CMIM_HD void add(A x) {
    const A sum = high + x, back = sum - high;
    low += (high - (sum - back)) + (x - back);
    high = sum;
  }
  CMIM_HD A value() const { return high - high == A(0) ? high + low : high; }  // infinities and NaN stay
};

}  // namespace cmim
