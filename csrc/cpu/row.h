// One row of logits: loading it in any storage and stride, its cross entropy, and writing its gradient.
#pragma once

#include <new>

#include "elementary.h"
#include "problem.h"
#include "simd.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

inline int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

template <class F>
CMIM_INLINE auto with_storage(Storage s, F&& f) {
  switch (s) {
    case Storage::f64:
      return f(double{});
    case Storage::bf16:
      return f(Bf16{});
    case Storage::f16:
      return f(F16{});
    default:
      return f(float{});
  }
}

template <class T>
constexpr Storage kStorageOf = sizeof(T) == 4 ? Storage::f32 : Storage::f64;

CMIM_INLINE double number(double x) {
  return x;
}
CMIM_INLINE double number(Bf16 x) {
  return bits<float>(uint32_t(x.bits) << 16);
}
CMIM_INLINE double number(F16 x) {
  return half_to_float(x.bits);
}
inline double element(const void* p, Storage s, int64_t i) {
  return with_storage(
      s, [=](auto tag) CMIM_INLINE_LAMBDA { return number(static_cast<const decltype(tag)*>(p)[i]); });
}

// Entry j of an optional vector or table of the compute type, which is double exactly for double logits.
inline double entry(const Job& job, const void* p, int64_t j) {
  return job.storage == Storage::f64 ? static_cast<const double*>(p)[j] : static_cast<const float*>(p)[j];
}
// Where the centroid of a class at the k-th temperature begins in a table (K, C, C) of the caller
inline int64_t centroid_row(const Job& job, int k, int64_t label) {
  return (int64_t(job.order[k]) * job.classes + label) * job.classes;
}
// Of the given centroids. The kernel runs with the processor reading subnormal floats as zero, so those are
// put together from their bits.
inline double centroid_entry(const Job& job, int64_t at) {
  const double q = entry(job, job.centroids, at);
  if (q != 0 || job.storage == Storage::f64) return q;
  return double(bits<uint32_t>(static_cast<const float*>(job.centroids)[at]) & 0x7fffff) * 0x1p-149;
}
inline double class_weight(const Job& job, int64_t j) {
  return job.class_weight ? entry(job, job.class_weight, j) : 1.0;
}

// z(row, :) in x, padded with -inf to whole vectors
template <class T>
inline void load_row(const Job& job, int64_t row, T* x) {
  constexpr int W = Simd<T>::width;
  const int64_t C = job.classes, whole = C / W * W, stride = job.col_stride;
  with_storage(job.storage, [&](auto tag) CMIM_INLINE_LAMBDA {
    using S = decltype(tag);
    if constexpr (sizeof(S) <= sizeof(T)) {  // double logits are never computed in float
      const S* const z = static_cast<const S*>(job.logits) + row * job.row_stride;
      const auto gathered = [=](int64_t j, int64_t count, S* to) {
        for (int64_t l = 0; l < count; ++l) to[l] = z[(j + l) * stride];
        return to;
      };
      S lanes[W]{};
      if (stride == 1)
        for (int64_t j = 0; j < whole; j += W) store(x + j, Convert<T, S>::from(z + j));
      else
        for (int64_t j = 0; j < whole; j += W) store(x + j, Convert<T, S>::from(gathered(j, W, lanes)));
      if (whole < C) store(x + whole, load_tail<T, S>(gathered(whole, C - whole, lanes), C - whole));
    }
  });
}

// z(row, :) as C numbers of T next to each other: the logits themselves where they are that, else a copy in x
template <class T>
inline bool in_place(const Job& job) {
  return job.storage == kStorageOf<T> && job.col_stride == 1;
}
template <class T>
inline const T* row_place(const Job& job, int64_t row, const T* x) {
  return in_place<T>(job) ? static_cast<const T*>(job.logits) + row * job.row_stride : x;
}
template <class T>
inline const T* row_values(const Job& job, int64_t row, T* x) {
  if (!in_place<T>(job)) load_row(job, row, x);
  return row_place(job, row, x);
}

