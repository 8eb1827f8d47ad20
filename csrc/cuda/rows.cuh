// What is known of a row by itself: its largest logit, its cross entropy, and the sums of its exponentials.
#pragma once

#include "cluster.cuh"
#include "group.cuh"

namespace cmim::cuda {

template <class A>
struct RowSums {
  A top;                // largest logit; NaN if there is one or if it is infinite
  A exponentials;       // sum_j exp(z_j - top)
  A weighted, weights;  // sum_j class_weight_j z_j and sum_j class_weight_j, for label smoothing
};

// One pass over columns begin .. end - 1, a thread's part. With `exponentials` their sum is rescaled whenever
// a larger logit comes by.
template <class T>
__device__ inline RowSums<typename T::A> scan_row(const Problem<typename T::A>& q,
                                                  const Row<typename T::S>& row, int begin, int end, int lane,
                                                  int lanes, bool exponentials) {
  using A = typename T::A;
  RowSums<A> s{lowest(A()), 0, 0, 0};
#pragma unroll 1
  for (int j = begin + lane * kVector; j < end; j += lanes * kVector) {
    A z[kVector];
    load_vector(row, j, q.storage, z);
    const A top = larger_or_nan(larger_or_nan(z[0], z[1]), larger_or_nan(z[2], larger_or_nan(z[3], s.top)));
    if (exponentials) {
      if (top > s.top) s.exponentials *= exp_nonpositive(s.top - top);
#pragma unroll
      for (int u = 0; u < kVector; ++u) s.exponentials += exp_nonpositive(z[u] - top);
    }
    s.top = top;
    if (q.smoothing > A(0))
      for (int u = 0; u < kVector && j + u < end; ++u) {
        const A w = q.class_weight ? q.class_weight[j + u] : A(1);
        s.weighted += w * z[u], s.weights += w;
      }
  }
  return s;
}

// The cross entropy of a row, weighted and smoothed as in F.cross_entropy, is slope * log sum_j exp(z_j -
// top)
// + rest.
template <class A>
struct CrossEntropy {
  A slope, rest;
  __device__ CrossEntropy(const Problem<A>& q, const RowSums<A>& s, A target_logit, A target_weight) {
    slope = target_weight;
    rest = target_weight * (s.top - target_logit);
    if (q.smoothing > A(0)) {
      const A hard = A(1) - q.smoothing, smooth = q.smoothing / A(q.classes);
      slope = fma(smooth, s.weights, hard * slope);
      rest = fma(smooth, fma(s.weights, s.top, -s.weighted), hard * rest);
    }
  }
};

// No sum, not even of the largest logit's exponential: every class of the row is masked. NaN, as
// F.cross_entropy has it, and where the row has a NaN or a largest logit of infinity.
template <class A>
__device__ inline A sum_or_nan(A sum, A top) {
  return sum > A(0) && top < infinity<A>() ? sum : not_a_number<A>();
}

// Whether the cross entropy's sum is one of the temperatures', where these are wanted
template <class A>
__device__ inline bool shares_sum(const Problem<A>& q, bool temperatures) {
  return temperatures && q.one >= 0;
}

// What the rows at `count` positions from `first` hold in the block's columns: call(position, sums) in one
// thread for each row. Rows may be of different classes unless they are on chip. Barrier after.
template <class T, class F>
__device__ inline void scan_rows(Block<T>& b, int count, bool exponentials, F call) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const int lanes = lanes_for_rows(count, b.width()), groups = kThreads / lanes;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
#pragma unroll 1
  for (int i0 = 0; i0 < count; i0 += groups) {
    const int i = i0 + group, position = b.first + i;
    const bool there = i < count && kept(q, target_at(q, b.saved.row[position]));
    RowSums<A> s{lowest(A()), 0, 0, 0};
    if (there) s = scan_row<T>(q, b.row_at(b.row_data(i)), b.begin, b.end, lane, lanes, exponentials);
    const A mine = s.top;
    s.top = largest_in_group(s.top, lanes, b.scratch());
    A v[3] = {s.exponentials * exp_nonpositive(mine - s.top), s.weighted, s.weights};
    sum_group(v, lanes, b.scratch());
    s.exponentials = v[0], s.weighted = v[1], s.weights = v[2];
    if (there && lane == 0) call(position, s);
  }
  __syncthreads();
}

