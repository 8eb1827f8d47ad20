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
#include "host.h"
#include "launch.h"
#include "onchip.cuh"

namespace cmim::cuda {
namespace {

// Whether the class's divergences count. Asked again rather than kept: registers are scarce.
template <class T>
__device__ bool is_cluster(const Block<T>& b) {
  return b.q.has_cmi && (b.count > 1 || (b.count == 1 && counts_alone(b.q)));
}

// Which part of which slot's class this block takes, also asked again rather than kept. Kernels for powers
// have one part to a class.
template <class T>
__device__ int parts(const Forward<typename T::A>& f) {
  return T::kChain ? 1 : 1 << f.log2_parts;
}
template <class T>
__device__ int my_part(const Forward<typename T::A>& f) {
  return opaque(int(blockIdx.x)) & (parts<T>(f) - 1);
}
template <class T>
__device__ int my_slot(const Forward<typename T::A>& f) {
  return T::kChain ? opaque(int(blockIdx.x)) : opaque(int(blockIdx.x)) >> f.log2_parts;
}

// For what all parts have written before. In one block a barrier of its own is enough.
template <class T>
__device__ void wait_for_parts(const Forward<typename T::A>& f) {
  if (parts<T>(f) > 1)
    cluster_barrier();
  else
    __syncthreads();
}

// What a part finds in each row, by turns in one of two places: whoever writes to the first again has waited
// for the others since they read it.
template <class T>
__device__ typename T::A* partial_at(const Block<T>& b, const Forward<typename T::A>& f, int turn, int part) {
  return f.partial + (turn * parts<T>(f) + part) * (int64_t(b.q.rows) * b.q.padded);
}

// Where a sum goes that the parts find: to `whole` where there is one part, else to a place of this one's
template <class T>
__device__ typename T::A* sums_to(const Block<T>& b, const Forward<typename T::A>& f, int turn,
                                  typename T::A* whole) {
  return parts<T>(f) == 1 ? whole : partial_at(b, f, turn, my_part<T>(f));
}

// finish(row, k, sum of the parts) of k < `most`, after waiting for them, where there are several. Barrier
// after.
template <class T, class F>
__device__ void add_parts(const Block<T>& b, const Forward<typename T::A>& f, int turn, int most, F finish) {
  if (parts<T>(f) == 1) return;
  wait_for_parts<T>(f);
#pragma unroll 1
  for (int i = threadIdx.x; i < b.count * most; i += kThreads) {
    const int row = i / most, k = i - row * most;
    typename T::A sum = 0;
#pragma unroll 1
    for (int part = 0; part < parts<T>(f); ++part)
      sum += __ldcg(partial_at(b, f, turn, part) + b.statistic(row, k));
    finish(row, k, sum);
  }
  __syncthreads();
}
template <class T>
__device__ void add_parts(const Block<T>& b, const Forward<typename T::A>& f, int turn,
                          typename T::A* whole) {
  add_parts(b, f, turn, b.q.padded,
            [&](int row, int k, typename T::A sum) { whole[b.statistic(row, k)] = sum; });
}

// Where a part leaves what it finds in a row before its sums
template <class A>
__device__ A* scanned_at(const Problem<A>& q, const Forward<A>& f, int part, int position) {
  return f.scanned + (int64_t(part) * q.rows + position) * kScanned;
}

// The rows' largest logits, and the rest of their cross entropy. Barrier after.
template <class T>
__device__ void fused_scan(Block<T>& b, const Forward<typename T::A>& f, const Tiling& t) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  if (q.smoothing > A(0))
    b.template sum_by_rows<2>(
        t, b.begin, b.end, [](int, int) {},
        [&](int, int row, int j, A(&sum)[2]) {
          A z[kVector];
          load_vector(b.row_at(b.row_data(row)), j, q.storage, z);
          const A anchor = smoothing_anchor(b.logit(row, b.label()));
          for (int u = 0; u < kVector && j + u < b.end; ++u) {
            const A w = q.class_weight ? q.class_weight[j + u] : A(1);
            sum[0] += w * (z[u] - anchor), sum[1] += w;
          }
        },
        [&](int row, int k, A sum) {
          scanned_at(q, f, my_part<T>(f), b.first + row)[k == 0 ? kWeighted : kWeights] = sum;
        });

  const int lanes = t.lanes < kWarp ? t.lanes : kWarp;
  A* const tops = b.combine();  // (rows of a batch, warps of a row)
#pragma unroll 1
  for (int row0 = 0; row0 < b.count; row0 += kBatch) {
    const int rows = b.rows_in_batch(row0, kBatch);
#pragma unroll 1
    for (int i0 = 0; i0 < rows; i0 += t.groups) {
      const int i = i0 + t.group();
      A top = lowest(A());
      if (i < rows) {
        const Row<typename T::S> row = b.row_at(b.row_data(row0 + i));
#pragma unroll 1
        for (int j = b.begin + t.column(); j < b.end; j += t.columns) {
          A z[kVector];
          load_vector(row, j, q.storage, z);
#pragma unroll
          for (int u = 0; u < kVector; ++u) top = larger_or_nan(top, z[u]);
        }
      }
      for (int distance = lanes / 2; distance > 0; distance /= 2)
        top = larger_or_nan(top, from_lane(top, distance));
      if (i < rows && (threadIdx.x & (lanes - 1)) == 0) tops[i * t.warps() + t.warp()] = top;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < rows; i += kThreads) {
      A top = lowest(A());
#pragma unroll 1
      for (int w = 0; w < t.warps(); ++w) top = larger_or_nan(top, tops[i * t.warps() + w]);
      scanned_at(q, f, my_part<T>(f), b.first + row0 + i)[kTop] = top;
    }
    __syncthreads();
  }

