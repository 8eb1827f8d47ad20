// What is known of a row by itself: its largest logit, its cross entropy, and the sums of its exponentials.
#pragma once

#include "cluster.cuh"
#include "group.cuh"

namespace cmim::cuda {

// Threads that share a row: all of them for one row, a warp each for many, fewer for short rows.
__device__ inline int lanes_for_rows(int rows, int classes) {
  const int vectors = power_of_two_at_least((classes + kVector - 1) / kVector);
  int lanes = kThreads / power_of_two_at_least(rows < kThreads ? rows : kThreads);
  if (lanes < kWarp) lanes = kWarp;
  return lanes < vectors ? lanes : vectors;
}

template <class A>
struct RowSums {
  A top;                // largest logit
  A exponentials;       // sum_j exp(z_j - top)
  A weighted, weights;  // sum_j class_weight_j z_j and sum_j class_weight_j, for label smoothing
};

// x, but NaN where z is: the exponential does not carry it, nor does 1 / 0 of an infinite z
template <class A>
__device__ inline A with_nan(A x, A z) {
  return z < infinity<A>() ? x : not_a_number<A>();
}

// One pass: the sum is rescaled whenever a larger logit comes by. A thread's part.
template <class T>
__device__ inline RowSums<typename T::A> scan_row(const Problem<typename T::A>& q,
                                                  const Row<typename T::S>& row, int lane, int lanes) {
  using A = typename T::A;
  RowSums<A> s{lowest(A()), 0, 0, 0};
#pragma unroll 1
  for (int j = lane * kVector; j < row.width; j += lanes * kVector) {
    A z[kVector];
    load_vector(row, j, q.storage, z);
    const A top = larger(larger(z[0], z[1]), larger(z[2], larger(z[3], s.top)));
    if (top > s.top) {
      s.exponentials *= exp_nonpositive(s.top - top);
      s.top = top;
    }
#pragma unroll
    for (int u = 0; u < kVector; ++u) s.exponentials += with_nan(exp_nonpositive(z[u] - s.top), z[u]);
    if (q.smoothing > A(0))
      for (int u = 0; u < kVector && j + u < row.width; ++u) {
        const A w = q.class_weight ? q.class_weight[j + u] : A(1);
        s.weighted += w * z[u], s.weights += w;
      }
  }
  return s;
}

// Cross entropy of a row, weighted and smoothed as in F.cross_entropy
template <class A>
__device__ inline A cross_entropy(const Problem<A>& q, const RowSums<A>& s, A log_sum, A target_logit,
                                  A target_weight) {
  A ce = target_weight * (log_sum - (target_logit - s.top));
  if (q.smoothing > A(0)) {
    const A smooth = (s.weights * (s.top + log_sum) - s.weighted) / A(q.classes);
    ce = (A(1) - q.smoothing) * ce + q.smoothing * smooth;
  }
  return ce;
}

// Statistics of the rows at `count` positions from `first`: top and ce_sum, and sum if `all`, into
// saved; the cross entropy to ce[position]. Rows may be of different classes unless they are on chip.
// Barrier after.
template <class T>
__device__ inline void row_statistics(Block<T>& b, int count, bool all, typename T::A* ce) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const int lanes = lanes_for_rows(count, q.classes), groups = kThreads / lanes;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int parts = lanes > kWarp ? lanes / kWarp : 1;
  A* const sums = b.constants();  // (groups, parts, kChunk)
#pragma unroll 1
  for (int i0 = 0; i0 < count; i0 += groups) {
    const int i = i0 + group, position = b.first + i;
    const int64_t y = i < count ? target_at(q, b.saved.row[position]) : -1;
    const bool there = kept(q, y);
    const Row<typename T::S> row = b.row_at(there ? b.row_data(i) : nullptr);
    RowSums<A> s{lowest(A()), 0, 0, 0};
    if (there) s = scan_row<T>(q, row, lane, lanes);
    const A mine = s.top;
    s.top = largest_in_group(s.top, lanes, b.scratch());
    A v[3] = {s.exponentials * exp_nonpositive(mine - s.top), s.weighted, s.weights};
    sum_group(v, lanes, b.scratch());
    s.exponentials = v[0], s.weighted = v[1], s.weights = v[2];
    if (there && lane == 0) {
      // no sum: every class of the row is masked, as F.cross_entropy has it
      if (!(s.exponentials > A(0))) s.exponentials = not_a_number<A>();
      b.saved.top[position] = s.top;
      b.saved.ce_sum[position] = s.exponentials;
      ce[position] = cross_entropy(q, s, log_of(s.exponentials), widen(row.data[y * row.stride], q.storage),
                                   q.class_weight ? q.class_weight[y] : A(1));
    }
    if (!all) continue;
#pragma unroll 1
    for (int k0 = 0; k0 < q.padded; k0 += T::kChunk) {
      A sum[T::kChunk] = {};
      if (there)
#pragma unroll 1
        for (int j = lane * kVector; j < row.width; j += lanes * kVector) {
          A z[kVector];
          load_vector(row, j, q.storage, z);
#pragma unroll
          for (int u = 0; u < kVector; ++u) {
            Powers<A, T::kChain> powers;
            powers.start(q, larger(z[u] - s.top, q.floor), k0);
#pragma unroll
            for (int k = 0; k < T::kChunk; ++k) {
              sum[k] += powers.power(q, k0 + k);
              powers.next();
            }
          }
        }
      deposit_sums(sum, lanes, sums + (group * parts + lane / kWarp) * T::kChunk);
      __syncthreads();
#pragma unroll 1
      for (int at = threadIdx.x; at < groups * T::kChunk; at += kThreads) {
        const int g = at / T::kChunk, k = at - g * T::kChunk;
        if (i0 + g >= count) continue;
        A total = 0;
#pragma unroll 1
        for (int part = 0; part < parts; ++part) total += sums[(g * parts + part) * T::kChunk + k];
        // with NaN where the row has one, which the exponentials do not carry
        b.saved.sum[b.statistic(i0 + g, k0 + k)] = total + A(0) * b.saved.ce_sum[b.first + i0 + g];
      }
      __syncthreads();
    }
  }
  __syncthreads();
}