// saved.top and ce_sum of a row, and its cross entropy to ce[position]; with `shared_sum` these wait for
// finish_sum(), and the places hold the slope and the rest.
template <class T>
__device__ inline void finish_scan(const Block<T>& b, int position, const RowSums<typename T::A>& s,
                                   bool shared_sum, typename T::A* ce) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const int64_t y = target_at(q, b.saved.row[position]);
  const CrossEntropy<A> entropy(q, s, b.logit(position - b.first, y),
                                q.class_weight ? q.class_weight[y] : A(1));
  b.saved.top[position] = s.top;
  const A sum = shared_sum ? entropy.slope : sum_or_nan(s.exponentials, s.top);
  b.saved.ce_sum[position] = sum;
  ce[position] = shared_sum ? entropy.rest : fma(entropy.slope, log_of(sum), entropy.rest);
}

// Sums of the exponentials of every temperature in the block's columns: call(row, k, sum) in one thread for
// each. Keeps the exponentials that the powers begin with. Barrier after.
template <class T, class F>
__device__ inline void sum_rows(Block<T>& b, int count, F call) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const int lanes = lanes_for_rows(count, b.width());
#pragma unroll 1
  for (int k0 = 0; k0 < q.padded; k0 += T::kChunk)
    b.sum_over_columns(
        count, lanes, b.constants(),
        [&](int i, int lane, A(&sum)[T::kChunk]) {
          if (!kept(q, target_at(q, b.saved.row[b.first + i]))) return;
          const Row<typename T::S> row = b.row_at(b.row_data(i));
          const A top = b.saved.top[b.first + i];
#pragma unroll 1
          for (int j = b.begin + lane * kVector; j < b.end; j += lanes * kVector) {
            A z[kVector], first[kVector] = {};
            load_vector(row, j, q.storage, z);
#pragma unroll
            for (int u = 0; u < kVector; ++u) {
              Powers<A, T::kChain> powers;
              powers.start(q, larger(z[u] - top, q.floor), k0);
              if constexpr (T::kChain) first[u] = powers.base;
#pragma unroll
              for (int k = 0; k < T::kChunk; ++k) {
                sum[k] += powers.power(q, k0 + k);
                powers.next();
              }
            }
            if (T::kChain && b.powers_kept && k0 == 0) store_four(b.kept_powers(i) + j, first);
          }
        },
        [&](int i, int k, A total) { call(i, k0 + k, total); });
}

// saved.sum of a row and temperature, and the cross entropy that finish_scan() left to it
template <class T>
__device__ inline void finish_sum(const Block<T>& b, int row, int k, typename T::A total, bool shared_sum,
                                  typename T::A* ce) {
  const int position = b.first + row;
  const typename T::A sum = sum_or_nan(total, b.saved.top[position]);
  b.saved.sum[b.statistic(row, k)] = sum;
  if (!shared_sum || k != b.q.one) return;
  ce[position] = fma(b.saved.ce_sum[position], log_of(sum), ce[position]);
  b.saved.ce_sum[position] = sum;
}

// The first pass of the centred form over columns begin .. end - 1: their part of sum_j P0 v for each row, to
// out[position * padded + k], where P0 is still to be divided by its sum. Returns, to every thread, the
// largest d. b.flags()[0] holds j0. Only chunks with a temperature in `wanted`. Barrier after.
template <class T>
__device__ inline typename T::A centred_sums(Block<T>& b, int begin, int end, uint64_t wanted,
                                             typename T::A* out) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const int lanes = lanes_for_rows(b.count, end - begin);
  const A top0 = b.saved.top[b.first];
  A widest = 0;
#pragma unroll 1
  for (int k0 = 0; k0 < q.padded; k0 += T::kChunk) {
    if (!b.in_chunk(wanted, k0)) continue;
    b.sum_over_columns(
        b.count, lanes, b.constants(),
        [&](int i, int lane, A(&sum)[T::kChunk]) {
          const typename T::S* const data = b.row_data(i);
          const Difference<A> shift = shift_of(b, i);
          Centred<T> form;
#pragma unroll 1
          for (int j = begin + lane * kVector; j < end; j += lanes * kVector) {
            form.take_offsets(b, data, j, shift);
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
        },
        [&](int i, int k, A total) { out[b.statistic(i, k0 + k)] = total; });
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
