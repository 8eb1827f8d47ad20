// The rows of a class that fit on chip: where they lie, and what is known of each by itself. For onchip.cuh.
//
// One tile has all columns. A thread has kVector neighbouring columns of the rows of its group, the same in
// every pass, so that what it keeps of them (the logits, the exponential that the powers begin with) it alone
// reads again, without a barrier. Sums over columns go from the warps through shared memory to one thread for
// each row and temperature.
#pragma once

#include "gradient.cuh"

namespace cmim::cuda {

template <class T>
struct ChipRows {
  using A = typename T::A;
  using S = typename T::S;
  static constexpr int K = kChainChunk, kHalf = kDirectChunk;

  // Numbers of every row, a multiple of four of them, and of every row and temperature
  enum OfRow { kTopOf, kCe, kCeSum, kCeScale, kCeTarget, kCeSmooth, kShiftHigh, kShiftLow, kOfRow };
  enum OfBoth { kSum, kDivergence, kGrowth, kWeight, kLoss, kKl, kCoefficients = kWeight };

  Block<T>& b;
  const Forward<A>& f;
  const Problem<A>& q;
  const Tiling t;
  const int n, wide;
  int keeps;  // numbers of each logit that there is room for: the logit, and what its powers begin with

  __device__ ChipRows(Block<T>& block, const Forward<A>& forward)
      : b(block),
        f(forward),
        q(block.q),
        t(block.tiling(K)),
        n(block.count),
        wide((q.classes + kVector - 1) / kVector * kVector) {
    keeps = numbers(2) * int(sizeof(A)) <= b.chip_bytes ? 2 : numbers(1) * int(sizeof(A)) <= b.chip_bytes;
  }

  // Whether there is room for what is known of the class
  __device__ bool serves() const {
    if (q.padded != K || q.centroids || n > kBatch || t.columns < q.classes) return false;
    return keeps > 0 || (q.vector4 && wide == q.classes && numbers(0) * int(sizeof(A)) <= b.chip_bytes);
  }

  // Before the class is known. Barrier after.
  __device__ static void prepare() {
    if (threadIdx.x < kBatch) tops()[threadIdx.x] = ordered(lowest(A()));
  }
  // Where find_class() leaves the rows
  __device__ static int* rows() { return reinterpret_cast<int*>(Block<T>::data()); }

  // Floats that the class takes with so many for each logit
  __device__ int numbers(int each) const {
    return n * (kOfRow + each * wide) + (t.groups > 1 ? kHalf * t.columns : 0);
  }
  __device__ A* chip() const { return Block<T>::template shared<A>(Sizes<A>::fixed + b.table_bytes); }
  __device__ A* of_rows(int which) const { return chip() + which * n; }
  __device__ A* of_both(int which) const { return b.constants() + which * (kBatch * K); }
  __device__ A* logits(int i) const { return chip() + n * kOfRow + i * wide; }
  __device__ A* first(int i) const { return chip() + n * (kOfRow + wide) + i * wide; }
  // Q of half of the temperatures: (kHalf, columns). Groups have their sums where one has room for it.
  __device__ A* centroids() const {
    return t.groups == 1 ? b.combine() : chip() + numbers(keeps) - kHalf * t.columns;
  }
  // Of every temperature: the plain form's scale, and one over the sum of the first row
  __device__ A* scales() const { return b.scratch() + 48; }
  __device__ A* reciprocals() const { return b.scratch() + 48 + K; }
  // What the warps find before they sum: largest logits, and what the cross entropy has besides
  __device__ static int* tops() { return reinterpret_cast<int*>(Block<T>::table()); }
  __device__ A* others() const { return b.table() + kBatch; }
  __device__ bool in_columns() const { return t.column() < wide; }

  // call(i, whether there is such a row) in every thread, for the rows of its group
  template <class F>
  __device__ void for_rows(F call) const {
#pragma unroll 1
    for (int i0 = 0; i0 < n; i0 += t.groups) call(i0 + t.group(), i0 + t.group() < n);
  }
  // call(i, k) in one thread for each row and temperature
  template <class F>
  __device__ void for_both(F call) const {
#pragma unroll 1
    for (int at = opaque(int(threadIdx.x)); at < n * K; at += kThreads) call(at / K, at % K);
  }
  template <int N>
  __device__ A total(const A* parts, int i, int k) const {
    return Block<T>::template total<N>(t, parts, i, k);
  }

  // Where row i comes from
  __device__ const S* source(int i) const {
    return static_cast<const S*>(q.logits) + rows()[i] * q.row_stride;
  }
  __device__ void load_source(int i, A (&z)[kVector]) const {
    widen(*reinterpret_cast<const Vector<S>*>(source(i) + t.column()), q.storage, z);
  }
  // The logits in the thread's columns of row i
  __device__ void take_logits(int i, A (&z)[kVector]) const {
    if (keeps > 0)
      load_four(logits(i) + t.column(), z);
    else
      load_source(i, z);
  }
  __device__ A logit(int i, int j) const { return keeps > 0 ? logits(i)[j] : b.logit(i, j); }

