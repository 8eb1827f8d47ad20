// What a launcher hands to a kernel. Plain data; host code and kernels both include it.
#pragma once

#include <cstdint>

namespace cmim::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kVector = 4;  // neighbouring columns that one thread works on
constexpr int kBatch = 64;  // rows whose constants lie in shared memory at a time
// A class of kManyRows may be cut into narrow tiles, kNarrowLanes threads to a row, to keep every block busy.
constexpr int kManyRows = 8;
constexpr int kNarrowLanes = 64;
// Rows that the fused kernel can group: a thread remembers two targets of each turn in 64 bits.
constexpr int kMostGrouped = 32 * 2 * kThreads;
constexpr int kMaxTemperatures = 64;                           // K
constexpr int kMaxSize = 2147483647 / (2 * kMaxTemperatures);  // N and C: so that N K fits 32 bits
constexpr int kChainChunk = 8;   // temperatures that share one exponential, kept in registers together
constexpr int kDirectChunk = 4;  // temperatures at a time where each has an exponential of its own

enum class Storage : int { f32, f64, bf16, f16 };
enum Reduction : int { kNone, kMean, kSum, kSpectrum };

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
  bool vector4;       // four neighbouring logits may be read as one aligned vector
  bool vector16;      // and 16 bytes
  bool target_pairs;  // two neighbouring targets may be read as one aligned vector
  bool by_class;      // slot s is class s; otherwise it is the class of row s, if that is its first row

  int temperatures, padded;  // K, and K rounded up to the chunk
  // Where the a_k are consecutive multiples of one number, and not too large: a_k = multiple_k unit,
  // multiple_k = multiple_0 + k, and all exp(a_k x) are powers of one exponential. Otherwise unit = 1,
  // multiple_k = a_k.
  A unit;
  A floor;  // at this x = logit - largest logit and below, every exponential is zero, that of a = 1 too
  A multiple[kMaxTemperatures], a[kMaxTemperatures], weight[kMaxTemperatures];
  int order[kMaxTemperatures];  // the caller's index of a[k]
  int one;                      // the k of a[k] = 1, the cross entropy's own; -1 if there is none

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
// forms.cuh explains the plain and the centred form. A class has a bit mask of the temperatures that are
// centred; for those, growth and divergence are the centred form's.
template <class A>
struct Saved {
  A* sum;          // (N, padded) sum_j exp(a_k (z_j - top)), at least 1; NaN if the row has no probabilities
  A* growth;       // (N, padded) centred: log1p(s). At a class's first row, plain: the scale
  A* divergence;   // (N, padded) plain: sum_j P t'; centred: KL; given centroids: sum_j P log(P/Q)
  A* top;          // (N) largest logit
  A* ce_sum;       // (N) the same for a = 1
  A* totals;       // (kTotals) rows and their weights, the weights of all classes, classes present
  int32_t* row;    // (N) the row at each position
  int32_t* first;  // (slots) first position of the class
  int32_t* count;  // (slots) its rows; 0: there is none in this slot
  uint32_t* centred;  // (slots, 2) the mask, low word first
};

enum Total { kKept, kWeightSum, kSmoothingSum, kPresent, kTotals };

// What the terms of a mean are divided by: rows, their weights; and the weights of all classes.
template <class A>
struct Divisors {
  A rows, weights, smoothing;
};

// A label out of range and its row in one word, so that it is written at once; never 0. Labels
// beyond 37 bits are reported as the nearest that fits.
constexpr int kRowBits = 26;  // 1 + row fits: see kMaxSize
constexpr int64_t kLargestLabel = (int64_t(1) << (63 - kRowBits)) - 1;

// Elements of A that Saved takes in one tensor
inline int64_t saved_elements(int64_t rows, int64_t temperatures) {
  const int64_t padded = (temperatures + kChainChunk - 1) / kChainChunk * kChainChunk;
  return rows * (3 * padded + 2 + 5) + kTotals;
}

