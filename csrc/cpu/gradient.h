// The last pass over an uncentred cluster: from what accumulate() of wide.h leaves of each row to its
// gradient.
#pragma once

#include "sums.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

template <class T>
struct UncentredGradient : RowSums<T> {
  using Base = RowSums<T>;
  using Base::cluster, Base::Cp, Base::job, Base::K, Base::label, Base::n, Base::one, Base::q;
  using Base::r_ce, Base::W;
  using V = Vec<T>;

  T* G;              // (chunks, n, Cp) sum_k c_k P t of the chunk's temperatures
  double* at_label;  // (n) the gradient at the label

  using Base::Base;
  void place(Layout& layout) {
    Base::place(layout);
    layout.take(G, job.grad ? chunks_before(K, K) * n * Cp : 0);
    layout.take(at_label, job.grad ? n : 0);
  }
  T* part_of(int64_t i, int k0) const { return G + (chunks_before(k0, K) * n + i) * Cp; }

  // The rows' gradients: G - sum_k q_k E^(p + k), chunk by chunk, and the cross entropy's. What is rare, or a
  // step of every row by itself, is a loop of its own: a row of ten classes costs as much as what is decided
  // on its way.
  template <Source kSource>
  void write(Span rows) {
    const RowEntropy e = entropy_of(job, cluster.label, 1);
    label.entries(rows, e, at_label);
    if (job.smoothing > 0 || this->own_ce() || job.carried) add_others(rows);
    if (job.has_ce && !this->own_ce())
      for (int64_t i = rows.begin; i < rows.end; ++i)
        q[i * K + job.ce_index] -= T(e.probability * label.upstream[i]) * r_ce[i];
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const int64_t Cp = this->Cp, K = this->K;
      const T *const firsts = this->template first_of<kSource>(k0), *const parts = part_of(0, k0);
      const T *const from = this->template place_of<kSource>(0, k0), *const factors = q + k0;
      const int64_t row_stride = this->template column<kSource>(Cp);
      const Scales<T> scales = this->scales_from(k0);
      T* const sums = part_of(0, 0);  // of the chunks so far
      const auto value_of = [=](int64_t i) CMIM_INLINE_LAMBDA {
        V qi[N];
        for (int k = 0; k < N; ++k) qi[k] = splat<T>(factors[i * K + k]);
        const T *const own = from + i * row_stride, *const first = firsts + i * Cp;
        const T *const g = parts + i * Cp, *const sum = sums + i * Cp;
        return [=](int64_t j) CMIM_INLINE_LAMBDA {
          V v = load<V>(g + j);
          if constexpr (kSource == Source::chain) {
            v -= polynomial<T, N>(load<V>(own + j), qi) * load<V>(first + j);
          } else {
            auto ex =
                Exponentials<kSource, T>{own, first, scales}.at(kSource == Source::stored ? j * K : j, j);
            SumOfProducts<T, N> taken;
            for (int k = 0; k < N; ++k) taken.add(k, qi[k], ex.at(k));
            v -= taken.total();
          }
          return k0 > 0 ? v + load<V>(sum + j) : v;
        };
      };
      if (k0 + N == K) return write_rows<T>(job, cluster, rows.begin, rows.end, value_of, at_label);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const auto value = value_of(i);
        for (int64_t j = 0; j < Cp; j += W) store(sums + i * Cp + j, value(j));
      }
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