  // Logits to where they stay, and the largest of each row
  __device__ void load() {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int i0 = 0; i0 < n; i0 += kAtOnce * t.groups) {
      A z[kAtOnce][kVector];
      const auto fetch = [&](auto one) {
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          const int i = i0 + r * t.groups + t.group();
          if (i < n && in_columns()) one(i, z[r]);
        }
      };
      if (q.vector4 && wide == q.classes)
        fetch([&](int i, auto& to) { load_source(i, to); });
      else
        fetch([&](int i, auto& to) {
          load_vector(Row<S>{source(i), q.col_stride, q.classes, false}, t.column(), q.storage, to);
        });
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        const int i = i0 + r * t.groups + t.group();
        if (i0 + r * t.groups >= n) break;
        A top = lowest(A());
        if (i < n && in_columns()) {
          if (keeps > 0) store_four(logits(i) + t.column(), z[r]);
#pragma unroll
          for (int u = 0; u < kVector; ++u) top = larger_or_nan(top, z[r][u]);
        }
        if (t.lanes >= kWarp) {
          const int key = largest_in_warp(ordered(top));
          if (i < n && threadIdx.x % kWarp == 0) atomicMax(tops() + i, key);
        } else if (i < n && in_columns()) {
          atomicMax(tops() + i, ordered(top));
        }
      }
    }
  }

  // x = logit - top in the thread's columns of row i
  __device__ void take(int i, A (&x)[kVector]) const {
    const A top = of_rows(kTopOf)[i];
    A z[kVector];
    take_logits(i, z);
#pragma unroll
    for (int u = 0; u < kVector; ++u) x[u] = larger(z[u] - top, q.floor);
  }
  // exp(unit x) there, and the powers for exponents unit multiple_0
  __device__ void take_first(int i, A (&begin)[kVector]) const {
    if (keeps == 2) return load_four(first(i) + t.column(), begin);
    take(i, begin);
#pragma unroll
    for (int u = 0; u < kVector; ++u) begin[u] = exp_nonpositive(begin[u] * q.unit);
  }
  __device__ void take_powers(int i, A (&begin)[kVector], A (&power)[kVector]) const {
    take_first(i, begin);
    if (q.multiple[0] == A(1)) {
#pragma unroll
      for (int u = 0; u < kVector; ++u) power[u] = begin[u];
    } else {
      take(i, power);
#pragma unroll
      for (int u = 0; u < kVector; ++u) power[u] = exp_nonpositive(q.multiple[0] * (power[u] * q.unit));
    }
  }

  // The warps' sums of exponentials, (row, warp, K); of rows whose divergences do not count, of the cross
  // entropy's alone, which go to others()
  __device__ void sums(bool cluster, bool shared_sum) {
    const bool more = !shared_sum || q.smoothing > A(0);
    for_rows([&](int i, bool there) {
      A sum[K] = {}, other[kVector] = {};
      if (there) {
        const A top = from_ordered(tops()[i]);
        if (t.column() == 0) of_rows(kTopOf)[i] = top;
        const A anchor = q.smoothing > A(0) ? smoothing_anchor(logit(i, b.label())) : A(0);
        if (in_columns()) {
          A z[kVector], x[kVector];
          take_logits(i, z);
#pragma unroll
          for (int u = 0; u < kVector; ++u) x[u] = larger(z[u] - top, q.floor);
          if (cluster) {
            A begin[kVector], power[kVector];
#pragma unroll
            for (int u = 0; u < kVector; ++u) begin[u] = power[u] = exp_nonpositive(x[u] * q.unit);
            if (keeps == 2) store_four(first(i) + t.column(), begin);
            if (q.multiple[0] != A(1))
#pragma unroll
              for (int u = 0; u < kVector; ++u) power[u] = exp_nonpositive(q.multiple[0] * (x[u] * q.unit));
#pragma unroll
            for (int k = 0; k < K; ++k)
#pragma unroll
              for (int u = 0; u < kVector; ++u) {
                sum[k] += power[u];
                power[u] *= begin[u];
              }
          }
          if (more)
#pragma unroll
            for (int u = 0; u < kVector; ++u)
              add_others(t.column() + u, z[u], anchor, exp_nonpositive(x[u]), other);
        }
      }
      if (cluster) b.deposit(t, i, there, sum, false);
      if (more) deposit_sums(other, t.lanes, there, false, others() + (i * t.warps() + t.warp()) * kVector);
    });
  }
  // exp(x), and for label smoothing the weighted logit less the anchor, and the weight
  __device__ void add_others(int j, A z, A anchor, A exponential, A (&other)[kVector]) const {
    other[0] += exponential;
    if (!(q.smoothing > A(0)) || j >= q.classes) return;
    const A weight = q.class_weight ? q.class_weight[j] : A(1);
    other[1] += weight * (z - anchor), other[2] += weight;
  }

  __device__ void finish_sums(bool cluster, bool shared_sum) {
    const int label = b.label();
    for_both([&](int i, int k) {
      const A top = of_rows(kTopOf)[i];
      A sum = 0;
      if (cluster) {
        sum = sum_or_nan(total<K>(b.combine(), i, k), top);
        of_both(kSum)[i * K + k] = sum;
      }
      if (k != (shared_sum ? q.one : 0)) return;
      if (!shared_sum) sum = sum_or_nan(total<kVector>(others(), i, 0), top);
      RowSums<A> s{top, 0, 0, 0};
      if (q.smoothing > A(0))
        s.weighted = total<kVector>(others(), i, 1), s.weights = total<kVector>(others(), i, 2);
      const CrossEntropy<A> entropy(q, s, logit(i, label), q.class_weight ? q.class_weight[label] : A(1));
      of_rows(kCe)[i] = fma(entropy.slope, log_of(sum), entropy.rest);
      of_rows(kCeSum)[i] = sum;
    });
  }
};

}  // namespace cmim::cuda
