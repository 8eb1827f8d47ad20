// The ways to compute a class, as the operations that cluster.cuh and gradient.cuh put together. Each works
// on one row of the batch and kVector neighbouring columns.
//
// Plain, for temperatures at which the rows differ visibly. x = z - top, L = log sum_j exp(a x):
//   P = exp(a x - L)
//   mean_term = scale P           scale = the mean of exp(L), which keeps the numbers near 1
//   table = log(mean P) + log scale
//   t' = a x - table = log(P/Q) + (L - log scale): a constant of the row off, which cancels in P (t - KL)
//
// Centred, for those at which the class has collapsed and t is far smaller than the rounding of logits. z0 is
// the class's first row, P0 its softmax, and j0 its largest entry:
//   d = (z - z0) - (z[j0] - z0[j0])    by error-free differences; 0 at j0, so that nothing cancels where one
//                                      entry carries all of the probability
//   v = expm1(a d)    s = sum_j P0 v   so that P = P0 (1 + v) / (1 + s);  growth = log1p(s)
//   mean_term = P/P0 - 1 = (v - s)/(1 + s)
//   table = log1p(mean of these) = log(Q/P0), and a second table Q
//   t = log(P/Q) = a d - growth - table          KL = sum_j Q psi(t)
// No two rounded probabilities are ever subtracted. Any row would do in place of the mean of the logits; the
// first one needs no pass over the rows.
//
// Given, for centroids that are given: table = log Q, and a second table Q.
//   t = log(P/Q) = a x - L - table               KL = sum_j P t - P + Q, by Q psi(t) where t is small
#pragma once

#include "block.cuh"

namespace cmim::cuda {

// exp(a d) could overflow beyond; P0 stands for nothing there
template <class A>
constexpr A kWidestExponent = A(60);

enum Form : int { kPlain, kCentred, kGiven };

// exp(unit x) of kVector columns from j of a row of the class, with which its powers begin
template <class T>
__device__ inline void first_powers(const Block<T>& b, int row, int j, const typename T::A (&x)[kVector],
                                    typename T::A (&first)[kVector]) {
  if (b.powers_kept) {
    load_four(b.kept_powers(row) + j, first);
  } else {
#pragma unroll
    for (int u = 0; u < kVector; ++u) first[u] = exp_nonpositive(x[u] * b.q.unit);
  }
}

template <class T>
struct Plain {
  using A = typename T::A;
  static constexpr int kTables = 1;
  static constexpr Form kForm = kPlain;

  Powers<A, T::kChain> powers[kVector];

  // Row i of the batch, `row` of the class
  __device__ void load(const Block<T>& b, int i, int row, int j, int k0) {
    A x[kVector];
    load_vector(b.row_at(b.data()[i]), j, b.q.storage, x);
#pragma unroll
    for (int u = 0; u < kVector; ++u) x[u] = larger(x[u] - b.top()[i], b.q.floor);
    if constexpr (T::kChain) {
      A first[kVector];
      first_powers(b, row, j, x, first);
#pragma unroll
      for (int u = 0; u < kVector; ++u) powers[u].start(b.q, x[u], k0, first[u]);
    } else {
#pragma unroll
      for (int u = 0; u < kVector; ++u) powers[u].start(b.q, x[u], k0);
    }
  }
  __device__ void next() {
#pragma unroll
    for (int u = 0; u < kVector; ++u) powers[u].next();
  }
  __device__ A add_mean_term(const Problem<A>& q, int k, int u, A weight, A, A sum) const {
    return fma(powers[u].power(q, k), weight, sum);
  }
  // Adds a term of sum_j P t', but for exp(-L).
  __device__ A add_divergence_term(const Problem<A>& q, int k, int u, A, A, A table, A, A sum) const {
    return fma(powers[u].power(q, k), powers[u].exponent_less(q, k, table), sum);
  }
};

template <class T>
struct Given : Plain<T> {
  using A = typename T::A;
  static constexpr int kTables = 2;
  static constexpr Form kForm = kGiven;

  // weight = exp(-L), level = L
  __device__ A add_divergence_term(const Problem<A>& q, int k, int u, A weight, A level, A table, A centroid,
                                   A sum) const {
    const auto& powers = this->powers[u];
    const A p = powers.power(q, k) * weight;
    if (!(p > A(0))) return sum + (p == A(0) ? centroid : p);
    if (centroid == A(0)) return infinity<A>();
    const A t = powers.exponent_less(q, k, table) - level;
    return sum + (t < A(0.25) && t > A(-0.25) ? centroid * psi(t) : fma(p, t, centroid - p));
  }
};

template <class T>
struct Centred {
  using A = typename T::A;
  static constexpr int kTables = 2;
  static constexpr Form kForm = kCentred;

  A z0[kVector];
  A d[kVector], v[kVector], step[kVector];

  __device__ void take_offsets(const Block<T>& b, const typename T::S* row, int j, Difference<A> shift) {
    A z[kVector];
    load_vector(b.row_at(row), j, b.q.storage, z);
    load_vector(b.row_at(b.row_data(0)), j, b.q.storage, z0);
#pragma unroll
    for (int u = 0; u < kVector; ++u) d[u] = offset(z[u], z0[u], shift);
  }
  __device__ void start(const Problem<A>& q, int k0) {
    if constexpr (T::kChain)
#pragma unroll
      for (int u = 0; u < kVector; ++u) {
        step[u] = expm1_of(q.unit * d[u]);
        v[u] = q.multiple[k0] == A(1) ? step[u] : expm1_of(q.a[k0] * d[u]);
      }
  }
  __device__ void load(const Block<T>& b, int i, int, int j, int k0) {
    take_offsets(b, b.data()[i], j, b.shift()[i]);
    start(b.q, k0);
  }
  __device__ void next() {
    if constexpr (T::kChain)
#pragma unroll
      for (int u = 0; u < kVector; ++u) v[u] = fma(v[u], step[u] + A(1), step[u]);
  }
  __device__ A expm1(const Problem<A>& q, int k, int u) const {
    if constexpr (T::kChain) return v[u];
    return expm1_of(q.a[k] * d[u]);
  }
  // weight = 1/(1 + s), loss = s/(1 + s)
  __device__ A add_mean_term(const Problem<A>& q, int k, int u, A weight, A loss, A sum) const {
    return sum + fma(expm1(q, k, u), weight, -loss);
  }
  __device__ A add_divergence_term(const Problem<A>& q, int k, int u, A, A growth, A table, A centroid,
                                   A sum) const {
    return fma(centroid, psi(fma(q.a[k], d[u], -growth) - table), sum);
  }
};

}  // namespace cmim::cuda
