// What is known of a row by itself: its largest logit, its cross entropy, and the sums of its exponentials.
#pragma once

#include "cluster.cuh"
#include "group.cuh"

namespace cmim::cuda {

template <class A>
struct RowSums {
  A top;                // largest logit; NaN if there is one or if it is infinite
  A exponentials;       // sum_j exp(z_j - top)
  A weighted, weights;  // sum_j class_weight_j (z_j - anchor) and sum_j class_weight_j, for label smoothing
};

// As exact as the logits' type has use for
template <class T>
__device__ inline typename T::A exp_for(typename T::A x) {
  if constexpr (sizeof(typename T::S) == 2)
    return exp_coarse(x);
  else
    return exp_nonpositive(x);
}

// Vectors of a row that are on their way at a time
constexpr int kAhead = 4;

// call(j, logits, vectors) for the columns begin .. end - 1 of a row, a thread's part, kAhead or one vector
// of kVector at a time, which are `apart` columns from each other
template <class T, class F>
__device__ inline void for_columns(const Problem<typename T::A>& q, const Row<typename T::S>& row, int begin,
                                   int end, int lane, int lanes, F call) {
  using A = typename T::A;
  const int apart = lanes * kVector, whole = end < row.width ? end : row.width;
  int j = begin + lane * kVector;
#pragma unroll 1
  for (; row.vector && j + (kAhead - 1) * apart + kVector <= whole; j += kAhead * apart) {
    Vector<typename T::S> ahead[kAhead];
    A z[kAhead][kVector];
#pragma unroll
    for (int v = 0; v < kAhead; ++v)
      ahead[v] = *reinterpret_cast<const Vector<typename T::S>*>(row.data + j + v * apart);
#pragma unroll
    for (int v = 0; v < kAhead; ++v) widen(ahead[v], q.storage, z[v]);
    call(j, apart, z);
  }
#pragma unroll 1
  for (; j < end; j += apart) {
    A z[1][kVector];
    load_vector(row, j, q.storage, z[0]);
    call(j, apart, z);
  }
}

// What label smoothing's sum of a row's logits is relative to, so that an offset of the row costs no digit
template <class A>
__device__ inline A smoothing_anchor(A target_logit) {
  return target_logit - target_logit == A(0) ? target_logit : A(0);
}

// One pass over columns begin .. end - 1, a thread's part. With `exponentials` their sum is rescaled whenever
// a larger logit comes by.
template <class T>
__device__ inline RowSums<typename T::A> scan_row(const Problem<typename T::A>& q,
                                                  const Row<typename T::S>& row, int begin, int end, int lane,
                                                  int lanes, bool exponentials, typename T::A anchor) {
  using A = typename T::A;
  RowSums<A> s{lowest(A()), 0, 0, 0};
  for_columns<T>(q, row, begin, end, lane, lanes, [&](int j0, int apart, const auto& z) {
    A top = s.top;
    for (const auto& vector : z)
#pragma unroll
      for (int u = 0; u < kVector; ++u) top = larger_or_nan(top, vector[u]);
    if (exponentials) {
      if (top > s.top) s.exponentials *= exp_nonpositive(s.top - top);
#pragma unroll
      for (const auto& vector : z)
#pragma unroll
        for (int u = 0; u < kVector; ++u) s.exponentials += exp_for<T>(vector[u] - top);
    }
    s.top = top;
    if (!(q.smoothing > A(0))) return;
    for (const auto& vector : z) {
      for (int u = 0; u < kVector && j0 + u < end; ++u) {
        const A w = q.class_weight ? q.class_weight[j0 + u] : A(1);
        s.weighted += w * (vector[u] - anchor), s.weights += w;
      }
      j0 += apart;
    }
  });
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
      rest = fma(smooth, fma(s.weights, s.top - smoothing_anchor(target_logit), -s.weighted), hard * rest);
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
    if (there) {
      A anchor = 0;
      if (q.smoothing > A(0)) anchor = smoothing_anchor(b.logit(i, target_at(q, b.saved.row[position])));
      s = scan_row<T>(q, b.row_at(b.row_data(i)), b.begin, b.end, lane, lanes, exponentials, anchor);
    }
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

// sum += the exponentials of the chunk k0 in columns j .. j + 3. Keeps those that the powers begin with, if
// there is room for them.
template <class T>
__device__ inline void add_exponentials(const Block<T>& b, const Row<typename T::S>& row, typename T::A top,
                                        int index, int j, int k0, typename T::A (&sum)[T::kChunk]) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
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
  if (T::kChain && b.powers_kept && k0 == 0) store_four(b.kept_powers(index) + j, first);
}

// Sums of the exponentials of every temperature in the block's columns: call(row, k, sum) in one thread for
// each row that is kept. Barrier after.
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
          for (int j = b.begin + lane * kVector; j < b.end; j += lanes * kVector)
            add_exponentials(b, row, top, i, j, k0, sum);
        },
        [&](int i, int k, A total) {
          if (kept(q, target_at(q, b.saved.row[b.first + i]))) call(i, k0 + k, total);
        });
}

// The cross entropy that finish_scan() left to its sum
template <class T>
__device__ inline void finish_cross_entropy(const Block<T>& b, int position, typename T::A total,
                                            typename T::A* ce) {
  const typename T::A sum = sum_or_nan(total, b.saved.top[position]);
  ce[position] = fma(b.saved.ce_sum[position], log_of(sum), ce[position]);
  b.saved.ce_sum[position] = sum;
}

// saved.sum of a row and temperature, and the cross entropy where it is its sum
template <class T>
__device__ inline void finish_sum(const Block<T>& b, int row, int k, typename T::A total, bool shared_sum,
                                  typename T::A* ce) {
  const int position = b.first + row;
  b.saved.sum[b.statistic(row, k)] = sum_or_nan(total, b.saved.top[position]);
  if (shared_sum && k == b.q.one) finish_cross_entropy(b, position, total, ce);
}

}  // namespace cmim::cuda
