// The gradient in one launch: a block takes a class and a part of its columns. Where every row has an
// upstream gradient of its own a launch before it finds what the rows' gradients have in common.
#include "gradient.cuh"
#include "launch.h"

namespace cmim::cuda {
namespace {

// upstream[position] = g_i less the class's mean, and dots[position, k] = sum_j P_ij rho_j. One block a
// class.
template <class T>
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

  const Constants3<T> c(b, kMeans);
  const Tiling t = b.tiling(2 * q.padded);
#pragma unroll 1
  for (int c0 = 0; c0 < q.classes; c0 += t.columns) {
    build_gradient_tables(b, t, c0, true, w.upstream);
    clear_padding(b, t, 2);
    __syncthreads();
    const int columns = q.classes - c0 < t.columns ? q.classes - c0 : t.columns;
#pragma unroll 1
    for (int row0 = 0; row0 < b.count; row0 += kBatch) {
      const int rows = b.rows_in_batch(row0, kBatch), lanes = lanes_for_rows(rows, columns);
#pragma unroll 1
      for (int k0 = 0; k0 < q.padded; k0 += T::kChunk) {
        stage_rows<Plain<T>>(b, row0, rows, k0, nullptr);
        b.sum_over_columns(
            rows, lanes, c.sums,
            [&](int i, int lane, A(&dot)[T::kChunk]) {
              Plain<T> form;
#pragma unroll 1
              for (int column = lane * kVector; column < columns; column += lanes * kVector) {
                form.load(b, i, row0 + i, c0 + column, k0);
#pragma unroll
                for (int k = 0; k < T::kChunk; ++k) {
                  const A* const rho = b.table() + ((q.padded + k0 + k) << t.shift) + column;
#pragma unroll
                  for (int u = 0; u < kVector; ++u)
                    dot[k] = form.add_mean_term(q, k0 + k, u, rho[u], A(0), dot[k]);
                  form.next();
                }
              }
            },
            [&](int i, int k, A total) {
              const int64_t to = b.statistic(row0 + i, k0 + k);
              total /= b.saved.sum[to];
              w.dots[to] = c0 == 0 ? total : total + w.dots[to];
            });
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    row_dots(const __grid_constant__ BackwardLaunch<typename T::A> p) {
  Block<T> b(p.problem, p.saved, p.backward.table_bytes, 0, true);
#pragma unroll 1
  for (int slot = blockIdx.x; slot < p.problem.slots; slot += gridDim.x) {
    recall_class(b, slot);
    if (b.count < 2 && !counts_alone(b.q)) continue;
    if (b.centred) find_largest_column(b);
    class_dots(b, p.backward);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    gradient(const __grid_constant__ BackwardLaunch<typename T::A> p) {
  const auto& q = p.problem;
  const auto& w = p.backward;
  Block<T> b(q, p.saved, w.table_bytes, 0, true);
  const auto* const totals = p.saved.totals;
  if (threadIdx.x == 0) *b.divisors() = {totals[kKept], totals[kWeightSum], totals[kSmoothingSum]};
  const int parts = parts_of_each(w.items, int(totals[kPresent]), w.parts);
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < int64_t(q.slots) * parts; item += gridDim.x) {
    const int slot = int(item % q.slots);
    if (p.saved.count[slot] == 0) continue;
    recall_class(b, slot);
    const Share share = share_of(b, int(item / q.slots), parts);
    if (share.begin >= share.end) continue;
    if (b.centred) find_largest_column(b);
    const bool cluster = q.has_cmi && (b.count > 1 || counts_alone(q));
    const bool with_rho = cluster && q.reduction == kNone && !q.centroids;
    class_gradient(b, w, share, cluster, with_rho, false);
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
