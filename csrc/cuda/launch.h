// The kernels' arguments, and the launchers that choose among the kernels. Free of torch headers.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "problem.h"

namespace cmim::cuda {

template <class A>
struct ForwardLaunch {
  Problem<A> problem;
  Saved<A> saved;
  Forward<A> forward;
  Backward<A> backward;  // of the fused kernel alone; without `out` there is no gradient to compute
};
template <class A>
struct BackwardLaunch {
  Problem<A> problem;
  Saved<A> saved;
  Backward<A> backward;
};

template <class P>
using Kernel = void (*)(P);

// Every kind of kernel there is: storage, arithmetic, temperatures at a time, one exponential for all of them
#define CMIM_FOR_EACH_KIND(X)           \
  X(float, float, kChainChunk, true)    \
  X(Half16, float, kChainChunk, true)   \
  X(float, float, kDirectChunk, false)  \
  X(Half16, float, kDirectChunk, false) \
  X(double, double, kDirectChunk, false)

template <class T>
Kernel<ForwardLaunch<typename T::A>> fused_kernel();
// In the order of their launches; the last one in place of those from divergences on
template <class A>
struct TiledKernels {
  Kernel<ForwardLaunch<A>> count_classes, list_classes, statistics, divergences, sum_classes, centred_parts,
      growths, centred_divergences, sum_again, value, centroids;
};
template <class T>
TiledKernels<typename T::A> tiled_kernels();
template <class T>
Kernel<BackwardLaunch<typename T::A>> row_dots_kernel();
template <class T>
Kernel<BackwardLaunch<typename T::A>> gradient_kernel();

// One call of an operator, as the host has it. Pointers are to device memory, strides in elements.
struct Call {
  const void* logits;
  Storage storage;
  int64_t rows, classes, row_stride, col_stride;
  const int64_t* target;
  int64_t target_stride;
  std::vector<double> a, weight;  // inverse temperatures and their weights, in any order
  const void *class_weight = nullptr, *centroids = nullptr;
  double ce_weight = 0, cmi_weight = 0, smoothing = 0;
  int64_t ignore_index;
  Reduction reduction = kSpectrum;
};

// Targets in ascending order and where each was, equal ones in the order of the batch. (N) each.
struct SortedTargets {
  const int64_t *label, *row;
};

// Whether forward() wants the targets sorted, which class_centroids() always does.
bool wants_sorted_targets(const Call& call);

// Whether forward() can leave the gradient, in the logits' type: of a typical batch whose upstream gradient
// is one number. Not in float16, where it could underflow before it is scaled.
bool can_keep_gradient(const Call& call);

// Elements of the arithmetic type that the caller allocates for `scratch`; of the current device.
int64_t forward_scratch(const Call& call);
int64_t centroids_scratch(const Call& call);
int64_t kept_scratch(const Call& call);
int64_t backward_scratch(const Call& call);

// Enqueue on `stream` of the current device; rows > 0. Throw std::runtime_error with the shape if that fails.
//
// forward() leaves what backward() needs in `saved`, if that is not null, or the gradient (N, C) for an
// upstream gradient of one in `gradient`.
void forward(const Call& call, const SortedTargets& sorted, void* value, void* saved, void* gradient,
             void* scratch, cudaStream_t stream);
void backward(const Call& call, const void* grad, int64_t grad_stride, void* saved, void* out, void* scratch,
              cudaStream_t stream);
// The gradient of a call that can keep it: `kept` scaled where that rounds once, else computed again, as it
// is without `kept`.
void backward_of_kept(const Call& call, const void* grad, const void* kept, void* out, void* scratch,
                      cudaStream_t stream);
// centroids (K, C, C) and counts (C) hold zeros.
void class_centroids(const Call& call, const SortedTargets& sorted, void* centroids, int64_t* counts,
                     void* scratch, cudaStream_t stream);

// Which forward kernels run: `automatic` chooses by size; the tests try the others on small problems.
enum class Path : int64_t { automatic, fused, tiled };
void set_path(Path path);

// Counters of finished blocks, on the current device, zero at first.
constexpr int kTickets = 4096;
unsigned* ticket_table();

// The version of PTX (10 times the architecture's major number and its minor) from which the current device's
// code was made, at the build or by the driver; 0 where there is none for it.
int code_version();

// Throws std::runtime_error if an earlier launch met a label out of range, and forgets it. Does not wait.
void check_labels();

}  // namespace cmim::cuda
