// The gradient in one launch: a block takes a class and a part of its columns. Where every row has an
// upstream gradient of its own a launch before it finds what the rows' gradients have in common.
#include "gradient.cuh"
#include "launch.h"

namespace cmim::cuda {
namespace {

// upstream[position] = g_i less the class's mean, and dots[position, k] = sum_j P_ij rho_j. One block a
// class.
template <bool kMixed, class T>
__device__ void class_dots(Block<T>& b, const Backward<typename T::A>& w) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  A sum[1] = {0};
#pragma unroll 1
  for (int row = threadIdx.x; row < b.count; row += kThreads)
    sum[0] += w.grad[b.saved.row[b.first + row] * w.grad_stride];
  sum_group(sum, kThreads, b.scratch());
#pragma unroll 1
  for (int row = threadIdx.x; row < b.count; row += kThreads)
    w.upstream[b.first + row] = w.grad[b.saved.row[b.first + row] * w.grad_stride] - sum[0] / A(b.count);
  __syncthreads();

  const Constants3<T> c(b);
  const Tiling t = b.tiling(2);
  const int lane = threadIdx.x % t.lanes, group = threadIdx.x / t.lanes, batch = b.batch_rows(t);
  const int parts = t.lanes > kWarp ? t.lanes / kWarp : 1;
#pragma unroll 1
  for (int c0 = 0; c0 < q.classes; c0 += t.columns) {
    const int j = c0 + lane * kVector;
    build_gradient_tables<kMixed>(b, t, c0, true, w.upstream);
#pragma unroll 1
    for (int row0 = 0; row0 < b.count; row0 += batch) {
      const int rows = b.rows_in_batch(row0, batch);
#pragma unroll 1
      for (int k0 = 0; k0 < q.padded; k0 += T::kChunk) {
        Plain<T> form;
        stage_rows<Plain<T>>(b, row0, rows, k0, nullptr);
#pragma unroll 1
        for (int i0 = 0; i0 < rows; i0 += t.groups) {
          const int i = i0 + group;
          A dot[T::kChunk] = {};
          if (i < rows && j < q.classes) {
            form.load(b, b.data()[i], i, j, k0);
#pragma unroll
            for (int k = 0; k < T::kChunk; ++k) {
              const A* rho = b.table() + (q.padded + k0 + k) * t.columns + lane * kVector;
#pragma unroll
              for (int u = 0; u < kVector; ++u)
                dot[k] = form.add_mean_term(q, k0 + k, u, rho[u], A(0), dot[k]);
              form.next();
            }
          }
          deposit_sums(dot, t.lanes, c.sums + (i * parts + lane / kWarp) * T::kChunk);
        }
        __syncthreads();
#pragma unroll 1
        for (int at = threadIdx.x; at < rows * T::kChunk; at += kThreads) {
          const int i = at / T::kChunk, k = at - i * T::kChunk;
          A total = 0;
#pragma unroll 1
          for (int part = 0; part < parts; ++part) total += c.sums[(i * parts + part) * T::kChunk + k];
          const int64_t to = b.statistic(row0 + i, k0 + k);
          total /= b.saved.sum[to];
          w.dots[to] = c0 == 0 ? total : total + w.dots[to];
        }
        __syncthreads();
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    row_dots(const __grid_constant__ BackwardLaunch<typename T::A> p) {
  Block<T> b(p.problem, p.saved, p.backward.table_bytes, 0);
#pragma unroll 1
  for (int slot = blockIdx.x; slot < p.problem.slots; slot += gridDim.x) {
    recall_class(b, slot);
    if (b.count < 2) continue;
    if (b.centred) find_largest_column(b);
    if (b.centred)
      class_dots<true>(b, p.backward);
    else
      class_dots<false>(b, p.backward);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    gradient(const __grid_constant__ BackwardLaunch<typename T::A> p) {
  const auto& q = p.problem;
  const auto& w = p.backward;
  Block<T> b(q, p.saved, w.table_bytes, 0);
  const int parts = parts_of_each(w.items, int(p.saved.totals[kPresent]), w.parts);
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < int64_t(q.slots) * parts; item += gridDim.x) {
    const int slot = int(item % q.slots);
    if (p.saved.count[slot] == 0) continue;
    recall_class(b, slot);
    const Share share = share_of(b, int(item / q.slots), parts);
    if (share.begin >= share.end) continue;
    if (b.centred) find_largest_column(b);
    const bool cluster = q.has_cmi && (b.count > 1 || q.centroids);
    if (b.centred)
      class_gradient<true>(b, w, share, cluster);
    else
      class_gradient<false>(b, w, share, cluster);
  }
  other_rows_gradient<T>(q, w);
}

}  // namespace

template <class T>
Kernel<BackwardLaunch<typename T::A>> row_dots_kernel() {
  return row_dots<T>;
}
template <class T>
Kernel<BackwardLaunch<typename T::A>> gradient_kernel() {
  return gradient<T>;
}

#define CMIM_INSTANTIATE(S, A, chunk, chain)                                      \
  template Kernel<BackwardLaunch<A>> row_dots_kernel<Kind<S, A, chunk, chain>>(); \
  template Kernel<BackwardLaunch<A>> gradient_kernel<Kind<S, A, chunk, chain>>();
CMIM_FOR_EACH_KIND(CMIM_INSTANTIATE)

}  // namespace cmim::cuda
