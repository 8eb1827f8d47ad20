// The CPU loss for any caller that holds raw pointers: grouping, scheduling and reductions around the kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"

namespace cmim::cpu {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2, spectrum = 3 };

struct Request {
  const void* logits = nullptr;
  Storage storage = Storage::f32;
  int64_t rows = 0, classes = 0, row_stride = 0, col_stride = 0;
  const int64_t* target = nullptr;
  int64_t target_stride = 1;
  std::vector<double> a, w;
  const void* class_weight = nullptr;  // float; double for double logits
  const void* centroids = nullptr;
  double ce_weight = 1, cmi_weight = 1, label_smoothing = 0;
  int64_t ignore_index = -100;
  Reduction reduction = Reduction::mean;
};

// A pool of threads. run calls fn(arg, i) for i in [0, count), in any order, and returns when all are done.
struct Pool {
  int threads = 1;
  void (*run)(int64_t count, void (*fn)(void*, int64_t), void* arg) = nullptr;
};

// value: 1 element, N of them for Reduction::none, K for Reduction::spectrum. grad: (N, C) contiguous for an
// upstream gradient of ones, or null. Throws std::invalid_argument for a label out of range.
void forward(const Request& request, const Pool& pool, std::vector<double>& value, void* grad,
             Storage grad_storage);

// upstream: as many elements as forward has values.
void backward(const Request& request, const Pool& pool, const std::vector<double>& upstream, void* grad,
              Storage grad_storage);

// out (K, C, C) zero-filled by the caller, counts (C).
void class_centroids(const Request& request, const Pool& pool, void* out, int64_t* counts);

void scale(const void* saved, Storage saved_storage, double grad, void* out, Storage out_storage,
           int64_t count, const Pool& pool);

// The variant in use: the best the processor has, or the one that CMIM_KERNELS_CPU_VARIANT names.
const Variant& variant();

}  // namespace cmim::cpu