// What the cross entropy of one row contributes: the gradient is softmax * probability - smooth *
// class_weight, less one_hot at the label.
struct RowEntropy {
  double probability, one_hot, smooth;
};
inline RowEntropy entropy_of(const Job& job, int64_t label, double upstream) {
  if (!job.has_ce) return {0, 0, 0};
  const double scale = job.ce_scale * upstream;
  const double one_hot = (1 - job.smoothing) * class_weight(job, label);
  const double smooth = job.smooth_each;
  return {scale * (one_hot + smooth * job.weight_sum), scale * one_hot, scale * smooth};
}
inline RowEntropy row_entropy(const Job& job, int64_t row, int64_t label) {
  return entropy_of(job, label, job.upstream ? job.upstream[row] : 1.0);
}
// The row's cross entropy in nats; log_sum = log sum_j exp(z_j - top). Reads the logits themselves: a masked
// label is infinitely wrong.
inline double row_entropy_value(const Job& job, int64_t row, int64_t label, double log_sum, double top) {
  auto minus_log_p = [&](int64_t j) {
    return log_sum - (element(job.logits, job.storage, row * job.row_stride + j * job.col_stride) - top);
  };
  double value = (1 - job.smoothing) * class_weight(job, label) * minus_log_p(label);
  if (job.smoothing > 0) {
    double smooth = 0;
    for (int64_t j = 0; j < job.classes; ++j) smooth += class_weight(job, j) * minus_log_p(j);
    value += smooth * job.smooth_each;
  }
  return value;
}

// The entry of the label in a gradient row: the difference of two numbers near each other where the row is
// confident, so it is had apart, in double, and rounded once.
template <class T, class S>
CMIM_INLINE void store_entry(S* to, double value) {
  if constexpr (sizeof(S) == sizeof(T))
    *to = T(value);
  else
    store_tail<T, S>(to, splat(T(value)), 1);
}
template <class T>
CMIM_INLINE void write_entry(const Job& job, int64_t row, int64_t j, double value) {
  with_storage(job.grad_storage, [&](auto tag) {
    using S = decltype(tag);
    if constexpr (sizeof(S) <= sizeof(T))
      store_entry<T>(static_cast<S*>(job.grad) + row * job.classes + j, value);
  });
}

// Writes value(j), a vector of a gradient row at columns j .., rounded once to the gradient's storage.
template <class T, class S, class F>
CMIM_INLINE void write_vectors(S* out, int64_t C, F&& value) {
  constexpr int W = Simd<T>::width;
  int64_t j = 0;
  for (; j + W <= C; j += W) Convert<T, S>::to(out + j, value(j));
  if (j < C) store_tail<T, S>(out + j, value(j), C - j);
}
template <class T, class F>
inline void write_row(const Job& job, int64_t row, F&& value) {
  with_storage(job.grad_storage, [&](auto tag) {
    using S = decltype(tag);
    if constexpr (sizeof(S) <= sizeof(T))
      write_vectors<T>(static_cast<S*>(job.grad) + row * job.classes, job.classes, value);
  });
}
// The same for rows [begin, end) of a cluster, value_of(i)(j), and values[i] at the label: see write_entry
template <class T, class F>
CMIM_INLINE void write_rows(const Job& job, const Cluster& cluster, int64_t begin, int64_t end, F&& value_of,
                            const double* values) {
  with_storage(job.grad_storage, [&](auto tag) CMIM_INLINE_LAMBDA {
    using S = decltype(tag);
    if constexpr (sizeof(S) <= sizeof(T)) {
      const int64_t C = job.classes;
      for (int64_t i = begin; i < end; ++i) {
        S* const out = static_cast<S*>(job.grad) + cluster.rows[i] * C;
        write_vectors<T>(out, C, value_of(i));
        store_entry<T>(out + cluster.label, values[i]);
      }
    }
  });
}

// Label smoothing's part of the target distribution, taken from a gradient row that is still in T.
template <class T>
CMIM_INLINE void subtract_smooth(const Job& job, const RowEntropy& e, T* g) {
  if (e.smooth != 0)
    for (int64_t j = 0; j < job.classes; ++j) g[j] -= T(e.smooth * class_weight(job, j));
}

// What an earlier part of the temperatures left of the gradient of row i of the cluster
template <class T>
CMIM_INLINE Vec<T> carried_at(const Job& job, int64_t i, int64_t j) {
  return Convert<T, float>::from(job.carried + i * round_up(job.classes, Simd<float>::width) + j);
}

