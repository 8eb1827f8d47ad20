// From sums over classes to the value, and the word that tells the host of a label out of range.
#pragma once

#include "device.h"

namespace cmim::cuda {

template <class A>
__device__ inline A* class_sum(const Problem<A>& q, const Forward<A>& f, int which, int slot) {
  return f.sums + int64_t(which) * q.slots + slot;
}

// True in the last block of the grid to come here. What any block wrote before is visible to that one, if it
// reads with __ldcg.
__device__ inline bool last_to_finish(unsigned* ticket, int* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // for what the whole block wrote before the barrier
    const bool last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    *flag = last;
    if (last) *ticket = 0;  // for the next launch on this stream
  }
  __syncthreads();
  if (*flag) __threadfence();
  return *flag;
}

// The value from the sums over the first `slots` classes, by one block; NaN if there was a `bad` label.
// `scratch`: padded + kClassSums + kWarps numbers of shared memory.
template <class A>
__device__ inline void finish_value(const Problem<A>& q, const Forward<A>& f, int slots, bool bad, A* totals,
                                    A* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 1
  for (int which = warp; which < q.padded + kClassSums; which += kWarps) {
    constexpr int kAtOnce = 8;
    CarefulSum<A> sum;
#pragma unroll 1
    for (int slot0 = lane; slot0 < slots; slot0 += kAtOnce * kWarp) {
      A ahead[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int slot = slot0 + i * kWarp;
        ahead[i] = slot < slots ? __ldcg(class_sum(q, f, which, slot)) : A(0);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum.add(ahead[i]);
    }
    const A total = sum_over_warp(sum.value());
    if (lane == 0) scratch[which] = total;
  }
  __syncthreads();
  const A ce = scratch[q.padded + kClassCe], weight = scratch[q.padded + kClassWeight];
  const A kept = scratch[q.padded + kClassCount];
  A weights[1] = {0};  // over all classes
  if (q.smoothing > A(0)) {
    if (q.class_weight)
#pragma unroll 1
      for (int j = threadIdx.x; j < q.classes; j += kThreads) weights[0] += q.class_weight[j];
    else if (threadIdx.x == 0)
      weights[0] = A(q.classes);
    sum_group(weights, kThreads, scratch + q.padded + kClassSums);
  }
  if (threadIdx.x == 0) {
    totals[kSmoothingSum] = weights[0];
    totals[kKept] = kept, totals[kWeightSum] = weight;
    totals[kPresent] = scratch[q.padded + kClassPresent];
  }
  if (q.reduction == kSpectrum)
#pragma unroll 1
    for (int k = threadIdx.x; k < q.temperatures; k += kThreads)
      f.value[q.order[k]] = bad ? not_a_number<A>() : scratch[k] / kept;
  if (threadIdx.x != 0 || q.reduction == kNone || q.reduction == kSpectrum) return;
  A value = 0, cmi = 0;
  if (q.has_ce) {  // of rows without weight there is no mean, whatever label smoothing adds to it
    const A mean = weight == A(0) ? not_a_number<A>() : ce / weight;
    value += q.ce_weight * (q.reduction == kMean ? mean : ce);
  }
  if (q.has_cmi) {
#pragma unroll 1
    for (int k = 0; k < q.temperatures; ++k) cmi = fma(q.weight[k], scratch[k], cmi);
    value += q.cmi_weight * (q.reduction == kMean ? cmi / kept : cmi);
  }
  *f.value = bad ? not_a_number<A>() : value;
}

__device__ inline int64_t pack_label(int row, int64_t label) {
  if (label > kLargestLabel) label = kLargestLabel;
  if (label < -kLargestLabel) label = -kLargestLabel;
  return label * (int64_t(1) << kRowBits) + (1 + row);
}

// Rows that are in no class: 0 if ignored. A label out of range makes the value NaN and is told to the host,
// which raises in a later call; it is never used as an index. Rows are shared out over the grid.
template <class A>
__device__ inline void finish_other_rows(const Problem<A>& q, const Forward<A>& f) {
#pragma unroll 1
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < q.rows; i += gridDim.x * kThreads) {
    const int64_t label = q.target[i * q.target_stride];
    const bool ignored = label == q.ignore_index;
    if (!ignored && label >= 0 && label < q.classes) continue;
    if (q.reduction == kNone) f.value[i] = ignored ? A(0) : not_a_number<A>();
    if (!ignored && f.bad_label) *static_cast<volatile int64_t*>(f.bad_label) = pack_label(i, label);
  }
}

}  // namespace cmim::cuda