// The first pass of the centred form over columns begin .. end - 1: their part of sum_j P0 v for each row, to
// out[position * padded + k], where P0 is still to be divided by its sum. Returns, to every thread, the
// largest d. b.flags()[0] holds j0. Only chunks with a temperature in `wanted`. Barrier after.
template <class T>
__device__ inline typename T::A centred_sums(Block<T>& b, int begin, int end, uint64_t wanted,
                                             typename T::A* out) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const int lanes = lanes_for_rows(b.count, end - begin), groups = kThreads / lanes;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const int parts = lanes > kWarp ? lanes / kWarp : 1;
  const A top0 = b.saved.top[b.first];
  A* const sums = b.constants();
  A widest = 0;
#pragma unroll 1
  for (int i0 = 0; i0 < b.count; i0 += groups) {
    const int i = i0 + group;
    const bool there = i < b.count;
    const typename T::S* const data = b.row_data(there ? i : 0);
    const Difference<A> shift = shift_of(b, there ? i : 0);
#pragma unroll 1
    for (int k0 = 0; k0 < q.padded; k0 += T::kChunk) {
      if (!b.in_chunk(wanted, k0)) continue;
      A sum[T::kChunk] = {};
      Centred<T> form;
      if (there)
#pragma unroll 1
        for (int j = begin + lane * kVector; j < end; j += lanes * kVector) {
          form.enter_tile(b, j);
          A z[kVector];
          load_vector(b.row_at(data), j, q.storage, z);
          form.take_offsets(z, shift);
          form.start(q, k0);
          Powers<A, T::kChain> p0[kVector];
#pragma unroll
          for (int u = 0; u < kVector; ++u) {
            p0[u].start(q, larger(form.z0[u] - top0, q.floor), k0);
            widest = larger(widest, j + u < end ? form.d[u] : A(0));
          }
#pragma unroll
          for (int k = 0; k < T::kChunk; ++k) {
#pragma unroll
            for (int u = 0; u < kVector; ++u) {
              sum[k] = fma(p0[u].power(q, k0 + k), form.expm1(q, k0 + k, u), sum[k]);
              p0[u].next();
            }
            form.next();
          }
        }
      deposit_sums(sum, lanes, sums + (group * parts + lane / kWarp) * T::kChunk);
      __syncthreads();
#pragma unroll 1
      for (int at = threadIdx.x; at < groups * T::kChunk; at += kThreads) {
        const int g = at / T::kChunk, k = at - g * T::kChunk;
        if (i0 + g >= b.count) continue;
        A total = 0;
#pragma unroll 1
        for (int part = 0; part < parts; ++part) total += sums[(g * parts + part) * T::kChunk + k];
        out[b.statistic(i0 + g, k0 + k)] = total;
      }
      __syncthreads();
    }
  }
  return largest_in_group(widest, kThreads, b.scratch());
}

// Those of the temperatures at which exp(a d) is in range for every d up to `widest`
template <class T>
__device__ inline uint64_t not_too_wide(const Block<T>& b, uint64_t temperatures, typename T::A widest) {
#pragma unroll 1
  for (int k = 0; k < b.q.temperatures; ++k)
    if (!(b.q.a[k] * widest <= kWidestExponent<typename T::A>)) temperatures &= ~(uint64_t(1) << k);
  return temperatures;
}

}  // namespace cmim::cuda
