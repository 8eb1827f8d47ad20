// Grouping the rows by label inside a block: it reads all targets and finds the rows of its own class.
#pragma once

#include "device.h"

namespace cmim::cuda {

template <class A>
__device__ inline bool kept(const Problem<A>& q, int64_t label) {
  return label >= 0 && label < q.classes && label != q.ignore_index;
}

template <class A>
__device__ inline int64_t target_at(const Problem<A>& q, int i) {
  return q.target[i * q.target_stride];
}

struct alignas(16) TargetPair {
  int64_t at[2];
};

// Targets i and i + 1; `none` where there are no more
template <class A>
__device__ inline TargetPair load_targets(const Problem<A>& q, int i, int64_t none) {
  if (q.target_pairs && i + 1 < q.rows) return *reinterpret_cast<const TargetPair*>(q.target + i);
  return {{i < q.rows ? target_at(q, i) : none, i + 1 < q.rows ? target_at(q, i + 1) : none}};
}

struct FoundClass {
  int first, count;   // count 0: this slot has no class
  int invalid, kept;  // in the whole batch: targets that are neither a class nor ignored, and classes
};

// Writes the rows of the class of this slot, in ascending order, to row[first ..]. `scratch` is 5 * kWarps
// integers of shared memory. Barrier after.
template <class A>
__device__ inline FoundClass find_class(const Problem<A>& q, int slot, int32_t* row, int* scratch) {
  constexpr int kCounts = 5;
  const int64_t label = q.by_class ? slot : target_at(q, slot);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int span = (q.rows + kWarps * 2 * kWarp - 1) / (kWarps * 2 * kWarp) * 2 * kWarp;
  const int begin = warp * span, end = begin + span < q.rows ? begin + span : q.rows;
  const int64_t none = q.ignore_index;

  int counts[kCounts] = {};  // rows of smaller labels, of this one, of this one before `slot`, invalid, kept
#pragma unroll 1
  for (int i = begin + 2 * lane; i < end; i += 2 * kWarp) {
    const TargetPair t = load_targets(q, i, none);
    for (int u = 0; u < 2; ++u) {
      const bool is_kept = kept(q, t.at[u]), same = is_kept && t.at[u] == label;
      counts[0] += is_kept && t.at[u] < label;
      counts[1] += same;
      counts[2] += same && i + u < slot;
      counts[3] += !is_kept && t.at[u] != q.ignore_index;
      counts[4] += is_kept;
    }
  }
  for (int n = 0; n < kCounts; ++n) {
    counts[n] = sum_over_warp(counts[n]);
    if (lane == 0) scratch[warp * kCounts + n] = counts[n];
  }
  __syncthreads();
  int before = 0;  // rows of this class in earlier warps
  int totals[kCounts] = {};
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w)
    for (int n = 0; n < kCounts; ++n) {
      if (n == 1 && w == warp) before = totals[1];
      totals[n] += scratch[w * kCounts + n];
    }
  const bool leads = kept(q, label) && (q.by_class || totals[2] == 0);
  FoundClass found{totals[0], leads ? totals[1] : 0, totals[3], totals[4]};
  if (found.count > 0) {
    int at = found.first + before;
#pragma unroll 1
    for (int i0 = begin; i0 < end; i0 += 2 * kWarp) {
      const int i = i0 + 2 * lane;
      const TargetPair t = load_targets(q, i, none);
      const bool even = i < end && t.at[0] == label, odd = i + 1 < end && t.at[1] == label;
      const unsigned evens = __ballot_sync(kEveryLane, even), odds = __ballot_sync(kEveryLane, odd);
      const unsigned below = (1u << lane) - 1;
      const int mine = at + __popc(evens & below) + __popc(odds & below);
      if (even) row[mine] = i;
      if (odd) row[mine + even] = i + 1;
      at += __popc(evens) + __popc(odds);
    }
  }
  __syncthreads();
  return found;
}

}  // namespace cmim::cuda
