// One class from its rows' statistics to its divergences and its share of the loss.
#pragma once

#include "finish.cuh"
#include "rows.cuh"

namespace cmim::cuda {

// A temperature at which the class's mean KL (nats) is below this is done again in the centred form: a is its
// inverse. The plain form errs by what is rounded in means near 1 and in their logarithms, which are as large
// as a x; docs/performance_cuda.md measures both sides of the seam.
template <class A>
__device__ inline A collapsed_below(A a) {
  if (sizeof(A) == 8) return A(1e-9);
  return A(2e-2) * (a < A(0.125) ? A(0.125) : a < A(1.5) ? a : A(1.5));
}

// From what centred_sums() left in `sums`: saved.growth of the temperatures in `centred`. Barrier after.
template <class T>
__device__ inline void finish_centred_sums(const Block<T>& b, uint64_t centred, const typename T::A* sums) {
#pragma unroll 1
  for (int i = threadIdx.x; i < b.count * b.q.padded; i += kThreads) {
    const int row = i / b.q.padded, k = i - row * b.q.padded;
    const int64_t at = b.statistic(row, k);
    if (centred >> k & 1) b.saved.growth[at] = log1p_of(sums[at] / b.saved.sum[b.statistic(0, k)]);
  }
  __syncthreads();
}

// KL of the centred temperatures, to saved.divergence. Barrier after.
template <class T>
__device__ inline void finish_centred(const Block<T>& b, const typename T::A* kl) {
#pragma unroll 1
  for (int i = threadIdx.x; i < b.count * b.q.padded; i += kThreads) {
    const int row = i / b.q.padded, k = i - row * b.q.padded;
    const int64_t at = b.statistic(row, k);
    if (b.centred >> k & 1) b.saved.divergence[at] = kl[at];
  }
  __syncthreads();
}

// saved.divergence = sum_j P log(P/Q) = KL + 1 - sum_j Q for given centroids; KL stays in `kl`.
template <class T>
__device__ inline void finish_given(const Block<T>& b, const typename T::A* kl) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 1
  for (int k = warp; k < q.temperatures; k += kWarps) {
    A sum = 0;
    const A* centroid = q.centroids + (int64_t(q.order[k]) * q.classes + b.label()) * q.classes;
#pragma unroll 1
    for (int j = lane; j < q.classes; j += kWarp) sum += centroid[j];
    sum = sum_over_warp(sum);
#pragma unroll 1
    for (int row = lane; row < b.count; row += kWarp)
      b.saved.divergence[b.statistic(row, k)] = kl[b.statistic(row, k)] + (A(1) - sum);
  }
}

// KL of row and temperature, after whatever forms it took
template <class T>
__device__ inline typename T::A kl_of(const Block<T>& b, int row, int k, const typename T::A* kl) {
  using A = typename T::A;
  const int64_t at = b.statistic(row, k);
  if (b.q.centroids) return kl[at];
  const A divergence = b.saved.divergence[at];
  if (b.centred >> k & 1) return divergence;
  const A nats = divergence + log_positive(plain_scale(b, k) / b.saved.sum[at]);
  return nats < A(0) ? A(0) : nats;  // rounding; keeps a NaN
}

// What the sums over classes have of this one besides its cross entropy and divergences
template <class T>
__device__ inline void tell_class(const Block<T>& b, const Forward<typename T::A>& f, int slot) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const A weight = q.class_weight ? q.class_weight[b.label()] : A(1);
  *class_sum(q, f, q.padded + kClassWeight, slot) = weight * A(b.count);
  *class_sum(q, f, q.padded + kClassCount, slot) = A(b.count);
  *class_sum(q, f, q.padded + kClassPresent, slot) = A(1);
}
// The same, and all else, of a slot that has no class
template <class A>
__device__ inline void tell_no_class(const Problem<A>& q, const Forward<A>& f, int slot) {
#pragma unroll 1
  for (int which = threadIdx.x; which < q.padded + kClassSums; which += kThreads)
    *class_sum(q, f, which, slot) = 0;
}

// The class's share of every sum over classes, to f.sums if `tell`: of ce(row) and, of a `cluster`, of
// kl(row, k); the divergences of others are zero. Returns the mask of the temperatures at which the class has
// collapsed. Barriers before and after.
template <class T, class Ce, class Kl>
__device__ inline uint64_t sum_class(const Block<T>& b, const Forward<typename T::A>& f, int slot,
                                     bool cluster, bool tell, Ce ce, Kl kl) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const int thread = opaque(int(threadIdx.x)), lane = thread % kWarp, warp = thread / kWarp;
  const int count = opaque(b.count);
  unsigned* const mask = reinterpret_cast<unsigned*>(b.flags() + 2);  // low word first
  if (thread < 2) mask[thread] = 0;
  __syncthreads();
#pragma unroll 1
  for (int which = warp; which <= q.padded; which += kWarps) {
    const bool divergence = cluster && which < q.temperatures;
    CarefulSum<A> sum;
#pragma unroll 1
    for (int row = lane; row < count; row += kWarp) {
      if (which == q.padded)
        sum.add(ce(row));
      else if (divergence)
        sum.add(kl(row, which));
    }
    const A total = sum_over_warp(sum.value());
    if (lane != 0) continue;
    if (tell) *class_sum(q, f, which, slot) = total;
    if (divergence && total < collapsed_below(q.a[which]) * A(count))
      atomicOr(mask + which / 32, 1u << which % 32);
  }
  if (thread == 0 && tell) tell_class(b, f, slot);
  __syncthreads();
  return mask[0] | uint64_t(mask[1]) << 32;
}
// The same from memory; `kl` null: no cluster
template <class T>
__device__ inline uint64_t sum_class(const Block<T>& b, const Forward<typename T::A>& f, int slot,
                                     const typename T::A* kl, bool tell) {
  return sum_class(
      b, f, slot, kl != nullptr, tell, [&](int row) { return f.ce[b.first + row]; },
      [&](int row, int k) { return kl_of(b, row, k, kl); });
}

// A row's part of the loss
template <class A>
__device__ inline A row_value(const Problem<A>& q, A ce, A cmi) {
  const A weighted = q.has_ce ? q.ce_weight * ce : A(0);
  return q.has_cmi ? fma(q.cmi_weight, cmi, weighted) : weighted;
}

// The values of the class's rows, for reduction "none"
template <class T>
__device__ inline void store_rows(const Block<T>& b, const Forward<typename T::A>& f,
                                  const typename T::A* kl) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
#pragma unroll 1
  for (int row = threadIdx.x; row < b.count; row += kThreads) {
    A cmi = 0;
#pragma unroll 1
    for (int k = 0; kl && k < q.temperatures; ++k) cmi = fma(q.weight[k], kl_of(b, row, k, kl), cmi);
    f.value[b.saved.row[b.first + row]] = row_value(q, f.ce[b.first + row], cmi);
  }
}

}  // namespace cmim::cuda
