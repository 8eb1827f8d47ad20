// The typical batch in one launch: a block takes a class, finds its rows, brings them on chip, and goes all
// the way to its share of the loss, and to its rows' gradient for an upstream gradient of one, if that is
// wanted. The block that finishes last adds the shares up.
#include "classes.cuh"
#include "gradient.cuh"
#include "group.cuh"
#include "launch.h"

namespace cmim::cuda {
namespace {

// Whether the class's divergences count. Asked again rather than kept: registers are scarce.
template <class T>
__device__ bool is_cluster(const Block<T>& b) {
  return b.q.has_cmi && (b.count > 1 || (b.count == 1 && b.q.centroids));
}

// From the rows' statistics to their divergences, in the form that each temperature needs, and their sums.
template <class T>
__device__ void fused_divergences(Block<T>& b, const Forward<typename T::A>& f) {
  const int classes = b.q.classes;
  const bool cluster = is_cluster(b);
  auto* const kl = f.partial;
  if (cluster && b.q.centroids) {
    divergences<Given<T>>(b, b.tiling(Given<T>::kTables), 0, classes, b.every_temperature(), kl);
    finish_given(b, kl);
  } else if (cluster) {
    choose_scales(b);
    divergences<Plain<T>>(b, b.tiling(Plain<T>::kTables), 0, classes, b.every_temperature(),
                          b.saved.divergence);
  }
#pragma unroll 1
  for (;;) {
    const uint64_t collapsed = sum_class(b, f, blockIdx.x, cluster ? kl : nullptr);
    if (!collapsed || b.centred || b.q.centroids) return;
    find_largest_column(b);
    b.centred = not_too_wide(b, collapsed, centred_sums(b, 0, classes, collapsed, kl));
    if (!b.centred) return;
    finish_centred_sums(b, b.centred, kl);
    divergences<Centred<T>>(b, b.tiling(Centred<T>::kTables), 0, classes, b.centred, kl);
    finish_centred(b, kl);
  }
}

// What the gradient of this batch is divided by. To every thread.
template <class T>
__device__ Divisors<typename T::A> divisors(const Block<T>& b, int kept_rows) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  if (!q.class_weight) return {A(kept_rows), A(kept_rows), A(q.classes)};
  A sums[2] = {};
#pragma unroll 1
  for (int i = threadIdx.x; i < q.rows; i += kThreads) {
    const int64_t label = target_at(q, i);
    if (kept(q, label)) sums[0] += q.class_weight[label];
  }
#pragma unroll 1
  for (int j = threadIdx.x; q.smoothing > A(0) && j < q.classes; j += kThreads) sums[1] += q.class_weight[j];
  sum_group(sums, kThreads, b.scratch());
  return {A(kept_rows), sums[0], sums[1]};
}

// The gradient of the class, which has come all the way through fused_divergences()
template <class T>
__device__ void fused_gradient(Block<T>& b, const Backward<typename T::A>& w, int kept_rows) {
  const auto by = divisors(b, kept_rows);
  const bool cluster = is_cluster(b);
  const Share all{0, b.q.classes, kThreads, 1};
  if (b.centred)
    class_gradient<true>(b, w, by, all, cluster, false, false);
  else
    class_gradient<false>(b, w, by, all, cluster, false, b.tiling(Plain<T>::kTables).columns >= all.end);
}

// Whether the gradient that forward left is rounded no second time when it is scaled
template <class T>
__device__ bool scales_exactly(const Problem<typename T::A>& q, typename T::A upstream) {
  if (q.storage != Storage::bf16) return true;  // it is rounded once more, as its own sums were
  const auto bits = bit_cast<uint32_t>(float(upstream));
  return (bits & 0x7fffffu) == 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    fused_forward(const __grid_constant__ ForwardLaunch<typename T::A> p) {
  const auto& q = p.problem;
  const auto& f = p.forward;
  const auto& w = p.backward;
  if (w.kept && scales_exactly<T>(q, *w.grad)) {
    scale_kept<T>(q, w);
    return;
  }
  Block<T> b(q, p.saved, f.table_bytes, f.chip_bytes);
  int kept_rows;
  {
    const FoundClass found = find_class(q, blockIdx.x, p.saved.row, b.flags());
    b.set_class(found.first, found.count, 0);
    if (threadIdx.x == 0 && blockIdx.x == 0) f.found[kBadLabels] = found.invalid;
    kept_rows = found.kept;
  }
  if (b.count > 0) {
    b.bring_rows();
    row_statistics(b, b.count, is_cluster(b), f.ce);
  }
  fused_divergences(b, f);
  if (q.reduction == kNone) store_rows(b, f, is_cluster(b) ? f.partial : nullptr);
  if (w.out) {
    if (b.count > 0) fused_gradient(b, w, kept_rows);
    other_rows_gradient<T>(q, w);
  }
  if (threadIdx.x == 0) {
    const int slot = blockIdx.x;
    p.saved.first[slot] = b.first, p.saved.count[slot] = b.count;
    keep_mask(p.saved, slot, b.centred);
  }
  finish_other_rows(q, f);
  if (last_to_finish(f.ticket, b.flags()))
    finish_value(q, f, q.slots, __ldcg(f.found + kBadLabels) != 0, p.saved.totals, b.combine());
}

__device__ unsigned tickets[kTickets];

}  // namespace

unsigned* ticket_table() {
  void* table = nullptr;
  if (cudaGetSymbolAddress(&table, tickets) != cudaSuccess) return nullptr;
  return static_cast<unsigned*>(table);
}

template <class T>
Kernel<ForwardLaunch<typename T::A>> fused_kernel() {
  return fused_forward<T>;
}

#define CMIM_INSTANTIATE(S, A, chunk, chain) \
  template Kernel<ForwardLaunch<A>> fused_kernel<Kind<S, A, chunk, chain>>();
CMIM_FOR_EACH_KIND(CMIM_INSTANTIATE)

}  // namespace cmim::cuda
