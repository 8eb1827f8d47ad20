// The scalar arithmetic of the loss, the same text for a GPU and for the host tests of it. Arithmetic types
// are float and double; double has no approximations.
//
// On a GPU two float functions are approximate instructions, with the error bounds of the CUDA C++
// Programming Guide (mathematical functions, intrinsics): exp2_approx, ex2.approx.ftz, 2 ulp over the full
// range; results below 2^-126 are flushed to 0. Nothing else is. On the host exp2_approx is exact to rounding
// and then moved by a pseudo-random part of 2 ulp, so that what the host tests accept does not rest on luck.
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
  static constexpr A log2e = A(1.4426950408889634074), ln2 = A(0.69314718055994530942);
};

CMIM_HD float infinity(float) { return bit_cast<float>(0x7f800000u); }
CMIM_HD double infinity(double) { return bit_cast<double>(uint64_t(0x7ff0000000000000)); }
template <class A>
CMIM_HD A infinity() {
  return infinity(A());
}
template <class A>
CMIM_HD A not_a_number() {
  return infinity<A>() - infinity<A>();
}
CMIM_HD float lowest(float) { return -3.402823466e38f; }
CMIM_HD double lowest(double) { return -1.7976931348623157e308; }

// max(x, y), y if x is NaN
template <class A>
CMIM_HD A larger(A x, A y) {
  return x > y ? x : y;
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

CMIM_HD float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  if (!(y >= 0x1p-126f)) return y != y ? y : 0.0f;
  uint32_t h = bit_cast<uint32_t>(x) * 0x9e3779b1u;  // a hash of the argument
  h = (h ^ (h >> 15)) * 0x85ebca77u;
  h ^= h >> 13;
  // exact where the instruction is: at integers
  const float off = x == std::floor(x) ? 0.0f : (float(h >> 8) * 0x1p-23f - 1.0f) * 0x1p-22f;
  return float(double(y) * (1.0 + double(off)));
#endif
}
CMIM_HD double exp2_approx(double x) { return exp2(x); }

// 2^x to within 1 ulp; 0 below 2^-126
CMIM_HD float exp2_careful(float x) {
  if (!(x > -126.0f)) return x != x ? x : 0.0f;
  if (x >= 128.0f) return infinity<float>();
  const float n = rintf(x), f = x - n;  // exact
  // a truncated series of exp(f ln 2), |f| <= 1/2: 2e-9 relative
  float p = fmaf(f, 1.5252734e-5f, 1.5403530e-4f);
  p = fmaf(p, f, 1.3333558e-3f);
  p = fmaf(p, f, 9.6181291e-3f);
  p = fmaf(p, f, 5.5504109e-2f);
  p = fmaf(p, f, 2.4022651e-1f);
  p = fmaf(p, f, 6.9314718e-1f);
  p = fmaf(p, f, 1.0f);
  const int half = int(n) / 2;  // in two steps: 2^n itself may be out of range
  const float scale = bit_cast<float>(uint32_t(half + 127) << 23);
  return p * scale * bit_cast<float>(uint32_t(int(n) - half + 127) << 23);
}
CMIM_HD double exp2_careful(double x) { return exp2(x); }

// log2(x) of a normal x > 0, to about 1 ulp of max(|log2 x|, 1)
CMIM_HD float log2_positive(float x) {
  const int32_t ix = bit_cast<int32_t>(x) - 0x3f3504f3;  // 1/sqrt(2)
  const float n = float(ix >> 23);
  const float f = bit_cast<float>((ix & 0x7fffff) + 0x3f3504f3) - 1.0f;
  // ln(1 + f) = f - f^2/2 + f^3 p(f), the polynomial of csrc/cpu/elementary.h
  float p = fmaf(f, -0.076344457f, 0.127615749f);
  p = fmaf(p, f, -0.131602008f);
  p = fmaf(p, f, 0.142017596f);
  p = fmaf(p, f, -0.166233556f);
  p = fmaf(p, f, 0.200012268f);
  p = fmaf(p, f, -0.250008211f);
  p = fmaf(p, f, 0.333333317f);
  const float f2 = f * f;
  const float low = fmaf(p, f2 * f, -0.5f * f2);
  return fmaf(low, Constants<float>::log2e, fmaf(f, Constants<float>::log2e, n));
}
CMIM_HD double log2_positive(double x) { return log2(x); }

CMIM_HD float expm1_of(float x) { return expm1f(x); }
CMIM_HD double expm1_of(double x) { return expm1(x); }
CMIM_HD float log1p_of(float x) { return log1pf(x); }
CMIM_HD double log1p_of(double x) { return log1p(x); }
CMIM_HD float log_of(float x) { return logf(x); }
CMIM_HD double log_of(double x) { return log(x); }
CMIM_HD float exp_of(float x) { return exp2_approx(x * Constants<float>::log2e); }
CMIM_HD double exp_of(double x) { return exp(x); }

// psi(t) = t e^t - e^t + 1 = sum_{m >= 2} t^m (m - 1) / m!, the summand of the generalised KL divergence over
// Q: never negative, and to relative accuracy also where its three terms cancel.
template <class A>
CMIM_HD A psi(A t) {
  constexpr A near = sizeof(A) == 4 ? A(0.5) : A(0.125);
  if (!(t < near && t > -near)) {
    const A e = exp_of(t);
    return t * e - e + A(1);
  }
  // the first term left out is 2e-8 of the sum in float, 5e-15 in double
  A p = A(8.0 / 362880);
  p = fma(p, t, A(7.0 / 40320));
  p = fma(p, t, A(6.0 / 5040));
  p = fma(p, t, A(5.0 / 720));
  p = fma(p, t, A(4.0 / 120));
  p = fma(p, t, A(3.0 / 24));
  p = fma(p, t, A(2.0 / 6));
  p = fma(p, t, A(0.5));
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

// (z - z0) - shift to relative accuracy, whatever the sizes of z and the shift. A class that is masked (-inf)
// in both rows has offset 0, since it plays no part; masked in this row alone it is far below.
template <class A>
CMIM_HD A offset(A z, A z0, Difference<A> shift) {
  constexpr A far = A(1e4);
  const A masked = -infinity<A>();
  if (z0 == masked) return z == masked ? A(0) : far;
  if (z == masked) return -far;
  const Difference<A> d = difference(z, z0);
  return (d.high - shift.high) + (d.low - shift.low);
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
  CMIM_HD A value() const { return high + low; }
};

}  // namespace cmim
