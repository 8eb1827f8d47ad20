// Which of a cluster's temperatures are computed centred, and which are close. At a high temperature the
// softmax outputs of rows that differ are still close to each other, even closer than float resolves
// uncentred, while those of a low temperature are too far apart to be centred: such a cluster is computed in
// two parts. A guess from two rows: a wrong one costs time, and nothing else, since both forms find out what
// they cannot do.
#pragma once

#include "narrow.h"
#include "wide.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

// How much more than float resolves it takes by a guess
constexpr double kMargin = 1.25, kMarginClose = 1.1;
// KL that is right to 1e-5 as it is summed elsewhere: half as large where many classes share the rounding
constexpr double kNotClose = 1e-3;
constexpr int64_t kManyClasses = 256;
constexpr double kDepth = 5;  // a x of this size doubles the rounding of t
constexpr int kSampled = 4;   // vectors of one row, for the probability that is not the label's

// f(d, a vector of the differences of two rows: NaN where both are masked, or beyond the last class)
template <class F>
CMIM_INLINE void each_difference(const float* first, const float* last, int64_t C, F&& f) {
  constexpr int W = Simd<float>::width;
  each_vector(last, C, [&](int64_t j, Vec<float> z) CMIM_INLINE_LAMBDA {
    f(z - (j + W <= C ? load<Vec<float>>(first + j) : load_tail<float, float>(first + j, C - j)));
  });
}
// How far two rows are from their mean at most, but for a constant
inline float half_width(const float* first, const float* last, int64_t C) {
  Vec<float> lo = splat(__builtin_inff()), hi = -lo;
  each_difference(first, last, C,
                  [&](Vec<float> d) CMIM_INLINE_LAMBDA { lo = d < lo ? d : lo, hi = d > hi ? d : hi; });
  return (max_lanes<float>(hi) + max_lanes<float>(-lo)) / 2;
}
// The variance of one row's d, had from the differences of two
inline double variance(const float* first, const float* last, int64_t C) {
  Vec<float> count{}, sum{}, squares{};
  each_difference(first, last, C, [&](Vec<float> d) CMIM_INLINE_LAMBDA {
    const Vec<float> known = d == d ? d : Vec<float>{};
    count += d == d ? splat(1.0f) : Vec<float>{};
    sum += known, squares += known * known;
  });
  const double number = double(sum_lanes<float>(count)), mean = double(sum_lanes<float>(sum)) / number;
  return (double(sum_lanes<float>(squares)) / number - mean * mean) / 2;
}

// About 1 - p at the label, of one row at one temperature
inline double rest_of(const float* z, int64_t C, int64_t label, float a) {
  using V = Vec<float>;
  constexpr int W = Simd<float>::width;
  if (C < kSampled * W) return 1;
  V sum{};
  for (int s = 0; s < kSampled; ++s) {
    const V below = load<V>(z + s * (C / kSampled)) - z[label];
    sum += below == 0.0f ? V{} : exp_of_any(-at_least(-a * below, -80.0f));
  }
  const double others = double(sum_lanes<float>(sum)) * double(C) / (kSampled * W);
  return others / (1 + others);
}

// How far the logits are below the largest but the label's, on average; infinite where one is masked. Float
// rounds them in proportion to it.
inline float depth_of(const float* z, int64_t C, int64_t label) {
  constexpr int W = Simd<float>::width;
  Vec<float> lanes{};
  for (int64_t j = 0; j + W <= C; j += W) lanes += load<Vec<float>>(z + j);
  float sum = sum_lanes<float>(lanes);
  for (int64_t j = C / W * W; j < C; ++j) sum += z[j];
  return largest_but(z, C, label) - sum / float(C);
}

