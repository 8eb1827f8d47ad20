// What a launcher hands to a kernel. Plain data; host code and kernels both include it.
#pragma once

#include <cstdint>

namespace cmim::cuda {

constexpr int kThreads = 256;        // of every block
constexpr int kMaxTemperatures = 64;  // K
constexpr int kChainChunk = 8;        // temperatures that share one exponential, kept in registers together
constexpr int kDirectChunk = 4;       // temperatures at a time where each has an exponential of its own

enum class Storage : int { f32, f64, bf16, f16 };
enum Reduction : int { kNone, kMean, kSum, kSpectrum };
// How a class was computed: what its rows' statistics mean (see Saved)
enum Form : int { kPlain, kCentred };

// One call of the loss, in the arithmetic type A: double for double logits, else float. Temperatures are
// sorted, a[0] < a[1] < ..., and padded to a multiple of the chunk with ones of weight 0.
template <class A>
struct Problem {
  const void* logits;  // (N, C), strides in elements
  int64_t row_stride, col_stride;
  const int64_t* target;  // (N)
  int64_t target_stride, ignore_index;
  int rows, classes;  // N, C
  Storage storage;
  bool vector4;        // four neighbouring logits may be read as one aligned vector
  bool vector16;       // and 16 bytes
  bool target_pairs;   // two neighbouring targets may be read as one aligned vector
  bool by_class;       // slot s of the classes is class s; otherwise it is the class of row s, if that is its first

  int temperatures, padded;  // K, and K rounded up to the chunk
  // exp(a_k x) = 2^(multiple_k r) with r = unit x; multiple_k = first_multiple + k where the a_k are
  // consecutive multiples of one number, and then all are powers of one exponential.
  A unit;
  A multiple[kMaxTemperatures], a[kMaxTemperatures], weight[kMaxTemperatures];
  int order[kMaxTemperatures];  // the caller's index of a[k]

  const A* class_weight;  // (C); null: ones
  const A* centroids;     // (K, C, C), temperatures in the caller's order; null: the batch's own
  A ce_weight, cmi_weight, smoothing;
  Reduction reduction;
  bool has_ce, has_cmi;

  int slots;  // upper bound of the classes present: min(N, C)
};

// What the forward pass leaves for the backward pass. "Position" counts the kept rows sorted by label; the
// rows of a class have consecutive positions, in the order of the batch. Everything is O(K N).
//
//   form      log_sum                        divergence
//   plain     log2 sum_j 2^(multiple_k r)    sum_j P log2(P/Q), off by a constant of the class; see cluster.cuh
//   centred   log1p(s), see centred.cuh      KL (nats)
//
// In a centred class the first row, around which the others are taken, keeps its plain log_sum.
template <class A>
struct Saved {
  A* log_sum;     // (N, padded)
  A* divergence;  // (N, padded)
  A* top;         // (N) largest logit
  A* ce_log_sum;  // (N) ln sum_j exp(z_j - top)
  A* totals;      // (kTotals)
  int32_t* row;   // (N) the row at each position
  int32_t* first;  // (slots) first position of the class
  int32_t* count;  // (slots) its rows; 0: there is none in this slot
  int32_t* form;   // (slots) Form
};

enum Total { kKept, kWeightSum, kSmoothingSum, kInvalid, kTotals };

// Elements of A that Saved takes in one tensor
inline int64_t saved_elements(int64_t rows, int64_t temperatures) {
  const int64_t padded = (temperatures + kChainChunk - 1) / kChainChunk * kChainChunk;
  return rows * (2 * padded + 2 + 4) + kTotals;
}

template <class A>
inline Saved<A> saved_in(A* memory, int64_t rows, int64_t slots, int64_t padded) {
  Saved<A> s;
  s.totals = memory;
  s.log_sum = s.totals + kTotals;
  s.divergence = s.log_sum + rows * padded;
  s.top = s.divergence + rows * padded;
  s.ce_log_sum = s.top + rows;
  s.row = reinterpret_cast<int32_t*>(s.ce_log_sum + rows);
  s.first = s.row + rows;
  s.count = s.first + slots;
  s.form = s.count + slots;
  return s;
}

}  // namespace cmim::cuda
