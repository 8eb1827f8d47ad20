// Large problems, in launches that follow each other on the stream; the rows come sorted by label:
//
//   count_classes, list_classes   which positions belong to which class
//   statistics                    of every row by itself
//   plain_divergences             of a class, by parts of its columns
//   sum_classes                   adds the parts up, and finds the classes that have collapsed
//   centred_parts, growths, centred_divergences, sum_classes again    for those; else they end at once
//   value
//
// Every kernel goes over its share of the rows, or of the items (parts of a class's columns), in a loop: the
// host does not know how many classes there are. Logits are read twice from memory, four times in collapsed
// classes; a tile's second reading finds it in a cache. Memory is O(K N), times the parts.
#include "classes.cuh"
#include "launch.h"

namespace cmim::cuda {
namespace {

// The positions that this block looks at when the classes are found
template <class A>
struct Span {
  int begin, end;
  __device__ explicit Span(const Problem<A>& q) {
    const int each = (q.rows + int(gridDim.x) - 1) / int(gridDim.x);
    begin = int(blockIdx.x) * each < q.rows ? int(blockIdx.x) * each : q.rows;
    end = begin + each < q.rows ? begin + each : q.rows;
  }
};

template <class A>
__device__ bool leads(const Problem<A>& q, const int64_t* sorted, int position) {
  const int64_t label = sorted[position];
  return kept(q, label) && (position == 0 || sorted[position - 1] != label);
}

// The first position after `position` with another label
__device__ inline int end_of_class(const int64_t* sorted, int position, int rows) {
  const int64_t label = sorted[position];
  int low = position + 1, high = rows;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (sorted[middle] == label)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Sums of two integers over the block, to every thread. flags: 2 * kWarps integers of shared memory.
__device__ inline void sum_over_block(int (&v)[2], int* flags) {
  __syncthreads();
  for (int n = 0; n < 2; ++n) {
    v[n] = sum_over_warp(v[n]);
    if (threadIdx.x % kWarp == 0) flags[threadIdx.x / kWarp * 2 + n] = v[n];
  }
  __syncthreads();
  v[0] = v[1] = 0;
  for (int w = 0; w < kWarps; ++w) v[0] += flags[2 * w], v[1] += flags[2 * w + 1];
  __syncthreads();
}

// saved.row, and how many classes begin in each block's positions
template <class A>
__global__ void __launch_bounds__(kThreads) count_classes(const __grid_constant__ ForwardLaunch<A> p) {
  int* const flags = reinterpret_cast<int*>(dynamic_shared_memory());
  const Problem<A>& q = p.problem;
  const Forward<A>& f = p.forward;
  const Span<A> span(q);
  int counts[2] = {};
#pragma unroll 1
  for (int at = span.begin + int(threadIdx.x); at < span.end; at += kThreads) {
    p.saved.row[at] = int(f.order[at]);
    counts[0] += leads(q, f.sorted, at);
    counts[1] += !kept(q, f.sorted[at]) && f.sorted[at] != q.ignore_index;
  }
  sum_over_block(counts, flags);
  if (threadIdx.x == 0) f.leaders[2 * blockIdx.x] = counts[0], f.leaders[2 * blockIdx.x + 1] = counts[1];
}

// saved.first and count, classes in ascending order from slot 0; and f.found. The same grid as count_classes.
template <class A>
__global__ void __launch_bounds__(kThreads) list_classes(const __grid_constant__ ForwardLaunch<A> p) {
  int* const flags = reinterpret_cast<int*>(dynamic_shared_memory());
  const Problem<A>& q = p.problem;
  const Forward<A>& f = p.forward;
  const Saved<A>& saved = p.saved;
  const Span<A> span(q);
  int before[2] = {}, found[2] = {};
#pragma unroll 1
  for (int block = threadIdx.x; block < int(gridDim.x); block += kThreads) {
    if (block < int(blockIdx.x)) before[0] += f.leaders[2 * block];
    found[0] += f.leaders[2 * block], found[1] += f.leaders[2 * block + 1];
  }
  sum_over_block(before, flags);
  sum_over_block(found, flags);
  if (threadIdx.x == 0 && blockIdx.x == 0)
    f.found[kClasses] = found[0], f.found[kBadLabels] = found[1], f.found[kCollapsedClasses] = 0;

  int slot = before[0];
  const int warp = threadIdx.x / kWarp;
  const unsigned below = (1u << threadIdx.x % kWarp) - 1;
#pragma unroll 1
  for (int at0 = span.begin; at0 < span.end; at0 += kThreads) {
    const int at = at0 + int(threadIdx.x);
    const bool leader = at < span.end && leads(q, f.sorted, at);
    const unsigned leaders = __ballot_sync(kEveryLane, leader);
    if (threadIdx.x % kWarp == 0) flags[warp] = __popc(leaders);
    __syncthreads();
    int mine = slot + __popc(leaders & below);
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) mine += flags[w];
      slot += flags[w];
    }
    if (leader) saved.first[mine] = at, saved.count[mine] = end_of_class(f.sorted, at, q.rows) - at;
    __syncthreads();
  }
#pragma unroll 1
  for (int s = blockIdx.x * kThreads + threadIdx.x; s < q.slots; s += gridDim.x * kThreads) {
    if (s >= found[0]) saved.count[s] = 0;
    keep_mask(saved, s, 0);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    statistics(const __grid_constant__ ForwardLaunch<typename T::A> p) {
  const auto& q = p.problem;
  const auto& f = p.forward;
  Block<T> b(q, p.saved, f.table_bytes, 0, true);
  const int vectors = power_of_two_at_least((q.classes + kVector - 1) / kVector);
  // a block a row for long rows, a warp for shorter ones, and several rows a warp for short ones
  const int lanes = vectors >= 1024 ? kThreads : vectors > kWarp ? kWarp : vectors;
  const int each = kThreads / lanes;
  // Rows that are alone in their class need the cross entropy's only.
  const bool every = counts_alone(q) || f.centroids;
#pragma unroll 1
  for (int at = blockIdx.x * each; at < q.rows; at += gridDim.x * each) {
    const int count = at + each < q.rows ? each : q.rows - at;
    b.set_class(at, count, 0);
    int shared_label = every;
#pragma unroll 1
    for (int i = at + int(threadIdx.x); i < at + count && !every; i += kThreads)
      shared_label |=
          (i > 0 && f.sorted[i - 1] == f.sorted[i]) || (i + 1 < q.rows && f.sorted[i + 1] == f.sorted[i]);
    const bool all = __syncthreads_or(shared_label) != 0, shared_sum = shares_sum(q, all);
    scan_rows(b, count, !shared_sum,
              [&](int position, const auto& sums) { finish_scan(b, position, sums, shared_sum, f.ce); });
    if (all)
      sum_rows(b, count, [&](int row, int k, auto sum) { finish_sum(b, row, k, sum, shared_sum, f.ce); });
  }
}

// Calls call(slot, part, share) for each of this block's items that has columns, and whose class `wanted()`
// asks for.
template <class T, class Wanted, class F>
__device__ void for_each_item(Block<T>& b, const Forward<typename T::A>& f, Wanted wanted, F call) {
  const int classes = f.found[kClasses], parts = parts_of_each(f.items, classes, f.parts);
#pragma unroll 1
  for (int item = blockIdx.x; item < classes * parts; item += gridDim.x) {  // < 2^31: see parts_of_each()
    const int slot = item / parts, part = item - slot * parts;
    recall_class(b, slot);
    if (!wanted()) continue;
    const Share share = share_of(b, part, parts);
    if (share.begin < share.end) call(slot, part, share);
  }
}

// Parts that the columns of the block's class were shared out in
template <class T>
__device__ int parts_of_class(const Block<T>& b, const Forward<typename T::A>& f) {
  return share_of(b, 0, parts_of_each(f.items, f.found[kClasses], f.parts)).parts;
}

template <class T>
__device__ bool alone(const Block<T>& b) {
  return b.count == 1 && !counts_alone(b.q);
}

template <class T>
__device__ typename T::A* part_of(const Block<T>& b, const Forward<typename T::A>& f, int part) {
  return f.partial + int64_t(part) * b.q.rows * b.q.padded;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    plain_divergences(const __grid_constant__ ForwardLaunch<typename T::A> p) {
  const auto& f = p.forward;
  Block<T> b(p.problem, p.saved, f.table_bytes, 0, true);
  for_each_item(
      b, f, [&] { return !alone(b); },
      [&](int, int part, const Share& share) {
        auto* const to = part_of(b, f, part);
        if (b.q.centroids)
          return divergences<Given<T>>(b, tiling_for<Given<T>>(b, share.lanes), share.begin, share.end,
                                       b.every_temperature(), to);
        choose_scales(b);  // by every part, which all write the same
        divergences<Plain<T>>(b, tiling_for<Plain<T>>(b, share.lanes), share.begin, share.end,
                              b.every_temperature(), to);
      });
}

// Adds up what the parts of a class's columns found, to to[position * padded + k]. Barrier after.
template <class T>
__device__ void collect_parts(const Block<T>& b, const Forward<typename T::A>& f, typename T::A* to) {
  const int64_t from = b.statistic(0, 0);
  const int parts = parts_of_class(b, f);
#pragma unroll 1
  for (int i = threadIdx.x; i < b.count * b.q.padded; i += kThreads) {
    typename T::A sum = f.partial[from + i];
#pragma unroll 1
    for (int part = 1; part < parts; ++part) sum += part_of(b, f, part)[from + i];
    to[from + i] = sum;
  }
  __syncthreads();
}

// Sums over classes, and which of them have collapsed; `kAgain`: for those, after the centred form.
template <class T, bool kAgain>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    sum_classes(const __grid_constant__ ForwardLaunch<typename T::A> p) {
  const auto& q = p.problem;
  const auto& f = p.forward;
  Block<T> b(q, p.saved, f.table_bytes, 0, true);
  if (kAgain && f.found[kCollapsedClasses] == 0) return;
#pragma unroll 1
  for (int slot = blockIdx.x; slot < f.found[kClasses]; slot += gridDim.x) {
    recall_class(b, slot);
    if (kAgain && !b.centred) continue;
    const bool cluster = q.has_cmi && !alone(b);
    if (cluster) {
      collect_parts(b, f, kAgain || q.centroids ? f.partial : b.saved.divergence);
      if (kAgain) finish_centred(b, f.partial);
      if (q.centroids) finish_given(b, f.partial);
    }
    const uint64_t collapsed = sum_class(b, f, slot, cluster ? f.partial : nullptr, true);
    if (q.reduction == kNone) store_rows(b, f, cluster ? f.partial : nullptr);
    if (kAgain || !collapsed || q.centroids || threadIdx.x != 0) continue;
    keep_mask(b.saved, slot, collapsed);
    f.found[kCollapsedClasses] = 1;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    centred_parts(const __grid_constant__ ForwardLaunch<typename T::A> p) {
  const auto& f = p.forward;
  Block<T> b(p.problem, p.saved, f.table_bytes, 0, true);
  if (f.found[kCollapsedClasses] == 0) return;
  for_each_item(
      b, f, [&] { return b.centred != 0; },
      [&](int slot, int part, const Share& share) {
        find_largest_column(b);
        const auto widest = centred_sums(b, share.begin, share.end, b.centred, part_of(b, f, part));
        // f.widest has f.parts columns, of which only the class's parts are in use
        if (threadIdx.x == 0) f.widest[int64_t(slot) * f.parts + part] = widest;
      });
}

// saved.growth of the collapsed classes, and their final masks
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    growths(const __grid_constant__ ForwardLaunch<typename T::A> p) {
  using A = typename T::A;
  const auto& f = p.forward;
  Block<T> b(p.problem, p.saved, f.table_bytes, 0, true);
  if (f.found[kCollapsedClasses] == 0) return;
#pragma unroll 1
  for (int slot = blockIdx.x; slot < f.found[kClasses]; slot += gridDim.x) {
    recall_class(b, slot);
    if (!b.centred) continue;
    const int parts = parts_of_class(b, f);
    A widest = 0;
#pragma unroll 1
    for (int part = 0; part < parts; ++part)
      widest = larger(f.widest[int64_t(slot) * f.parts + part], widest);
    const uint64_t mask = not_too_wide(b, b.centred, widest);
    collect_parts(b, f, f.partial);
    finish_centred_sums(b, mask, f.partial);
    if (threadIdx.x == 0) keep_mask(b.saved, slot, mask);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    centred_divergences(const __grid_constant__ ForwardLaunch<typename T::A> p) {
  const auto& f = p.forward;
  Block<T> b(p.problem, p.saved, f.table_bytes, 0, true);
  if (f.found[kCollapsedClasses] == 0) return;
  for_each_item(
      b, f, [&] { return b.centred != 0; },
      [&](int, int part, const Share& share) {
        find_largest_column(b);
        divergences<Centred<T>>(b, tiling_for<Centred<T>>(b, share.lanes), share.begin, share.end, b.centred,
                                part_of(b, f, part));
      });
}

template <class A>
__global__ void __launch_bounds__(kThreads) value(const __grid_constant__ ForwardLaunch<A> p) {
  const Forward<A>& f = p.forward;
  finish_other_rows(p.problem, f);
  if (blockIdx.x == 0 && f.value)
    finish_value(p.problem, f, f.found[kClasses], f.found[kBadLabels] != 0, p.saved.totals,
                 reinterpret_cast<A*>(dynamic_shared_memory()));
}

// The centroids themselves, for class_centroids
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<typename T::A>)
    centroids(const __grid_constant__ ForwardLaunch<typename T::A> p) {
  using A = typename T::A;
  const Problem<A>& q = p.problem;
  const Forward<A>& f = p.forward;
  Block<T> b(q, p.saved, f.table_bytes, 0, true);
  for_each_item(
      b, f, [] { return true; },
      [&](int, int part, const Share& share) {
        const Tiling t = b.tiling(q.padded, share.lanes);
        const int64_t label = b.label();
        choose_scales(b);
#pragma unroll 1
        for (int c0 = share.begin; c0 < share.end; c0 += t.columns)
#pragma unroll 1
          for (int k0 = 0; k0 < q.padded; k0 += T::kChunk)
            sum_over_rows<Plain<T>>(b, t, c0, k0, b.every_temperature(), static_cast<const A*>(nullptr),
                                    b.table(), [&](int k, int column, A sum) {
                                      const int j = c0 + column;
                                      const A mean = sum / (A(b.count) * plain_scale(b, k0 + k));
                                      if (j < q.classes)
                                        f.centroids[(q.order[k0 + k] * q.classes + label) * q.classes + j] =
                                            mean;
                                      return mean;
                                    });
        if (threadIdx.x == 0 && part == 0) f.counts[label] = b.count;
      });
}

}  // namespace

template <class T>
TiledKernels<typename T::A> tiled_kernels() {
  using A = typename T::A;
  return {count_classes<A>,      list_classes<A>,  statistics<T>, plain_divergences<T>,
          sum_classes<T, false>, centred_parts<T>, growths<T>,    centred_divergences<T>,
          sum_classes<T, true>,  value<A>,         centroids<T>};
}

#define CMIM_INSTANTIATE(S, A, chunk, chain) \
  template TiledKernels<A> tiled_kernels<Kind<S, A, chunk, chain>>();
CMIM_FOR_EACH_KIND(CMIM_INSTANTIATE)

}  // namespace cmim::cuda
