// The gradient of the cross entropy: scale * exp(x) - target at the label - smooth * the class's weight.
#pragma once

#include "cluster.cuh"
#include "rows.cuh"

namespace cmim::cuda {

template <class A>
__device__ inline A upstream_of(const Backward<A>& w, int64_t at) {
  return w.grad ? w.grad[at] : A(1);
}
// What multiplies CE in the loss, upstream included, but for g_i
template <class A>
__device__ inline A cross_entropy_scale(const Problem<A>& q, const Divisors<A>& by, const Backward<A>& w) {
  if (q.reduction == kNone) return q.ce_weight;
  return q.ce_weight * upstream_of(w, 0) / (q.reduction == kMean ? by.weights : A(1));
}

template <class A>
struct CrossEntropyParts {
  A scale, target, smooth;
};
template <class T, class A = typename T::A>
__device__ inline CrossEntropyParts<A> cross_entropy_parts(const Block<T>& b, const Divisors<A>& by,
                                                           const Backward<A>& w, A sum, A g) {
  const Problem<A>& q = b.q;
  if (!q.has_ce) return {0, 0, 0};
  const A scale = cross_entropy_scale(q, by, w) * g;
  const A hard = scale * (A(1) - q.smoothing) * (q.class_weight ? q.class_weight[b.label()] : A(1));
  const A smooth = scale * q.smoothing / A(q.classes);
  const A both = q.smoothing > A(0) ? fma(smooth, by.smoothing, hard) : hard;
  return {both / sum, hard, smooth};
}

// g += the cross entropy's part, at columns j .. j + 3 of a row whose columns end at `end`
template <class T, class A = typename T::A>
__device__ inline void add_cross_entropy(const Problem<A>& q, A scale, A target, A smooth, int j, int label,
                                         int end, const A (&x)[kVector], A (&g)[kVector]) {
#pragma unroll
  for (int u = 0; u < kVector; ++u)  // first its own terms, whose difference may be small beside either
    g[u] += fma(scale, exp_for<T>(x[u]), j + u == label ? -target : A(0));
  if (q.smoothing > A(0))
    for (int u = 0; u < kVector && j + u < end; ++u)
      g[u] -= smooth * (q.class_weight ? q.class_weight[j + u] : A(1));
}

// The gradient of a class whose divergences do not count
template <class T>
__device__ inline void cross_entropy_gradient(const Block<T>& b, const Backward<typename T::A>& w,
                                              const Share& share) {
  using A = typename T::A;
  using S = typename T::S;
  const Problem<A>& q = b.q;
  const int label = b.label();
  const int lanes = lanes_for_rows(b.count, share.end - share.begin);
#pragma unroll 1
  for (int row = threadIdx.x / lanes; row < b.count; row += kThreads / lanes) {
    const int position = b.first + row;
    const A g = q.reduction == kNone ? w.grad[b.saved.row[position] * w.grad_stride] : A(1);
    const A top = b.saved.top[position];
    const CrossEntropyParts<A> ce = cross_entropy_parts(b, *b.divisors(), w, b.saved.ce_sum[position], g);
    S* const to = static_cast<S*>(w.out) + int64_t(b.saved.row[position]) * q.classes;
    for_columns<T>(q, b.row_at(b.row_data(row)), share.begin, share.end, threadIdx.x % lanes, lanes,
                   [&](int j, int apart, const auto& z) {
#pragma unroll
                     for (const auto& vector : z) {
                       A x[kVector], gradient[kVector] = {};
#pragma unroll
                       for (int u = 0; u < kVector; ++u) x[u] = larger(vector[u] - top, q.floor);
                       if (q.has_ce)
                         add_cross_entropy<T>(q, ce.scale, ce.target, ce.smooth, j, label, share.end, x,
                                              gradient);
                       store_vector(to, j, share.end, w.out_vector, q.storage, gradient);
                       j += apart;
                     }
                   });
  }
}

}  // namespace cmim::cuda