  wait_for_parts<T>(f);
#pragma unroll 1
  for (int position = b.first + int(threadIdx.x); position < b.first + b.count; position += kThreads) {
    RowSums<A> s{lowest(A()), 0, 0, 0};
#pragma unroll 1
    for (int part = 0; part < parts<T>(f); ++part) {
      const A* const from = scanned_at(q, f, part, position);
      s.top = larger_or_nan(s.top, __ldcg(from + kTop));
      if (q.smoothing > A(0)) s.weighted += __ldcg(from + kWeighted), s.weights += __ldcg(from + kWeights);
    }
    finish_scan(b, position, s, true, f.ce);
  }
  __syncthreads();
}

// What is known of each row by itself
template <class T>
__device__ void fused_statistics(Block<T>& b, const Forward<typename T::A>& f) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const bool all = is_cluster(b), shared_sum = shares_sum(q, all);
  const Tiling t = b.tiling(1);
  fused_scan(b, f, t);

  const auto stage = [&](int row0, int rows) {
    b.stage(kTops, stage_key(row0, 0), row0, rows, 0, [](int, int) {}, [](int, int, int) {});
  };
  // The cross entropy is for one part to finish: the others must not find its sum in place of the slope.
  const auto finish_ce = [&](int row, int, A sum) {
    if (my_part<T>(f) == 0) finish_cross_entropy(b, b.first + row, sum, f.ce);
  };
  if (!shared_sum) {
    b.template sum_by_rows<1>(
        t, b.begin, b.end, stage,
        [&](int i, int, int j, A(&sum)[1]) {
          A z[kVector];
          load_vector(b.row_at(b.data()[i]), j, q.storage, z);
#pragma unroll
          for (int u = 0; u < kVector; ++u) sum[0] += exp_nonpositive(z[u] - b.top()[i]);
        },
        [&](int row, int k, A sum) {
          if (parts<T>(f) == 1) return finish_ce(row, k, sum);
          partial_at(b, f, 1, my_part<T>(f))[b.statistic(row, 0)] = sum;
        });
    add_parts(b, f, 1, 1, finish_ce);
  }
  if (!all) return wait_for_parts<T>(f);
  const auto finish = [&](int row, int k, A sum) {
    finish_sum(b, row, k, sum, shared_sum && my_part<T>(f) == 0, f.ce);
  };
#pragma unroll 1
  for (int k0 = 0; k0 < q.padded; k0 += T::kChunk)
    b.template sum_by_rows<T::kChunk>(
        t, b.begin, b.end, stage,
        [&](int i, int row, int j, A(&sum)[T::kChunk]) {
          add_exponentials(b, b.row_at(b.data()[i]), b.top()[i], row, j, k0, sum);
        },
        [&](int row, int k, A sum) {
          if (parts<T>(f) == 1) return finish(row, k0 + k, sum);
          partial_at(b, f, 0, my_part<T>(f))[b.statistic(row, k0 + k)] = sum;
        });
  add_parts(b, f, 0, q.padded, finish);
}

// From the rows' statistics to their divergences, in the form that each temperature needs, and their sums.
template <class T>
__device__ void fused_divergences(Block<T>& b, const Forward<typename T::A>& f) {
  using A = typename T::A;
  // Turns alternate: fused_statistics() took 1 and 0.
  const auto find = [&](auto form, uint64_t wanted, int turn, A* whole) {
    using F = decltype(form);
    divergences<F>(b, tiling_for<F>(b), b.begin, b.end, wanted, sums_to(b, f, turn, whole));
    add_parts(b, f, turn, whole);
  };
  if (is_cluster(b) && b.q.centroids) {
    find(Given<T>(), b.every_temperature(), 1, f.kl);
    finish_given(b, f.kl);
  } else if (is_cluster(b)) {
    choose_scales(b);
    find(Plain<T>(), b.every_temperature(), 1, b.saved.divergence);
  }
#pragma unroll 1
  for (;;) {
    const uint64_t collapsed =
        sum_class(b, f, my_slot<T>(f), is_cluster(b) ? f.kl : nullptr, my_part<T>(f) == 0);
    if (!collapsed || b.centred || b.q.centroids) return;
    b.forget();
    find_largest_column(b);
    A* const widest_of_parts = f.widest + int64_t(my_slot<T>(f)) * parts<T>(f);
    A widest = centred_sums(b, b.begin, b.end, collapsed, sums_to(b, f, 0, f.kl));
    if (threadIdx.x == 0) widest_of_parts[my_part<T>(f)] = widest;
    add_parts(b, f, 0, f.kl);
#pragma unroll 1
    for (int part = 0; part < parts<T>(f) && parts<T>(f) > 1; ++part)
      widest = larger_or_nan(widest, __ldcg(widest_of_parts + part));
    b.centred = not_too_wide(b, collapsed, widest);
    if (!b.centred) return;
    finish_centred_sums(b, b.centred, f.kl);
    b.forget();
    find(Centred<T>(), b.centred, 1, f.kl);
    finish_centred(b, f.kl);
  }
}

