// The last pass over an uncentred cluster: from what accumulate() of wide.h leaves of each row to its
// gradient.
#pragma once

#include "sums.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

template <class T>
struct UncentredGradient : RowSums<T> {
  using Base = RowSums<T>;
  using Base::cluster, Base::Cp, Base::E, Base::job, Base::K, Base::label, Base::n, Base::one, Base::q;
  using Base::r_ce, Base::W, Base::X;
  using V = Vec<T>;

  T* G;              // (groups, n, Cp) sum_k c_k P t of eight temperatures each
  double* at_label;  // (n) the gradient at the label

  using Base::Base;
  int groups() const { return (K + 7) / 8; }
  void place(Layout& layout) {
    Base::place(layout);
    layout.take(G, job.grad ? groups() * n * Cp : 0);
    layout.take(at_label, job.grad ? n : 0);
  }
  T* part_of(int64_t i, int k0) const { return G + (k0 / 8 * n + i) * Cp; }

  // The rows' gradients: G - sum_k q_k E^(p + k), and the cross entropy's. What is rare, or a step of every
  // row by itself, is a loop of its own: a row of ten classes costs as much as what is decided on its way.
  template <Source kSource>
  void write(Span rows) {
    const RowEntropy e = entropy_of(job, cluster.label, 1);
    label.entries(rows, e, at_label);
    if (job.smoothing > 0 || this->own_ce() || job.carried) add_others(rows);
    if (job.has_ce && !this->own_ce())
      for (int64_t i = rows.begin; i < rows.end; ++i)
        q[i * K + job.ce_index] -= T(e.probability * label.upstream[i]) * r_ce[i];
    if constexpr (kSource == Source::chain) {
      for (int k0 = 0; k0 < K; k0 += 16)
        in_one_chunk(K - k0, [&](auto chunk) { subtract_powers<decltype(chunk)::value>(rows, k0); });
    } else {
      subtract_chunks<kSource>(rows);
    }
  }
  // Of every row i, value_of(i)(j) at columns j .. goes to the gradient, or in all but the last pass to the
  // sums so far, where G begins.
  template <class F>
  CMIM_INLINE void finish_pass(Span rows, bool last, F&& value_of) {
    if (last) return write_rows<T>(job, cluster, rows.begin, rows.end, value_of, at_label);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const auto value = value_of(i);
      for (int64_t j = 0; j < Cp; j += W) store(G + i * Cp + j, value(j));
    }
  }

  // In a chain, N temperatures from k0 on; those that are not there have factors of 0.
  template <int N>
  void subtract_powers(Span rows, int k0) {
    constexpr int kEach = N < 8 ? N : 8;
    const int64_t Cp = this->Cp, K = this->K;
    const T *const powers = E, *const factors = q, *const sums = G;
    const T *const g = part_of(0, k0), *const first = this->template first_of<Source::chain>(k0);
    const int next = N > 8 ? k0 + 8 : k0;
    const T* const g_next = part_of(0, next);
    const T* const first_next = this->template first_of<Source::chain>(next);
    finish_pass(rows, k0 + N >= K, [=](int64_t i) CMIM_INLINE_LAMBDA {
      V qi[N];
      const T* const of_row = factors + i * K + k0;
      if (k0 + N <= K)
        for (int k = 0; k < N; ++k) qi[k] = splat<T>(of_row[k]);
      else
        for (int k = 0; k < N; ++k) qi[k] = k0 + k < K ? splat<T>(of_row[k]) : V{};
      const int64_t row = i * Cp;
      return [=](int64_t j) CMIM_INLINE_LAMBDA {
        const int64_t at = row + j;
        const V x = load<V>(powers + at), x2 = x * x;
        const auto taken = [&](int from) CMIM_INLINE_LAMBDA {
          return polynomial<T, kEach>(x, x2, [&](int k) CMIM_INLINE_LAMBDA { return qi[from + k]; });
        };
        V v = load<V>(g + at) - taken(0) * load<V>(first + at);
        if constexpr (N > 8) v += load<V>(g_next + at) - taken(8) * load<V>(first_next + at);
        return k0 > 0 ? v + load<V>(sums + at) : v;
      };
    });
  }
  // Where every temperature has an exponential of its own, chunk by chunk
  template <Source kSource>
  void subtract_chunks(Span rows) {
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const int64_t Cp = this->Cp, K = this->K;
      const T *const from = this->template place_of<kSource>(0, k0), *const factors = q + k0, *const xs = X;
      const int64_t row_stride = this->template column<kSource>(Cp);
      const Scales<T> scales = this->scales_from(k0);
      const T* const parts = part_of(0, k0);
      T* const sums = G;  // of the chunks so far
      const bool adds = k0 > 0, more = k0 % 8 != 0;
      const auto value_of = [=](int64_t i) CMIM_INLINE_LAMBDA {
        V qi[N];
        for (int k = 0; k < N; ++k) qi[k] = splat<T>(factors[i * K + k]);
        const T *const own = from + i * row_stride, *const x = xs + i * Cp;
        const T *const g = parts + i * Cp, *const sum = sums + i * Cp;
        return [=](int64_t j) CMIM_INLINE_LAMBDA {
          auto ex = Exponentials<kSource, T>{own, x, scales}.at(this->template column<kSource>(j), j);
          SumOfProducts<T, N> taken;
          for (int k = 0; k < N; ++k) taken.add(k, qi[k], ex.at(k));
          const V v = (more ? V{} : load<V>(g + j)) - taken.total();
          return adds ? v + load<V>(sum + j) : v;
        };
      };
      finish_pass(rows, k0 + N == K, value_of);
    });
  }

  // What the rows' gradients hold beside the temperatures': smoothed targets, a softmax at temperature 1 that
  // is a term of its own, and what an earlier part of the temperatures left.
  void add_others(Span rows) {
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const RowEntropy e = row_entropy(job, cluster.rows[i], cluster.label);
      T* const g = part_of(i, 0);
      subtract_smooth(job, e, g);
      const T soft = T(e.probability) * r_ce[i], *const at_one = one + i * Cp;
      for (int64_t j = 0; this->own_ce() && j < Cp; j += W)
        store(g + j, load<V>(g + j) + soft * load<V>(at_one + j));
      for (int64_t j = 0; job.carried && j < Cp; j += W)
        store(g + j, load<V>(g + j) + carried_at<T>(job, i, j));
      if (job.carried) at_label[i] += job.carried_label[i];
    }
  }
};

}  // namespace
}  // namespace cmim::cpu
