// What the kernels use of the machine: shared memory, copies, reductions over warps and blocks. The emulator
// of the host tests stands in for cuda_runtime.h and for the few instructions here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/arithmetic.h"
#include "problem.h"

namespace cmim::cuda {

constexpr unsigned kEveryLane = 0xffffffffu;

__device__ inline unsigned char* dynamic_shared_memory() {
#if defined(CMIM_EMULATED)
  return emulated_shared_memory();
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#endif
}

// 16 bytes from global to shared memory without a stop in registers; both aligned. wait_for_copies() in every
// thread that copied, then a barrier.
__device__ inline void copy16(void* shared, const void* global) {
#if defined(CMIM_EMULATED)
  emulated_copy16(shared, global);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}
__device__ inline void wait_for_copies() {
#if !defined(CMIM_EMULATED)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// n, of which the compiler knows nothing: what depends on it is not computed long before it is used, and
// takes no registers until then.
__device__ inline int opaque(int n) {
  asm volatile("" : "+r"(n));
  return n;
}

// The larger one; NaN if either is
__device__ inline float larger_or_nan(float x, float y) {
#if defined(CMIM_EMULATED)
  return x != x ? x : y > x || y != y ? y : x;
#else
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#endif
}
__device__ inline double larger_or_nan(double x, double y) {
  return x != x ? x : y > x || y != y ? y : x;
}

// Waits for the other blocks of the cluster (compute capability 9.0): what they wrote before it, to any
// memory, is there to be read after it. Code made for older devices cannot: current_device() asks which runs.
__device__ inline void cluster_barrier() {
#if defined(CMIM_EMULATED)
  emulated_cluster_barrier();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

template <class A>
__device__ inline A from_lane(A v, int distance) {
  return __shfl_xor_sync(kEveryLane, v, distance);
}

template <class V>
__device__ inline V sum_over_warp(V v) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) v += from_lane(v, distance);
  return v;
}

__device__ inline int sum_over_warp(int v) {
#if defined(CMIM_EMULATED)
  return sum_over_warp<int>(v);
#else
  return __reduce_add_sync(kEveryLane, v);
#endif
}

// Numbers as integers of the same order, in which NaN is the largest, and back
__device__ inline int ordered(float x) {
  const int bits = bit_cast<int>(x);
  return x != x ? 0x7fffffff : bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ inline float from_ordered(int key) {
  return bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff));
}
__device__ inline int largest_in_warp(int v) {
#if defined(CMIM_EMULATED)
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int other = from_lane(v, distance);
    v = other > v ? other : v;
  }
  return v;
#else
  return __reduce_max_sync(kEveryLane, v);
#endif
}

// The block's threads in groups of `lanes` neighbours, a power of two. Every thread of the block calls these
// together; `scratch` holds kWarps * N numbers of shared memory, and is free again when they return.
template <int N, class A, class Combine>
__device__ inline void reduce_group(A (&v)[N], int lanes, A* scratch, Combine combine) {
  for (int distance = (lanes < kWarp ? lanes : kWarp) / 2; distance > 0; distance /= 2)
    for (int i = 0; i < N; ++i) v[i] = combine(v[i], from_lane(v[i], distance));
  if (lanes <= kWarp) return;
  const int thread = opaque(int(threadIdx.x));
  const int warp = thread / kWarp, first = thread / lanes * (lanes / kWarp);
  if (thread % kWarp == 0)
    for (int i = 0; i < N; ++i) scratch[warp * N + i] = v[i];
  __syncthreads();
  for (int i = 0; i < N; ++i) {
    v[i] = scratch[first * N + i];
#pragma unroll 1
    for (int w = 1; w < lanes / kWarp; ++w) v[i] = combine(v[i], scratch[(first + w) * N + i]);
  }
  __syncthreads();
}
struct Plus {
  template <class A>
  __device__ A operator()(A x, A y) const {
    return x + y;
  }
};
struct Larger {
  template <class A>
  __device__ A operator()(A x, A y) const {
    return larger_or_nan(x, y);
  }
};
template <int N, class A>
__device__ inline void sum_group(A (&v)[N], int lanes, A* scratch) {
  reduce_group(v, lanes, scratch, Plus());
}
template <class A>
__device__ inline A largest_in_group(A x, int lanes, A* scratch) {
  A v[1] = {x};
  reduce_group(v, lanes, scratch, Larger());
  return v[0];
}

// K sums over a group of `lanes` threads: over its part of one warp. Where the group's row is `there` the
// sums go to to[0 .. K - 1], or are added to what is there; of the warps of a wider group each has its own
// `to`, and the reader adds them up. K is a power of two.
//
// 32 lanes and 8 sums take 9 exchanges, not 40: in each of the first three a lane keeps half of its sums and
// gives the other half away.
template <int K, class A>
__device__ inline void deposit_sums(A (&v)[K], int lanes, bool there, bool add, A* to) {
  const int lane = threadIdx.x % kWarp;
  if (lanes < kWarp) {
    for (int distance = lanes / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] += from_lane(v[k], distance);
    if (there && lane % lanes == 0)
#pragma unroll
      for (int k = 0; k < K; ++k) to[k] = add ? to[k] + v[k] : v[k];
    return;
  }
  int distance = kWarp / 2;
#pragma unroll
  for (int kept = K / 2; kept > 0; kept /= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int k = 0; k < kept; ++k) {
      const A given = upper ? v[k] : v[k + kept];
      v[k] = (upper ? v[k + kept] : v[k]) + from_lane(given, distance);
    }
    distance /= 2;
  }
#pragma unroll
  for (; distance > 0; distance /= 2) v[0] += from_lane(v[0], distance);
  if (!there || lane % (kWarp / K) != 0) return;
  A& mine = to[lane / (kWarp / K)];
  mine = add ? mine + v[0] : v[0];
}

// x / n, rounded once, for a number n at hand with its reciprocal
template <class A>
__device__ inline A divided(A x, A n, A reciprocal) {
  const A quotient = x * reciprocal;
  return fma(fma(-quotient, n, x), reciprocal, quotient);
}

__device__ inline int power_of_two_at_least(int n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

}  // namespace cmim::cuda
