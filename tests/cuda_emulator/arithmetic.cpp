// csrc/common/arithmetic.h and the conversions of csrc/cuda/data.cuh, over arrays, for
// tests/test_cuda_arithmetic.py
#include "common/arithmetic.h"

#include <cstddef>

#include "cuda/data.cuh"

namespace {

template <class A, class F>
void each(size_t n, const A* x, A* out, F f) {
  for (size_t i = 0; i < n; ++i) out[i] = f(x[i]);
}

template <class A>
void differences(size_t n, const A* x, const A* y, A* high, A* low) {
  for (size_t i = 0; i < n; ++i) {
    const auto d = cmim::difference(x[i], y[i]);
    high[i] = d.high, low[i] = d.low;
  }
}

// offset of z[i] from z0[i], where the largest column has the logits zj[i] and zj0[i]
template <class A>
void offsets(size_t n, const A* z, const A* z0, const A* zj, const A* zj0, A* out) {
  for (size_t i = 0; i < n; ++i) out[i] = cmim::offset(z[i], z0[i], cmim::shift_between(zj[i], zj0[i]));
}

template <class A>
A sum(size_t n, const A* x) {
  cmim::CarefulSum<A> s;
  for (size_t i = 0; i < n; ++i) s.add(x[i]);
  return s.value();
}

}  // namespace

#define CMIM_FUNCTION(name, suffix, A, call)                      \
  extern "C" void name##_##suffix(size_t n, const A* x, A* out) { \
    each(n, x, out, [](A v) { return cmim::call; });              \
  }
#define CMIM_FUNCTIONS(suffix, A)                                                                          \
  CMIM_FUNCTION(exp_nonpositive, suffix, A, exp_nonpositive(v))                                            \
  CMIM_FUNCTION(log_positive, suffix, A, log_positive(v))                                                  \
  CMIM_FUNCTION(psi, suffix, A, psi(v))                                                                    \
  CMIM_FUNCTION(expm1_of, suffix, A, expm1_of(v))                                                          \
  CMIM_FUNCTION(chosen, suffix, A, chosen(v > A(0), v, A(-1)))                                             \
  CMIM_FUNCTION(larger_than_one, suffix, A, larger(v, A(1)))                                               \
  CMIM_FUNCTION(third, suffix, A, product(v, A(1) / A(3)) - v / A(3))                                      \
  extern "C" void differences_##suffix(size_t n, const A* x, const A* y, A* high, A* low) {                \
    differences(n, x, y, high, low);                                                                       \
  }                                                                                                        \
  extern "C" void offsets_##suffix(size_t n, const A* z, const A* z0, const A* zj, const A* zj0, A* out) { \
    offsets(n, z, z0, zj, zj0, out);                                                                       \
  }                                                                                                        \
  extern "C" A sum_##suffix(size_t n, const A* x) {                                                        \
    return sum(n, x);                                                                                      \
  }
CMIM_FUNCTIONS(f32, float)
CMIM_FUNCTION(exp_coarse, f32, float, exp_coarse(v))
CMIM_FUNCTIONS(f64, double)

extern "C" void to_bf16(size_t n, const float* x, uint16_t* out) {
  for (size_t i = 0; i < n; ++i) out[i] = cmim::cuda::float_to_bf16(x[i]);
}
extern "C" void from_bf16(size_t n, const uint16_t* x, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = cmim::cuda::bf16_to_float(x[i]);
}
