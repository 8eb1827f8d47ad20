// Stands in for CUDA's header of that name, so that the kernels of csrc/cuda compile for the host and run
// there as they are: every thread of a block is a fiber, which runs until it waits for others at a barrier or
// an exchange between lanes. One host thread runs them all, so results do not depend on timing; the order in
// which waiting fibers are resumed is the caller's choice, and a result that depends on it shows a race.
//
// What it shows besides: barriers and exchanges that not every thread reaches (an error), shared memory that
// is read before it is written (it is filled with NaN), shared memory beyond what was asked for (a guard page
// on either side), and, compiled with -fsanitize=alignment, vectors that are not aligned. What it cannot
// show: speed, and memory ordering between blocks, which run one after the other.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define CMIM_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned n = 1) : x(n) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

unsigned char* emulated_shared_memory();
void __syncthreads();
int __syncthreads_or(int vote);
void emulated_cluster_barrier();
// 16 bytes, both addresses at a multiple of that (an error if not)
void emulated_copy16(void* to, const void* from);
// Every lane of the warp gives 8 bytes and gets those of lane `from`.
uint64_t emulated_exchange(uint64_t mine, int from);
unsigned __ballot_sync(unsigned mask, bool vote);

template <class V>
V __shfl_xor_sync(unsigned, V v, int distance) {
  static_assert(sizeof(V) <= 8, "");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  bits = emulated_exchange(bits, int(threadIdx.x % 32) ^ distance);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline void __threadfence() {}
inline void __threadfence_system() {}
template <class V>
V __ldcg(const V* p) {
  return *p;
}
template <class V>
V atomicAdd(V* p, V x) {
  const V old = *p;
  *p = old + x;
  return old;
}
inline unsigned atomicOr(unsigned* p, unsigned x) {
  const unsigned old = *p;
  *p = old | x;
  return old;
}
inline int atomicMax(int* p, int x) {
  const int old = *p;
  if (x > old) *p = x;
  return old;
}
template <class V>
V atomicMin(V* p, V x) {
  const V old = *p;
  if (x < old) *p = x;
  return old;
}

float emulated_half_to_float(uint16_t bits);
uint16_t emulated_float_to_half(float x);

// The host's interface, as far as csrc/cuda uses it
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrClusterLaunch,
};
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum { cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

int emulated_code_version();
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, F*) {
  found->ptxVersion = emulated_code_version();
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*);
cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long*);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*);
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned flags);
template <class V>
cudaError_t cudaGetSymbolAddress(void** p, V& symbol) {
  *p = &symbol;
  return cudaSuccess;
}

// Runs body(argument) once in every thread of every block.
cudaError_t emulated_launch(const cudaLaunchConfig_t& config, void (*body)(const void*),
                            const void* argument);
template <class P>
struct EmulatedCall {
  void (*kernel)(P);
  P argument;
};
template <class P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P), const P& argument) {
  const EmulatedCall<P> call{kernel, argument};
  return emulated_launch(
      *config,
      [](const void* p) {
        const auto* c = static_cast<const EmulatedCall<P>*>(p);
        c->kernel(c->argument);
      },
      &call);
}