template <class A>
inline Saved<A> saved_in(A* memory, int64_t rows, int64_t slots, int64_t padded) {
  Saved<A> s;
  s.totals = memory;
  s.sum = s.totals + kTotals;
  s.growth = s.sum + rows * padded;
  s.divergence = s.growth + rows * padded;
  s.top = s.divergence + rows * padded;
  s.ce_sum = s.top + rows;
  s.row = reinterpret_cast<int32_t*>(s.ce_sum + rows);
  s.first = s.row + rows;
  s.count = s.first + slots;
  s.centred = reinterpret_cast<uint32_t*>(s.count + slots);
  return s;
}

// Where the forward kernels put what only the call itself needs.
template <class A>
struct Forward {
  A* value;            // (), (N) or (K); null where centroids are wanted
  A* ce;               // (N) cross entropy at each position
  A* partial;          // (parts, N, padded), twice over for the fused kernel: sums over parts of the columns
  A* kl;               // (N, padded)
  A* sums;             // (padded + kClassSums, slots) sums over each class
  A* own_saved;        // where Saved is if no one keeps it
  int* found;          // (kFounds)
  unsigned* ticket;    // blocks that have finished; 0 between launches. The fused kernel alone
  int64_t* bad_label;  // a word of host memory that tells of a label out of range, see pack_label(), or null
  int table_bytes, chip_bytes;

  bool saves;  // Saved is for someone to read; else a kernel may leave it unwritten

  // The fused kernel alone: 1 << log2_parts blocks share a class's columns out, `width` of them each
  int log2_parts, width;
  A* scanned;  // (parts, N, kScanned) what each part finds in a row, see scan_rows()

  // The tiled kernels alone:
  const int64_t* sorted;  // (N) targets in ascending order
  const int64_t* order;   // (N) their rows, in the order of the batch where targets are equal
  int* leaders;     // (finders, 2) of each block that looks for classes: those it found, labels out of range
  A* widest;        // (slots, parts) largest d; the fused kernel has it too
  int parts;        // most parts that a class's columns are shared out in
  int items;        // parts of classes that keep the device busy
  A* centroids;     // (K, C, C), zero; null: the loss is wanted
  int64_t* counts;  // (C), zero
};

enum Found { kBadLabels, kClasses, kCollapsedClasses, kFounds };
enum Scanned { kTop, kWeighted, kWeights, kScanned };
enum ClassSum { kClassCe, kClassWeight, kClassCount, kClassPresent, kClassSums };

// What the kernels that compute the gradient read and write.
template <class A>
struct Backward {
  const A* grad;  // upstream, of the value's shape; null: one
  int64_t grad_stride;
  const void* kept;  // (N, C) the gradient for an upstream gradient of one, if forward left it
  void* out;         // (N, C), contiguous, the logits' type
  bool out_vector;   // four neighbours of it may be written as one aligned vector
  A* upstream;       // (N) by position: g_i less the class's mean; reduction "none" only, as the next one
  A* dots;           // (N, padded) sum_j P rho
  int parts;         // most parts that a class's columns are shared out in
  int items;         // parts of classes that keep the device busy
  int table_bytes;
};

// bfloat16 or float16; which of them is in Problem::storage
struct Half16 {
  uint16_t bits;
};

// What a kernel is compiled for: the storage type of the logits, the arithmetic type, and the temperatures
// at a time.
template <class S_, class A_, int kChunk_, bool kChain_>
struct Kind {
  using S = S_;
  using A = A_;
  static constexpr int kChunk = kChunk_;
  static constexpr bool kChain = kChain_;
};

// Blocks that share a multiprocessor's registers, at least
template <class A>
constexpr int kBlocksAtOnce = sizeof(A) == 4 ? 2 : 1;

// Bytes of the parts of shared memory; the table and the copied rows, whose sizes the host chooses, come
// last.
template <class A>
struct Sizes {
  static constexpr int chunk = sizeof(A) == 4 ? kChainChunk : kDirectChunk;  // the larger one in use
  static constexpr int combine = kThreads * kVector * (chunk / 2) * int(sizeof(A));
  static constexpr int constants = 14 * 1024;
  static constexpr int rows = kBatch * (8 + 3 * int(sizeof(A)));
  static constexpr int scratch = (kWarps * 8 + 4) * int(sizeof(A)) + 5 * kWarps * 4;
  static constexpr int fixed = combine + constants + rows + scratch;
};

}  // namespace cmim::cuda
