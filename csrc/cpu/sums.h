// The first pass over an uncentred cluster: for each row X = z - max z, exponentials, and their sums S_k.
#pragma once

#include "label.h"
#include "rows.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

template <class T, bool kPerRow>
struct RowSums : Rows<T> {
  using Base = Rows<T>;
  using Base::a, Base::C, Base::cluster, Base::cols, Base::Cp, Base::E, Base::job, Base::K, Base::n, Base::r;
  using Base::source, Base::W, Base::X;
  using V = Vec<T>;
  static constexpr bool kCareful = sizeof(T) == 8;

  double* off;      // (n, K) S, then log S less its mean over the rows
  T *mix, *mix_up;  // (n, K) weight of the row's exponentials in Q, and in R
  T *shift, *up;    // (K) mean of log S, in the base of the exponentials; (n) upstream gradient
  T* tops;          // (n) largest logit
  T* starts;  // (chunks, n, Cp) of a chain, exp(a X) of the chunk's first a, but where that is E: a high
              // power of E would carry its rounding that many times over
  T* one;     // (n, Cp) exp(X), where the softmax at temperature 1 is a term of its own
  LabelColumn<kPerRow, !kCareful> label;

  RowSums(const Job& j, const Cluster& cl, bool whole) : Base(j, cl, choose(j, cl), whole), label(j, cl) {}
  void place(typename Base::Layout& layout) {
    Base::place(layout);
    layout.take(off, n * K + Simd<double>::width);
    layout.take(mix, n * K), layout.take(mix_up, kPerRow ? n * K : 0);
    layout.take(shift, K), layout.take(up, n), layout.take(tops, n);
    layout.take(starts, source == Source::chain ? (chunks_before(K, K) - skipped()) * n * Cp : 0);
    layout.take(one, this->own_ce() ? n * Cp : 0);
    if (needs_label()) label.place(layout);
  }
  static Source choose(const Job& j, const Cluster& cl) {
    if (j.power0 > 0) return Source::chain;
    return cl.count * j.classes * j.temperatures * int64_t(sizeof(T)) <= kStoredBytes ? Source::stored
                                                                                      : Source::direct;
  }
  int skipped() const { return job.power0 == 1 ? 1 : 0; }
  // the rows that Exponentials has as `first`
  template <Source kSource>
  T* first_of(int k0) const {
    if constexpr (kSource != Source::chain) return X;
    const int chunk = chunks_before(k0, K) - skipped();
    return chunk < 0 ? E : starts + chunk * n * Cp;
  }
  // f(the source as a constant)
  template <class F>
  CMIM_INLINE auto with_source(F&& f) {
    if (source == Source::chain) return f(std::integral_constant<Source, Source::chain>{});
    if (source == Source::stored) return f(std::integral_constant<Source, Source::stored>{});
    return f(std::integral_constant<Source, Source::direct>{});
  }
  bool needs_label() const { return job.grad || !kCareful; }

  template <Source kSource>
  void fill() {
    constexpr double unit = kUnit<T, kSource>;
    for (int k = 0; k < K; ++k)  // multiples stay multiples, as the powers are
      a[k] = unit != 1 && job.multiple ? T(double(T(job.base * unit)) * job.multiple[k]) : T(job.a[k] * unit);
    if (needs_label()) label.fill([&](int k) { return kCareful ? job.a[k] : double(a[k]) / unit; });
  }