// The workspace, aligned to a cache line
inline int64_t address(const Scratch& ws) {
  return round_up(reinterpret_cast<int64_t>(ws.data), 64);
}
// Grows the workspace to hold `bytes` and returns it.
inline char* reserve(Scratch& ws, int64_t bytes) {
  if (bytes > ws.bytes) {
    __builtin_free(ws.data);
    ws.bytes = round_up(bytes + bytes / 4, 64);
    ws.data = __builtin_malloc(size_t(ws.bytes + 64));
    if (!ws.data) {
      ws.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return reinterpret_cast<char*>(address(ws));
}

// Lays arrays out one after the other from an address.
struct Layout {
  int64_t at;
  template <class P>
  void take(P*& p, int64_t count) {
    p = reinterpret_cast<P*>(at);
    at += round_up(count * int64_t(sizeof(P)), 64);
  }
};
// place(Layout&) takes every array: again where the workspace turns out to be too small for them.
template <class F>
void lay_out(Scratch& ws, F&& place) {
  Layout layout{address(ws)};
  place(layout);
  const int64_t bytes = layout.at - address(ws);
  if (bytes <= ws.bytes) return;
  reserve(ws, bytes);
  layout.at = address(ws);
  place(layout);
}

constexpr int kFlushVectors = 256;  // sums in lanes of T go over to double this often, whatever C

// The sum of a row's vectors, given in the order of its columns j
template <class T>
struct RowSum {
  Vec<T> lanes{};
  double total = 0;
  CMIM_INLINE void add(int64_t j, Vec<T> v) {
    lanes += v;
    if (j / Simd<T>::width % kFlushVectors == kFlushVectors - 1) total = value(), lanes = Vec<T>{};
  }
  template <int U>
  CMIM_INLINE void add(int64_t j, const SeveralVectors<T, U>& v) {
    for (int u = 0; u < U; ++u) add(j + u * Simd<T>::width, v.part[u]);
  }
  CMIM_INLINE double value() const { return total + double(sum_lanes<T>(lanes)); }
};

// A row whose divergences are 0, without a cross entropy: NaN, all of it, where the row has no softmax.
template <class T>
void idle_row(const Job& job, const Cluster& cluster, int64_t i, Workspace& ws) {
  using V = Vec<T>;
  const int64_t row = cluster.rows[i], at = cluster.position + i;
  V nothing{};
  if (job.has_cmi) {
    T* const x =
        reinterpret_cast<T*>(reserve(ws.pass, round_up(job.classes, Simd<T>::width) * int64_t(sizeof(T))));
    const T* const z = row_values(job, row, x);
    const T top = largest(z, job.classes);
    each_vector(z, job.classes,
                [&](int64_t, V v) CMIM_INLINE_LAMBDA { nothing += at_least(v - top, kVanishes<T>) * T(0); });
  }
  const T value = sum_lanes<T>(nothing);
  if (job.row_ce) job.row_ce[at] = 0, job.row_cmi[at] = double(value);
  for (int k = 0; job.kl && k < job.temperatures; ++k)
    if (job.order[k] >= 0) job.kl[at * job.kl_stride + job.order[k]] = double(value);
  if (job.grad) write_row<T>(job, row, [=](int64_t) { return splat<T>(value); });
}

// A row that only the cross entropy sees: a cluster of one, or no CMI at all.
template <class T>
void entropy_row(const Job& job, const Cluster& cluster, int64_t i, Workspace& ws) {
  if (!job.has_ce) return idle_row<T>(job, cluster, i, ws);
  using V = Vec<T>;
  constexpr int W = Simd<T>::width;
  const int64_t row = cluster.rows[i], label = cluster.label;
  const int64_t Cp = round_up(job.classes, W);
  T* const x = reinterpret_cast<T*>(reserve(ws.pass, Cp * int64_t(sizeof(T))));
  const T* const z = row_values(job, row, x);
  const T top = largest(z, job.classes);
  RowSum<T> of_row;
  each_several(z, job.classes, [&](int64_t j, auto v) CMIM_INLINE_LAMBDA {
    const auto e = exp_of_any(v - top);
    store_several(x + j, e);
    of_row.add(j, e);
  });
  const double sum = of_row.value();
  if (job.row_ce)
    job.row_ce[cluster.position + i] = row_entropy_value(job, row, label, __builtin_log(sum), double(top));
  if (!job.grad) return;
  const RowEntropy e = row_entropy(job, row, label);
  const T scale = T(e.probability / sum);
  const double at_label = e.probability * (double(x[label]) / sum) - e.one_hot -
                          e.smooth * class_weight(job, label) + (job.carried ? job.carried_label[i] : 0);
  if (e.smooth != 0 || job.carried) {
    for (int64_t j = 0; j < Cp; j += W)
      store(x + j, load<V>(x + j) * scale + (job.carried ? carried_at<T>(job, i, j) : V{}));
    subtract_smooth(job, e, x);
    write_row<T>(job, row, [&](int64_t j) { return load<V>(x + j); });
  } else {
    write_row<T>(job, row, [&](int64_t j) { return load<V>(x + j) * scale; });
  }
  write_entry<T>(job, row, label, at_label);
}

}  // namespace
}  // namespace cmim::cpu
