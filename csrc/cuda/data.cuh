// Reading logits in any storage and stride, and writing gradients.
#pragma once

#include "device.h"

namespace cmim::cuda {

__device__ inline float bf16_to_float(uint16_t bits) {
  return bit_cast<float>(uint32_t(bits) << 16);
}
__device__ inline uint16_t float_to_bf16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return uint16_t(0x7fff);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);  // to nearest, ties to even
}
__device__ inline float f16_to_float(uint16_t bits) {
#if defined(CMIM_EMULATED)
  return emulated_half_to_float(bits);
#else
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#endif
}
__device__ inline uint16_t float_to_f16(float x) {
#if defined(CMIM_EMULATED)
  return emulated_float_to_half(x);
#else
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#endif
}

__device__ inline float widen(float x, Storage) {
  return x;
}
__device__ inline double widen(double x, Storage) {
  return x;
}
__device__ inline float widen(Half16 x, Storage s) {
  return s == Storage::bf16 ? bf16_to_float(x.bits) : f16_to_float(x.bits);
}
__device__ inline void narrow(float x, Storage, float& to) {
  to = x;
}
__device__ inline void narrow(double x, Storage, double& to) {
  to = x;
}
__device__ inline void narrow(float x, Storage s, Half16& to) {
  to.bits = s == Storage::bf16 ? float_to_bf16(x) : float_to_f16(x);
}

// kVector elements of S, moved as one or two machine words
template <class S>
struct alignas(sizeof(S) * kVector > 16 ? 16 : sizeof(S) * kVector) Vector {
  S at[kVector];
};

template <class S, class A>
__device__ inline void widen(const Vector<S>& v, Storage, A (&z)[kVector]) {
#pragma unroll
  for (int u = 0; u < kVector; ++u) z[u] = v.at[u];
}
__device__ inline void widen(const Vector<Half16>& v, Storage s, float (&z)[kVector]) {
  if (s == Storage::bf16) {
#pragma unroll
    for (int u = 0; u < kVector; ++u) z[u] = bf16_to_float(v.at[u].bits);
  } else {
#pragma unroll
    for (int u = 0; u < kVector; ++u) z[u] = f16_to_float(v.at[u].bits);
  }
}

// kVector numbers at a 16-byte boundary
template <class A>
__device__ inline void load_four(const A* from, A (&v)[kVector]) {
  const Vector<A> four = *reinterpret_cast<const Vector<A>*>(from);
#pragma unroll
  for (int u = 0; u < kVector; ++u) v[u] = four.at[u];
}
template <class A>
__device__ inline void store_four(A* to, const A (&v)[kVector]) {
  Vector<A> four;
#pragma unroll
  for (int u = 0; u < kVector; ++u) four.at[u] = v[u];
  *reinterpret_cast<Vector<A>*>(to) = four;
}

// A row of S: where it is and how it may be read. `width` columns exist in it.
template <class S>
struct Row {
  const S* data;
  int64_t stride;
  int width;
  bool vector;  // stride 1, and aligned at every multiple of kVector
};

// Columns j .. j + 3, -inf where there is none
template <class S, class A>
__device__ inline void load_vector(const Row<S>& row, int j, Storage storage, A (&z)[kVector]) {
  if (row.vector && j + kVector <= row.width) {
    widen(*reinterpret_cast<const Vector<S>*>(row.data + j), storage, z);
  } else {
    const S* at = row.data + j * row.stride;
#pragma unroll
    for (int u = 0; u < kVector; ++u, at += row.stride)
      z[u] = j + u < row.width ? widen(*at, storage) : -infinity<A>();
  }
}

// g to columns j .. j + 3 of a contiguous row
template <class S, class A>
__device__ inline void store_vector(S* row, int j, int width, bool vector, Storage storage,
                                    const A (&g)[kVector]) {
  if (vector && j + kVector <= width) {
    Vector<S> v;
#pragma unroll
    for (int u = 0; u < kVector; ++u) narrow(g[u], storage, v.at[u]);
    *reinterpret_cast<Vector<S>*>(row + j) = v;
  } else {
#pragma unroll
    for (int u = 0; u < kVector; ++u)
      if (j + u < width) narrow(g[u], storage, row[j + u]);
  }
}

// The powers exp(a_k x) of consecutive temperatures, x <= 0
template <class A, bool kChain>
struct Powers;

template <class A>
struct Powers<A, true> {
  A y, base, now;
  __device__ void start(const Problem<A>& q, A x, int k0) { start(q, x, k0, exp_nonpositive(x * q.unit)); }
  // The same where exp(unit x) is known
  __device__ void start(const Problem<A>& q, A x, int k0, A first) {
    y = x * q.unit;
    base = first;
    now = q.multiple[k0] == A(1) ? base : exp_nonpositive(q.multiple[k0] * y);
  }
  __device__ A power(const Problem<A>&, int) const { return now; }
  __device__ void next() { now *= base; }
  // a_k x - other, with the y whose power this is
  __device__ A exponent_less(const Problem<A>& q, int k, A other) const {
    return fma(q.multiple[k], y, -other);
  }
};

template <class A>
struct Powers<A, false> {
  A x;
  __device__ void start(const Problem<A>&, A logit, int) { x = logit; }
  __device__ A power(const Problem<A>& q, int k) const { return exp_nonpositive(product(q.a[k], x)); }
  __device__ void next() {}
  __device__ A exponent_less(const Problem<A>& q, int k, A other) const { return product(q.a[k], x) - other; }
};

}  // namespace cmim::cuda