  template <Source kSource>
  void prepare(int64_t i) {
    const int64_t row = cluster.rows[i], Cp = this->Cp;
    constexpr double unit = kUnit<T, kSource>;
    const T* const z = row_values(job, row, X + i * Cp);
    const T top = largest(z, C), base = T(job.base * unit);
    const T floor =
        kVanishes<T> / T(this->own_ce() && job.a[0] > 1 ? 1.0 : job.a[0]);  // vanishes at every temperature
    tops[i] = top;
    T *const x = X + i * Cp, *const e = E + i * Cp;
    each_vector(z, C, [=](int64_t j, V v) CMIM_INLINE_LAMBDA {
      v = at_least(v - top, floor);
      store(x + j, v);
      if constexpr (kSource == Source::chain) store(e + j, exp_nonpositive(base * v));
    });
    if constexpr (!kCareful) {
      x[cluster.label] = floor;
      if constexpr (kSource == Source::chain) e[cluster.label] = 0;
    }
    if constexpr (kSource == Source::chain)
      by_chunk(K, [&](auto, int k0) CMIM_INLINE_LAMBDA {
        T* const first = first_of<kSource>(k0) + i * Cp;
        if (first == e) return;
        for (int64_t j = 0; j < Cp; j += W) store(first + j, exp_nonpositive(a[k0] * load<V>(x + j)));
      });
    double* const sums = off + i * K;           // its place until centre()
    if constexpr (kSource == Source::stored) {  // here, so that one pass makes them and adds them up
      if (job.multiple)
        sum_exponentials<kSource>(i, sums, [=](int64_t j, int k0) CMIM_INLINE_LAMBDA {
          return Powers<T>(x + j, base, a + k0, job.multiple + k0);
        });
      else
        sum_exponentials<kSource>(i, sums, [=](int64_t j, int k0) CMIM_INLINE_LAMBDA {
          return Exponentials<Source::direct, T>{x, x, a + k0, 0}.at(j, j);
        });
    } else {
      sum_exponentials<kSource>(i, sums, [=](int64_t j, int k0) CMIM_INLINE_LAMBDA {
        return Exponentials<kSource, T>{e, this->template first_of<kSource>(k0) + i * Cp, a + k0, 0}.at(j, j);
      });
    }
    double s_ce = job.has_ce && !this->own_ce() ? sums[job.ce_index] : 0;
    if (this->own_ce())  // 1 is not one of the inverse temperatures
      s_ce =
          store_exponentials(one + i * Cp, Cp, [=](int64_t j) CMIM_INLINE_LAMBDA { return load<V>(x + j); });
    const double upstream = job.upstream ? job.upstream[row] : 1.0;
    if (needs_label()) label.set_row(i, double(top), double(floor), sums, s_ce);
    this->set_row(i, sums, s_ce, (kPerRow ? 1.0 : upstream) / unit);
    if (this->own_ce() || !job.has_ce)
      this->set_entropy(i, job.has_ce ? __builtin_log(s_ce) : 0, double(top));
    up[i] = T(upstream);
    for (int64_t at = i * K; at < (i + 1) * K; ++at) {
      mix[at] = r[at] / T(n);
      if constexpr (kPerRow) mix_up[at] = mix[at] * up[i];
    }
  }

  // sums[k] = S_k. make(j, k0) gives the exponentials of a chunk; stored ones are kept in E.
  template <Source kSource, class F>
  CMIM_INLINE void sum_exponentials(int64_t i, double* sums, F&& make) {
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      for (int k = 0; k < N; ++k) sums[k0 + k] = 0;
      T* const keep = this->template place_of<kSource>(i, k0);
      const int64_t between = cols, flush = cols * kFlushTiles;
      for (int64_t j0 = 0; j0 < Cp; j0 += flush) {
        V s[N] = {};
        for (int64_t j = j0; j < Cp && j < j0 + flush; j += W) {
          const int64_t at = this->template column<kSource>(j);
          auto ex = make(j, k0);
          for (int k = 0; k < N; ++k) {
            const V e = ex.at(k);
            s[k] += e;
            if constexpr (kSource == Source::stored) store(keep + k * between + at, e);
          }
        }
        add_lanes<T, N>(s, sums + k0);
      }
    });
  }

  // A multiple of the last place of log Q, so that adding it is exact: one rounding in every column alike
  // would not average out.
  static double on_grid(double shift) {
    constexpr double kSpacing = 0x1p-16;  // of floats up to 256
    return __builtin_rint(shift / kSpacing) * kSpacing;
  }

  // off holds S; it becomes the deviation of log S from its mean over the cluster
  template <Source kSource>
  void centre() {
    for (int64_t at = 0; at < n * K; at += Simd<double>::width)
      store(off + at, log_positive(load<Vec<double>>(off + at)));
    if (job.has_ce && job.ce_index >= 0)
      for (int64_t i = 0; i < n; ++i) this->set_entropy(i, off[i * K + job.ce_index], double(tops[i]));
    for (int k = 0; k < K; ++k) {
      double mean = 0;
      for (int64_t i = 0; i < n; ++i) mean += off[i * K + k];
      constexpr double unit = kUnit<T, kSource>;
      shift[k] = T(kCareful ? mean / double(n) : on_grid(mean * unit / double(n)));
      for (int64_t i = 0; i < n; ++i) off[i * K + k] -= double(shift[k]) / unit;
    }
  }
};

}  // namespace
}  // namespace cmim::cpu
