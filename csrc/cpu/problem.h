// What the driver hands to an instruction-set variant of the kernel. Plain structs: the variants are compiled
// with wider instructions than the machine may have, so nothing that the linker could share between
// translation units (templates, inline functions, the standard library's containers) may be defined here.
#pragma once

#include <cstdint>

namespace cmim::cpu {

enum class Storage : int { f32, f64, bf16, f16 };

// One call of the loss, with every scale already folded in. Temperatures are sorted: a[0] < a[1] < ...
struct Job {
  const void* logits;  // (N, C), strides in elements
  Storage storage;
  int64_t rows, classes, row_stride, col_stride;

  int temperatures;  // K
  const double* a;   // (K) inverse temperatures
  const double* w;   // (K) weights of CMI_k in row_cmi
  const double*
      coeff;    // (K) what a_k P (t - KL) is multiplied by in the gradient: w_k a_k cmi_weight / normaliser
  double base;  // a[k] = multiple[k] * base
  const int* multiple;  // (K); nullptr: every a_k takes an exponential of its own
  int power0;           // where the multiples are consecutive, the first of them, else 0
  int ce_index;         // the k with a_k = 1, or -1
  int close;            // of the first temperatures, how many have their KL summed as in a collapsed cluster

  const void* class_weight;  // (C) float, double for double logits; nullptr: ones
  const void*
      centroids;  // (K, C, C) in the same type, temperatures in the caller's order; nullptr: the batch's own
  const int* order;  // (K) the caller's index of a[k]; -1: no one asks for it, and w and coeff are 0
  bool has_ce, has_cmi;
  double ce_scale;                // ce_weight / normaliser
  double smoothing, smooth_each;  // label smoothing, and what each class gets of it
  double weight_sum;              // sum of class_weight

  const double* upstream;  // (N) gradient of each row's loss, nullptr: ones
  // By position among the kept rows, which are sorted by label, so that threads write apart; nullptr: not
  // wanted
  double* row_ce;   // (N) cross entropy of each row, weighted
  double* row_cmi;  // (N) sum_k w_k KL^k_i
  double* kl;       // (N, K of the call) KL^k_i in the caller's order of temperatures
  int kl_stride;
  void* grad;  // (N, C) contiguous; nullptr: not wanted
  Storage grad_storage;

  // Of a cluster whose temperatures are computed in two parts: its rows' gradient from the first part, which
  // the second one adds its own to. nullptr: one part, or the first.
  const float* carried;         // (n, Cp), Cp as for float
  const double* carried_label;  // (n) at the label
  float* carry;                 // the same, where the first part writes them; nullptr: to grad
  double* carry_label;
};

// The rows of one class, in the order they have in the batch.
struct Cluster {
  const int64_t* rows;
  int64_t position;  // of the first of them
  int64_t count;
  int64_t label;
};

// Runs fn(arg, 0 .. count - 1), on the pool's threads when the driver decided so. Results never depend on
// which.
struct Team {
  void (*run)(int64_t count, void (*fn)(void*, int64_t), void* arg);
};

// Scratch memory of one worker, grown on demand and kept between clusters: a pass over a cluster has one, and
// what it leaves to the next pass another.
struct Scratch {
  void* data = nullptr;
  int64_t bytes = 0;
};
struct Workspace {
  Scratch pass, carry;
};

struct Variant {
  const char* name;
  bool (*supported)();
  void (*cluster)(const Job&, const Cluster&, const Team&, Workspace&);
  void (*entropy)(const Job&, const Cluster&, Workspace&);  // cross entropy only
  // out[i] = grad * saved[i], rounded once to the storage of out
  void (*scale)(const void* saved, Storage saved_storage, double grad, void* out, Storage out_storage,
                int64_t count);
  // the cluster's rows of the centroids (K, C, C), float, or double for double logits
  void (*centroid)(const Job&, const Cluster&, void* out, Workspace&);
};

extern const Variant kBaseline;
#if defined(__x86_64__)
extern const Variant kAvx2;
extern const Variant kAvx512;
#endif

}  // namespace cmim::cpu