// The temperatures [0, centred) are better centred, and of the others those before `close` are close: see
// wide.h.
struct Split {
  int centred, close;
};
// What guesses that failed have found out: how far |d| reaches, else 0; that none is close
struct Found {
  float reach = 0;
  bool none_close = false;
};
inline Split split_of(const Job& job, const Cluster& cluster, const Found& found, Workspace& ws) {
  if (job.storage == Storage::f64 || job.centroids || job.upstream) return {0, 0};
  const int64_t n = cluster.count, C = job.classes, Cp = round_up(C, Simd<float>::width);
  float* const x = reinterpret_cast<float*>(reserve(ws.pass, 2 * Cp * int64_t(sizeof(float))));
  const float* const first = row_values(job, cluster.rows[0], x);
  const float* const last = row_values(job, cluster.rows[n - 1], x + Cp);
  const int K = job.temperatures;
  // of n rows, some reach further than two
  const float reach = found.reach == 0 ? half_width(first, last, C) * (n > 2 ? 1.2f : 1.0f) : found.reach;
  const auto narrow = [&](int k) { return float(job.a[k]) * reach <= kNarrow; };
  if (!narrow(0)) return {0, 0};
  const double spread = variance(first, last, C);
  // KL in units of the probability outside the label
  const auto ratio = [&](int k) { return job.a[k] * job.a[k] * spread / 2 * (1 - 1 / double(n)); };
  const auto resolved = [&](int k, double least) {
    return !narrow(k) || !counts(job, k) || !(ratio(k) < kMargin * kRedoBelowRest) ||
           (ratio(k) >= least && ratio(k) * rest_of(first, C, cluster.label, float(job.a[k])) >= least);
  };
  const double not_close = C < kManyClasses ? kNotClose : kNotClose / 2;
  int close = K;
  while (close > 0 && resolved(close - 1, not_close)) --close;
  if (close == 0) return {0, 0};
  const double depth = found.none_close ? __builtin_inf() : double(depth_of(first, C, cluster.label));
  const auto resolved_close = [&](int k) {
    const double rounding = 1 + job.a[k] * depth / kDepth;
    return ratio(k) >= kMarginClose * kRedoBelowClose * rounding * rounding;
  };
  int centred = close;
  while (centred > 0 && (resolved_close(centred - 1) || resolved(centred - 1, kMargin * kRedoBelow)))
    --centred;
  // the chain of expm1 makes all of them cheaper than two parts
  if (centred > 0 && job.power0 > 0 && narrow(K - 1)) return {K, K};
  return {centred, found.none_close ? centred : close};
}

// The temperatures [begin, end) of a job by themselves
inline Job part(const Job& job, int begin, int end) {
  Job of = job;
  of.temperatures = end - begin;
  of.a += begin, of.w += begin, of.coeff += begin, of.order += begin;
  if (of.multiple) of.multiple += begin;
  if (of.power0 > 0) of.power0 += begin;
  of.ce_index = job.ce_index >= begin && job.ce_index < end ? job.ce_index - begin : -1;
  of.close = job.close > begin ? job.close - begin : 0;
  return of;
}

// What the first part of the temperatures leaves to the second, and what of the job differs there
struct Carry {
  double *w, *coeff, *label;
  int* order;
  float* gradient;

  Carry(const Job& job, int64_t rows, Workspace& ws) {
    const int64_t K = job.temperatures, Cp = round_up(job.classes, Simd<float>::width);
    lay_out(ws.carry, [&](Layout& layout) {
      layout.take(w, K), layout.take(coeff, K), layout.take(order, K);
      layout.take(label, rows), layout.take(gradient, rows * Cp);
    });
  }
};
// The first `done` temperatures
inline Job first_part(const Job& job, int done, const Carry& carry) {
  Job first = part(job, 0, done);
  first.has_ce = false;
  if (done == 1) first.base = first.a[0], first.power0 = 1, first.multiple = nullptr;  // a chain of one
  first.carry = carry.gradient, first.carry_label = carry.label;
  return first;
}
// Those that are left, and as many of the others once more, for nothing, as make chunks of eight: cheaper
// than the small chunks that five, six or seven temperatures take.
inline Job second_part(const Job& job, int done, const Carry& carry) {
  const int K = job.temperatures, left = (K - done) % 8, again = left >= 5 && done >= 8 - left ? 8 - left : 0;
  for (int k = done - again; k < K; ++k) {
    carry.w[k] = k < done ? 0 : job.w[k], carry.coeff[k] = k < done ? 0 : job.coeff[k];
    carry.order[k] = k < done ? -1 : job.order[k];
  }
  Job whole = job;
  whole.w = carry.w, whole.coeff = carry.coeff, whole.order = carry.order;
  whole.close = job.close > done ? job.close : 0;
  whole.carried = carry.gradient, whole.carried_label = carry.label;
  return part(whole, done - again, K);
}

}  // namespace
}  // namespace cmim::cpu
