// What a call puts in order before any arithmetic: the rows by label, the temperatures by size.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "loss.h"

namespace cmim::cpu {
namespace {

// The kept rows by label: rows[begin[c] .. begin[c + 1]) are those of labels[c], in the order of the batch.
struct Groups {
  std::vector<int64_t> rows, begin, labels, ignored;
  int64_t count(size_t c) const { return begin[c + 1] - begin[c]; }
};

Groups group(const Request& q) {
  Groups g;
  g.rows.reserve(size_t(q.rows));
  for (int64_t i = 0; i < q.rows; ++i) {
    const int64_t label = q.target[i * q.target_stride];
    if (label == q.ignore_index) {
      g.ignored.push_back(i);
      continue;
    }
    if (label < 0 || label >= q.classes)
      throw std::invalid_argument("target: expected labels in [0, " + std::to_string(q.classes) +
                                  ") or ignore_index = " + std::to_string(q.ignore_index) + ", got " +
                                  std::to_string(label) + " at row " + std::to_string(i));
    g.rows.push_back(i);
  }
  const auto label_of = [&](int64_t row) { return q.target[row * q.target_stride]; };
  const size_t most = size_t(std::min(q.rows, q.classes));
  g.labels.reserve(most), g.begin.reserve(most + 1);
  if (q.classes <= 4 * q.rows + 1024) {  // counting sort
    std::vector<int64_t> start(size_t(q.classes) + 1, 0);
    for (int64_t row : g.rows) ++start[size_t(label_of(row)) + 1];
    for (int64_t c = 0; c < q.classes; ++c)
      if (start[size_t(c) + 1] > 0) g.labels.push_back(c), g.begin.push_back(start[size_t(c) + 1]);
    std::partial_sum(start.begin(), start.end(), start.begin());
    std::vector<int64_t> sorted(g.rows.size());
    for (int64_t row : g.rows) sorted[size_t(start[size_t(label_of(row))]++)] = row;
    g.rows.swap(sorted);
    int64_t at = 0;
    for (int64_t& b : g.begin) at += std::exchange(b, at);
    g.begin.push_back(at);
  } else {
    std::stable_sort(g.rows.begin(), g.rows.end(),
                     [&](int64_t x, int64_t y) { return label_of(x) < label_of(y); });
    for (size_t i = 0; i < g.rows.size(); ++i)
      if (i == 0 || label_of(g.rows[i]) != g.labels.back())
        g.labels.push_back(label_of(g.rows[i])), g.begin.push_back(int64_t(i));
    g.begin.push_back(int64_t(g.rows.size()));
  }
  return g;
}

// The temperatures in ascending order of a, and what they have in common.
struct Grid {
  std::vector<double> a, w;
  std::vector<int> order;
  double base = 0;
  std::vector<int> multiple;  // a[k] = multiple[k] * base; empty: there is no such base
  int power0 = 0, ce_index = -1;
};

constexpr int kHighestMultiple = 1 << 16;  // of a base: beyond, rounding tells them no longer apart
constexpr int kMostDivisions = 8;          // of the smallest a, in the search for what all are multiples of

Grid make_grid(const Request& q) {
  Grid g;
  const size_t K = q.a.size();
  g.order.resize(K);
  std::iota(g.order.begin(), g.order.end(), 0);
  const auto before = [&](int x, int y) { return q.a[size_t(x)] < q.a[size_t(y)]; };
  if (!std::is_sorted(g.order.begin(), g.order.end(), before))  // sorting takes memory
    std::stable_sort(g.order.begin(), g.order.end(), before);
  g.a.reserve(K), g.w.reserve(K), g.multiple.reserve(K);
  for (int k : g.order) g.a.push_back(q.a[size_t(k)]), g.w.push_back(q.w[size_t(k)]);
  const auto same = [](double x, double y) {
    return std::abs(x - y) <= 4 * std::numeric_limits<double>::epsilon() * y;
  };
  for (size_t k = 0; k < K; ++k)
    if (same(g.a[k], 1.0)) g.ce_index = int(k);
  const auto all_multiples_of = [&](double base) {
    g.multiple.clear();
    for (double a : g.a) {
      const double m = std::round(a / base);
      if (!(m >= 1 && m <= kHighestMultiple) || !same(m * base, a)) return false;
      g.multiple.push_back(int(m));
    }
    return true;
  };
  const auto consecutive = [&] {
    for (size_t k = 1; k < K; ++k)
      if (g.multiple[k] != g.multiple[k - 1] + 1) return false;
    return true;
  };
  const double step = K > 1 ? (g.a[K - 1] - g.a[0]) / double(K - 1) : g.a[0];
  const double first = std::round(g.a[0] / step);
  g.base = g.a[K - 1] / (first + double(K) - 1);  // where they are consecutive
  if (first >= 1 && all_multiples_of(g.base) && consecutive()) {
    g.power0 = g.multiple[0];
    return g;
  }
  for (int d = 1; d <= kMostDivisions; ++d)
    if (all_multiples_of(g.base = g.a[0] / d)) return g;
  g.multiple.clear();
  return g;
}

}  // namespace
}  // namespace cmim::cpu