// The gradient of the class, which has come all the way through fused_divergences()
template <class T>
__device__ void fused_gradient(Block<T>& b, const Backward<typename T::A>& w) {
  find_divisors(b);
  __syncthreads();
  b.forget();
  const Share share{b.begin, b.end, kThreads, 1};
  const bool one_tile = tiling_for<Plain<T>>(b).columns >= b.width();
  class_gradient(b, w, share, is_cluster(b), false, one_tile && !b.centred);
}

// All that a class needs, by way of Saved
template <class T>
__device__ __forceinline__ void whole_class(Block<T>& b, const Forward<typename T::A>& f,
                                            const Backward<typename T::A>& w) {
  const Problem<typename T::A>& q = b.q;
  b.forget();
  b.begin = my_part<T>(f) * f.width < q.classes ? my_part<T>(f) * f.width : q.classes;
  b.end = b.begin + f.width < q.classes ? b.begin + f.width : q.classes;
  b.bring_rows();
  fused_statistics(b, f);
  b.forget();
  fused_divergences(b, f);
  b.forget();
  if (q.reduction == kNone && my_part<T>(f) == 0) store_rows(b, f, is_cluster(b) ? f.kl : nullptr);
  if (w.out) fused_gradient(b, w);
}

// The same on chip, if it can be done there
template <class T>
__device__ __forceinline__ bool on_chip(Block<T>& b, const Forward<typename T::A>& f,
                                        const Backward<typename T::A>& w) {
  if constexpr (T::kChain) {
    OnChip<T> chip(b, f);
    if (!chip.serves()) return false;
    chip.run(my_slot<T>(f), is_cluster(b), w);
    return true;
  }
  return false;
}

// Whether the gradient that forward left is rounded no second time when it is scaled, and rows that are
// ignored stay 0
template <class T>
__device__ bool scales_exactly(const Problem<typename T::A>& q, typename T::A upstream) {
  if (upstream - upstream != 0) return false;   // infinite or NaN
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
  Block<T> b(q, p.saved, f.table_bytes, f.chip_bytes, false);
  {
    if constexpr (T::kChain) OnChip<T>::prepare();
    const FoundClass found =
        find_class(q, my_slot<T>(f), p.saved.row, reinterpret_cast<int*>(b.data()), b.flags());
    b.set_class(found.first, found.count, 0);
    if (threadIdx.x == 0 && blockIdx.x == 0) f.found[kBadLabels] = found.invalid;
    if (threadIdx.x == 0) b.divisors()->rows = typename T::A(found.kept);
  }
  const bool first_part = my_part<T>(f) == 0;
  if (b.count == 0) {
    if (first_part) tell_no_class(q, f, my_slot<T>(f));
  } else if (!on_chip(b, f, w)) {
    whole_class(b, f, w);
  }
  if (w.out) other_rows_gradient<T>(q, w);
  if (threadIdx.x == 0 && first_part) {
    p.saved.first[my_slot<T>(f)] = b.first, p.saved.count[my_slot<T>(f)] = b.count;
    keep_mask(p.saved, my_slot<T>(f), b.centred);
  }
  finish_other_rows(q, f);
  if (last_to_finish(f.ticket, b.flags()))
    finish_value(q, f, q.slots, __ldcg(f.found + kBadLabels) != 0, p.saved.totals, b.combine());
}

__device__ unsigned tickets[kTickets];

}  // namespace

unsigned* ticket_table() {
  void* table = nullptr;
  check(cudaGetSymbolAddress(&table, tickets), "finding the counters of the fused kernel");
  return static_cast<unsigned*>(table);
}

int code_version() {
  cudaFuncAttributes found{};
  const cudaError_t error =
      cudaFuncGetAttributes(&found, fused_forward<Kind<float, float, kDirectChunk, false>>);
  return error == cudaSuccess ? found.ptxVersion : 0;
}

template <class T>
Kernel<ForwardLaunch<typename T::A>> fused_kernel() {
  return fused_forward<T>;
}

#define CMIM_INSTANTIATE(S, A, chunk, chain) \
  template Kernel<ForwardLaunch<A>> fused_kernel<Kind<S, A, chunk, chain>>();
CMIM_FOR_EACH_KIND(CMIM_INSTANTIATE)

}  // namespace cmim::cuda
