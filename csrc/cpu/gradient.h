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

  T* G;  // (chunks, n, Cp) sum_k c_k P t of the chunk's temperatures

  using Base::Base;
  void place(Layout& layout) {
    Base::place(layout);
    layout.take(G, job.grad ? chunks_before(K, K) * n * Cp : 0);
  }
  T* part_of(int64_t i, int k0) const { return G + (chunks_before(k0, K) * n + i) * Cp; }

  // The rows' gradients: G - sum_k q_k E^(p + k), chunk by chunk, and the cross entropy's.
  template <Source kSource>
  void write(Span rows) {
    const bool own_ce = this->own_ce(), carried = job.carried;
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const int64_t Cp = this->Cp, K = this->K;
      const bool last = k0 + N == K;
      const T *const firsts = this->template first_of<kSource>(k0), *const parts = part_of(0, k0);
      T* const sums = part_of(0, 0);  // of the chunks so far
      RowEntropy e{};                 // of all rows alike, but for their upstream gradients
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const int64_t row = cluster.rows[i];
        if (i == rows.begin || job.upstream) e = row_entropy(job, row, cluster.label);
        const T soft = job.has_ce ? T(e.probability) * r_ce[i] : T(0);
        T* const sum = sums + i * Cp;
        if (k0 == 0) {
          if (job.has_ce && !own_ce) q[i * K + job.ce_index] -= soft;
          subtract_smooth(job, e, sum);
        }
        V qi[N];
        for (int k = 0; k < N; ++k) qi[k] = splat<T>(q[i * K + k0 + k]);
        const T* const from = this->template place_of<kSource>(i, k0);
        const Scales<T> scales = this->scales_from(k0);
        const T *const first = firsts + i * Cp, *const g = parts + i * Cp, *const at_one = one + i * Cp;
        auto value = [=](int64_t j) CMIM_INLINE_LAMBDA {
          V v = load<V>(g + j);
          if constexpr (kSource == Source::chain) {
            v -= polynomial<T, N>(load<V>(from + j), qi) * load<V>(first + j);
          } else {
            auto ex = Exponentials<kSource, T>{from, first, scales}.at(this->template column<kSource>(j), j);
            SumOfProducts<T, N> taken;
            for (int k = 0; k < N; ++k) taken.add(k, qi[k], ex.at(k));
            v -= taken.total();
          }
          if (k0 > 0) v += load<V>(sum + j);
          if (last && own_ce) v += soft * load<V>(at_one + j);
          if (last && carried) v += carried_at<T>(job, i, j);
          return v;
        };
        if (last) {
          write_row<T>(job, row, value);
          write_entry<T>(job, row, cluster.label, label.entry(i, e) + (carried ? job.carried_label[i] : 0));
        } else {
          for (int64_t j = 0; j < Cp; j += W) store(sum + j, value(j));
        }
      }
    });
  }
};

}  // namespace
}  // namespace cmim::cpu
