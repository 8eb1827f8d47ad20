// A call as the kernels take it: its temperatures in order, what kind of kernels serves them, and the
// Problem.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "launch.h"

namespace cmim::cuda {

constexpr int kLongestChain = 64;    // a power's error grows with its exponent
constexpr double kColdestChain = 4;  // largest a of powers; see gradient.cuh for what is lost beyond

// The temperatures in ascending order, and whether they are consecutive multiples of one number.
struct Grid {
  std::vector<double> a;
  std::vector<int> order;
  double base = 0;
  int first_multiple = 0;  // 0: they are not
};

inline Grid make_grid(const std::vector<double>& a) {
  Grid g;
  g.order.resize(a.size());
  std::iota(g.order.begin(), g.order.end(), 0);
  std::stable_sort(g.order.begin(), g.order.end(), [&](int x, int y) { return a[size_t(x)] < a[size_t(y)]; });
  for (int k : g.order) g.a.push_back(a[size_t(k)]);
  const double step = g.a.size() > 1 ? (g.a.back() - g.a[0]) / double(g.a.size() - 1) : g.a[0];
  const double first = std::round(g.a[0] / step);
  if (!(first >= 1 && first + double(g.a.size()) <= kLongestChain)) return g;
  g.base = g.a.back() / (first + double(g.a.size()) - 1);
  for (size_t k = 0; k < g.a.size(); ++k)
    if (std::abs((first + double(k)) * g.base - g.a[k]) > 4 * std::numeric_limits<double>::epsilon() * g.a[k])
      return g;
  g.first_multiple = int(first);
  return g;
}

inline size_t element_size(Storage s) {
  return s == Storage::f64 ? 8 : s == Storage::f32 ? 4 : 2;
}

inline bool aligned(const void* p, int64_t stride_bytes, size_t to) {
  return reinterpret_cast<uintptr_t>(p) % to == 0 && stride_bytes % int64_t(to) == 0;
}

inline int slots(const Call& call) {
  return int(std::min(call.rows, call.classes));
}

inline int64_t padded_temperatures(size_t k, int chunk) {
  return (int64_t(k) + chunk - 1) / chunk * chunk;
}

struct Choice {
  Grid grid;
  bool chain;
  int padded;
  explicit Choice(const Call& call)
      : grid(make_grid(call.a)),
        chain(grid.first_multiple > 0 && grid.a.back() <= kColdestChain && call.storage != Storage::f64),
        padded(int(padded_temperatures(call.a.size(), chain ? kChainChunk : kDirectChunk))) {}
};

template <class A>
Problem<A> make_problem(const Call& call, const Choice& choice) {
  Problem<A> q{};
  const int64_t element = int64_t(element_size(call.storage));
  q.logits = call.logits;
  q.row_stride = call.row_stride, q.col_stride = call.col_stride;
  q.target = call.target, q.target_stride = call.target_stride, q.ignore_index = call.ignore_index;
  q.rows = int(call.rows), q.classes = int(call.classes);
  q.storage = call.storage;
  const bool dense = call.col_stride == 1 || call.classes == 1;
  q.vector4 =
      dense && aligned(call.logits, call.row_stride * element, std::min<size_t>(16, 4 * size_t(element)));
  q.vector16 = dense && aligned(call.logits, call.row_stride * element, 16);
  q.target_pairs = call.target_stride == 1 && aligned(call.target, 0, 16);
  q.by_class = call.classes <= call.rows;
  q.temperatures = int(call.a.size()), q.padded = choice.padded;
  const Grid& grid = choice.grid;
  q.unit = A(choice.chain ? grid.base : 1);
  for (int k = 0; k < q.padded; ++k) {
    const bool real = k < q.temperatures;
    const double a = choice.chain ? grid.base * (grid.first_multiple + k)
                     : real       ? grid.a[size_t(k)]
                                  : grid.a.back();
    q.a[k] = A(real ? grid.a[size_t(k)] : a);
    q.multiple[k] = A(choice.chain ? grid.first_multiple + k : a);
    q.order[k] = real ? grid.order[size_t(k)] : 0;
    q.weight[k] = A(real ? call.weight[size_t(grid.order[size_t(k)])] : 0);
  }
  const auto one = std::find(q.a, q.a + q.temperatures, A(1));
  q.one = one == q.a + q.temperatures ? -1 : int(one - q.a);
  // The cross entropy's exponentials have a = 1, whatever the grid.
  const double lowest = std::min(1.0, double(q.unit) * double(q.multiple[0]));
  q.floor = A((sizeof(A) == 4 ? -100.0 : -1000.0) / lowest);
  q.class_weight = static_cast<const A*>(call.class_weight);
  q.centroids = static_cast<const A*>(call.centroids);
  q.ce_weight = A(call.ce_weight), q.cmi_weight = A(call.cmi_weight), q.smoothing = A(call.smoothing);
  q.reduction = call.reduction;
  q.has_ce = call.reduction != kSpectrum && call.ce_weight != 0;
  q.has_cmi = call.reduction == kSpectrum || call.cmi_weight != 0;
  q.slots = slots(call);
  return q;
}

// Calls f(Kind) for the call's storage and temperatures.
template <class F>
void with_kind(const Call& call, const Choice& choice, F f) {
  if (call.storage == Storage::f64) return f(Kind<double, double, kDirectChunk, false>());
  if (call.storage == Storage::f32)
    return choice.chain ? f(Kind<float, float, kChainChunk, true>())
                        : f(Kind<float, float, kDirectChunk, false>());
  return choice.chain ? f(Kind<Half16, float, kChainChunk, true>())
                      : f(Kind<Half16, float, kDirectChunk, false>());
}

}  // namespace cmim::cuda
