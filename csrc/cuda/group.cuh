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

// Writes the rows of the class of this slot, in ascending order, to row[first ..], and the first kBatch of
// them to `near`. `scratch` is 5 * kWarps integers of shared memory. Barrier after.
template <class A>
__device__ inline FoundClass find_class(const Problem<A>& q, int slot, int32_t* row, int* near,
                                        int* scratch) {
  constexpr int kCounts = 5;
  const int64_t slots_label = q.by_class ? slot : target_at(q, slot);
  const int label = kept(q, slots_label) ? int(slots_label) : -1;
  const int ignored = q.ignore_index >= 0 && q.ignore_index < q.classes ? int(q.ignore_index) : -1;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int span = (q.rows + kWarps * 2 * kWarp - 1) / (kWarps * 2 * kWarp) * 2 * kWarp;
  const int begin = warp * span, end = begin + span < q.rows ? begin + span : q.rows;
  const int64_t none = q.ignore_index;

  int counts[kCounts] = {};  // rows of smaller labels, of this one, of this one before `slot`, invalid, kept
  uint64_t same = 0;         // two bits for each turn, see kMostGrouped
  int turn = 0;
#pragma unroll 1
  for (int i = begin + 2 * lane; i - 2 * lane < end; i += 2 * kWarp, ++turn) {
    const TargetPair t = load_targets(q, i, none);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int low = int(t.at[u]);
      if (uint64_t(t.at[u]) < uint64_t(q.classes) && low != ignored && i + u < end) {
        ++counts[4];
        counts[0] += low < label;
        if (low == label) {
          ++counts[1];
          counts[2] += i + u < slot;
          same |= uint64_t(1 + u) << 2 * turn;
        }
      } else {
        counts[3] += t.at[u] != q.ignore_index && i + u < end;
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kCounts; ++n) {
    counts[n] = sum_over_warp(counts[n]);
    if (lane == 0) scratch[warp * kCounts + n] = counts[n];
  }
  __syncthreads();
  int totals[kCounts];
#pragma unroll
  for (int n = 0; n < kCounts; ++n)
    totals[n] = sum_over_warp(lane < kWarps ? scratch[lane * kCounts + n] : 0);
  const int before = sum_over_warp(lane < warp ? scratch[lane * kCounts + 1] : 0);  // rows of earlier warps
  const bool leads = label >= 0 && (q.by_class || totals[2] == 0);
  const FoundClass found{totals[0], leads ? totals[1] : 0, totals[3], totals[4]};
  if (found.count > 0 && counts[1] > 0) {
    int at = before;
#pragma unroll 1
    for (int i = begin + 2 * lane; i - 2 * lane < end; i += 2 * kWarp, same >>= 2) {
      const bool even = same & 1, odd = same & 2;
      const unsigned evens = __ballot_sync(kEveryLane, even), odds = __ballot_sync(kEveryLane, odd);
      const unsigned below = (1u << lane) - 1;
      const int mine = at + __popc(evens & below) + __popc(odds & below);
      const auto put = [&](int to, int is) {
        row[found.first + to] = is;
        if (to < kBatch) near[to] = is;
      };
      if (even) put(mine, i);
      if (odd) put(mine + even, i + 1);
      at += __popc(evens) + __popc(odds);
    }
  }
  __syncthreads();
  return found;
}

}  // namespace cmim::cuda
