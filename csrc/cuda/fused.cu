// The typical batch in one launch: a block takes a class, finds its rows, brings them on chip, and goes all
// the way to its share of the loss, and to its rows' gradient for an upstream gradient of one, if that is
// wanted. The block that finishes last adds the shares up.
//
// Where there are few classes, a cluster of blocks takes one: each has a part of the columns, and what they
// find in their parts of a row is added up by all of them alike, from global memory, after a barrier of the
// cluster. They write the same numbers to the same places of Saved then.
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

// Which part of which slot's cluster this block is. Asked again, too.
template <class A>
__device__ int parts(const Forward<A>& f) {
  return 1 << f.cluster;
}
template <class A>
__device__ int my_part(const Forward<A>& f) {
  return opaque(int(blockIdx.x)) & (parts(f) - 1);
}
template <class A>
__device__ int my_slot(const Forward<A>& f) {
  return opaque(int(blockIdx.x)) >> f.cluster;
}

// For what all parts have written before. In one block a barrier of its own is enough.
template <class A>
__device__ void wait_for_parts(const Forward<A>& f) {
  if (f.cluster > 0)
    cluster_barrier();
  else
    __syncthreads();
}

// What a part finds in each row, by turns in one of two places: whoever writes to the first again has waited
// for the others since they read it.
template <class T>
__device__ typename T::A* partial_at(const Block<T>& b, const Forward<typename T::A>& f, int turn, int part) {
  return f.partial + (turn * parts(f) + part) * (int64_t(b.q.rows) * b.q.padded);
}

// finish(row, k, sum of the parts), after waiting for them. Barrier after.
template <class T, class F>
__device__ void add_parts(const Block<T>& b, const Forward<typename T::A>& f, int turn, F finish) {
  wait_for_parts(f);
#pragma unroll 1
  for (int i = threadIdx.x; i < b.count * b.q.padded; i += kThreads) {
    const int row = i / b.q.padded, k = i - row * b.q.padded;
    typename T::A sum = 0;
#pragma unroll 1
    for (int part = 0; part < parts(f); ++part)
      sum += __ldcg(partial_at(b, f, turn, part) + b.statistic(row, k));
    finish(row, k, sum);
  }
  __syncthreads();
}

// What is known of each row by itself
template <class T>
__device__ void fused_statistics(Block<T>& b, const Forward<typename T::A>& f) {
  using A = typename T::A;
  const bool all = is_cluster(b), shared_sum = shares_sum(b.q, all);
  const auto place = [&](int part, int position) {
    return f.scanned + (int64_t(part) * b.q.rows + position) * kScanned;
  };
  scan_rows(b, b.count, !shared_sum, [&](int position, const RowSums<A>& s) {
    A* const to = place(my_part(f), position);
    to[kTop] = s.top, to[kExponentials] = s.exponentials, to[kWeighted] = s.weighted,
    to[kWeights] = s.weights;
  });
  wait_for_parts(f);
#pragma unroll 1
  for (int position = b.first + int(threadIdx.x); position < b.first + b.count; position += kThreads) {
    RowSums<A> s{lowest(A()), 0, 0, 0};
#pragma unroll 1
    for (int part = 0; part < parts(f); ++part)
      s.top = larger_or_nan(s.top, __ldcg(place(part, position) + kTop));
#pragma unroll 1
    for (int part = 0; part < parts(f); ++part) {
      const A* const from = place(part, position);
      s.exponentials += __ldcg(from + kExponentials) * exp_nonpositive(__ldcg(from + kTop) - s.top);
      s.weighted += __ldcg(from + kWeighted), s.weights += __ldcg(from + kWeights);
    }
    finish_scan(b, position, s, shared_sum, f.ce);
  }
  __syncthreads();
  if (!all) return;
  A* const to = partial_at(b, f, 0, my_part(f));
  sum_rows(b, b.count, [&](int row, int k, A sum) { to[b.statistic(row, k)] = sum; });
  // the cross entropy is for one part to finish: the others must not find its sum in place of the slope
  add_parts(b, f, 0,
            [&](int row, int k, A sum) { finish_sum(b, row, k, sum, shared_sum && my_part(f) == 0, f.ce); });
}

