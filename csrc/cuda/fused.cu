// The typical batch in one launch: a block takes a class, finds its rows, brings them on chip, and goes all
// the way to its share of the loss; the block that finishes last adds the shares up.
#include "classes.cuh"
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
    finish_centred_sums(b, kl);
    divergences<Centred<T>>(b, b.tiling(Centred<T>::kTables), 0, classes, b.centred, kl);
    finish_centred(b, kl);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    fused_forward(const __grid_constant__ ForwardLaunch<typename T::A> p) {
  const auto& q = p.problem;
  const auto& f = p.forward;
  Block<T> b(q, p.saved, f.table_bytes, f.chip_bytes);
  {
    const FoundClass found = find_class(q, blockIdx.x, p.saved.row, b.flags());
    b.set_class(found.first, found.count, 0);
    if (threadIdx.x == 0 && blockIdx.x == 0) f.found[kBadLabels] = found.invalid;
  }
  if (b.count > 0) {
    b.bring_rows();
    row_statistics(b, b.count, is_cluster(b), f.ce);
  }
  fused_divergences(b, f);
  if (q.reduction == kNone) store_rows(b, f, is_cluster(b) ? f.partial : nullptr);
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