// From the rows' statistics to their divergences, in the form that each temperature needs, and their sums.
template <class T>
__device__ void fused_divergences(Block<T>& b, const Forward<typename T::A>& f) {
  using A = typename T::A;
  const auto mine = [&](int turn) { return partial_at(b, f, turn, my_part(f)); };
  const auto keep_in = [&](A* to) {
    return [&b, to](int row, int k, A sum) { to[b.statistic(row, k)] = sum; };
  };
  if (is_cluster(b) && b.q.centroids) {
    divergences<Given<T>>(b, b.tiling(Given<T>::kTables), b.begin, b.end, b.every_temperature(), mine(1));
    add_parts(b, f, 1, keep_in(f.kl));
    finish_given(b, f.kl);
  } else if (is_cluster(b)) {
    choose_scales(b);
    divergences<Plain<T>>(b, b.tiling(Plain<T>::kTables), b.begin, b.end, b.every_temperature(), mine(1));
    add_parts(b, f, 1, keep_in(b.saved.divergence));
  }
#pragma unroll 1
  for (;;) {
    const uint64_t collapsed = sum_class(b, f, my_slot(f), is_cluster(b) ? f.kl : nullptr, my_part(f) == 0);
    if (!collapsed || b.centred || b.q.centroids) return;
    b.forget();
    find_largest_column(b);
    A* const widest_of_parts = f.widest + int64_t(my_slot(f)) * parts(f);
    A widest = centred_sums(b, b.begin, b.end, collapsed, mine(0));
    if (threadIdx.x == 0) widest_of_parts[my_part(f)] = widest;
    add_parts(b, f, 0, keep_in(f.kl));
#pragma unroll 1
    for (int part = 0; part < parts(f); ++part)
      widest = larger_or_nan(widest, __ldcg(widest_of_parts + part));
    b.centred = not_too_wide(b, collapsed, widest);
    if (!b.centred) return;
    finish_centred_sums(b, b.centred, f.kl);
    b.forget();
    divergences<Centred<T>>(b, b.tiling(Centred<T>::kTables), b.begin, b.end, b.centred, mine(1));
    add_parts(b, f, 1, keep_in(f.kl));
    finish_centred(b, f.kl);
  }
}

// What the gradient of this batch is divided by, to b.divisors(); thread 0 has put the rows there.
template <class T>
__device__ void find_divisors(const Block<T>& b) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  A sums[2] = {};
  if (q.class_weight) {
#pragma unroll 1
    for (int i = threadIdx.x; i < q.rows; i += kThreads) {
      const int64_t label = target_at(q, i);
      if (kept(q, label)) sums[0] += q.class_weight[label];
    }
#pragma unroll 1
    for (int j = threadIdx.x; q.smoothing > A(0) && j < q.classes; j += kThreads)
      sums[1] += q.class_weight[j];
    sum_group(sums, kThreads, b.scratch());
  }
  if (threadIdx.x != 0) return;
  b.divisors()->weights = q.class_weight ? sums[0] : b.divisors()->rows;
  b.divisors()->smoothing = q.class_weight ? sums[1] : A(q.classes);
}

// The gradient of the class, which has come all the way through fused_divergences()
template <class T>
__device__ void fused_gradient(Block<T>& b, const Backward<typename T::A>& w) {
  find_divisors(b);
  b.forget();
  const Share share{b.begin, b.end, kThreads, 1};
  const bool one_tile = b.tiling(Plain<T>::kTables).columns >= b.width();
  class_gradient(b, w, share, is_cluster(b), false, one_tile && !b.centred);
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
  {
    const FoundClass found = find_class(q, my_slot(f), p.saved.row, b.flags());
    b.set_class(found.first, found.count, 0);
    if (threadIdx.x == 0 && blockIdx.x == 0) f.found[kBadLabels] = found.invalid;
    if (threadIdx.x == 0) b.divisors()->rows = typename T::A(found.kept);
  }
  b.begin = my_part(f) * f.width < q.classes ? my_part(f) * f.width : q.classes;
  b.end = b.begin + f.width < q.classes ? b.begin + f.width : q.classes;
  if (b.count > 0) {
    b.bring_rows();
    fused_statistics(b, f);
  }
  b.forget();
  fused_divergences(b, f);
  b.forget();
  if (q.reduction == kNone && my_part(f) == 0) store_rows(b, f, is_cluster(b) ? f.kl : nullptr);
  if (w.out) {
    if (b.count > 0) fused_gradient(b, w);
    other_rows_gradient<T>(q, w);
  }
  if (threadIdx.x == 0 && my_part(f) == 0) {
    p.saved.first[my_slot(f)] = b.first, p.saved.count[my_slot(f)] = b.count;
    keep_mask(p.saved, my_slot(f), b.centred);
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
