// The first pass over an uncentred cluster: for each row X = z less a constant, exponentials, and their sums
// S_k.
#pragma once

#include <limits>

#include "label.h"
#include "rows.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

template <class T>
struct RowSums : Rows<T> {
  using Base = Rows<T>;
  using Base::a, Base::C, Base::cluster, Base::cols, Base::Cp, Base::E, Base::job, Base::K, Base::least,
      Base::n, Base::r, Base::r_ce;
  using Base::source, Base::W, Base::X;
  using V = Vec<T>;
  static constexpr bool kCareful = sizeof(T) == 8;

  V* acc;           // (n, K) sums of P t in lanes, from tile to tile
  double* off;      // (n, K) S relative to the row's largest logit, then its logarithm: see centre()
  T *mix, *mix_up;  // (n, K) weight of the row's exponentials in Q, and in R
  T *shift, *up;    // (K) mean of log sum exp(a X), in the base of the exponentials; (n) upstream gradient
  T* tops;          // (n) what X is relative to: see reference()
  T* starts;  // (chunks, n, Cp) of a chain, exp(a X) of the chunk's first a, but where that is E: a high
              // power of E would carry its rounding that many times over
  T* one;     // (n, Cp) exp(X), where the softmax at temperature 1 is a term of its own
  double* sums_one;  // (n) its sum, then the logarithm of that
  double* rounded;   // (n, K) what the rounding of mix adds to sum_j Q
  T* ahead;          // (n) the label's logit less the largest other, 0 where it is none
  LabelColumn<!kCareful> label;
  double over_n;  // 1 / n
  T floor;        // of X: exp(a X) is 0 there at every temperature

  RowSums(const Job& j, const Cluster& cl, bool whole)
      : Base(j, cl, choose_source<T>(j, cl), whole), label(j, cl) {}
  void place(Layout& layout) {
    Base::place(layout);
    layout.take(acc, n * K);
    layout.take(off, n * K + Simd<double>::width);
    layout.take(mix, n * K), layout.take(mix_up, per_row() ? n * K : 0);
    layout.take(shift, K), layout.take(rounded, kCareful ? 0 : n * K), layout.take(up, n),
        layout.take(tops, n);
    layout.take(starts, source == Source::chain ? (chunks_before(K, K) - skipped()) * n * Cp : 0);
    layout.take(one, this->own_ce() ? n * Cp : 0), layout.take(sums_one, n);
    layout.take(ahead, kCareful ? 0 : n);
    label.place(layout);
  }
  bool per_row() const { return label.per_row(); }
  // exp(a_k X) of U vectors of row i at columns j ..
  template <Source kSource, int U>
  CMIM_INLINE Several<T, U> exponentials_at(int64_t i, int k, int64_t j) const {
    if constexpr (kSource == Source::chain)
      return power<T>(load_several<U>(E + i * Cp + j), job.power0 + k);
    else if constexpr (kSource == Source::stored)
      return load_several<U>(this->template place_of<kSource>(i, k) + this->template column<kSource>(j),
                             K * W);
    else
      return exp_scaled(load_several<U>(X + i * Cp + j), a[k], least[k]);
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
  // the X where exp(inverse_temperature X) vanishes, with no temperature so high that it is infinite
  static T vanishing(double inverse_temperature) {
    const double x = double(kVanishes<T>) / inverse_temperature;
    return x > -double(std::numeric_limits<T>::max()) ? T(x) : -std::numeric_limits<T>::max();
  }
  Scales<T> scales_from(int k0) const { return {a + k0, least + k0}; }

  template <Source kSource>
  void fill() {
    constexpr double unit = kUnit<T, kSource>;
    over_n = 1 / double(n);
    floor = floor_of<T>(job);
    for (int k = 0; k < K; ++k)  // multiples stay multiples, as the powers are
      a[k] = unit != 1 && job.multiple ? T(double(T(job.base * unit)) * job.multiple[k]) : T(job.a[k] * unit);
    for (int k = 0; k < K; ++k) least[k] = vanishing(job.a[k]);
    label.fill([&](int k) {
      if (kCareful) return job.a[k];
      return kSource == Source::chain ? double(T(job.base)) * (job.power0 + k) : double(a[k]) / unit;
    });
  }

  // Step by step for all rows of a block, so that no row waits for the end of another's steps, each of which
  // ends in a chain of operations that use each other's results.
  template <Source kSource>
  void prepare(const Team& team) {
    reference(team);
    this->by_block(team, [&](Span rows) {
      exponentials<kSource>(rows);
      sum_rows<kSource>(rows);
      scales<kSource>(rows);
    });
  }

  // tops, what X is relative to: the largest logit, in float less what the label is ahead of all others by in
  // every row. Beside a label that is far ahead, X of the others would be large numbers that are nearly the
  // same in all rows, and t their difference. (Not with given centroids: where they are 0, t is infinite, and
  // must not meet a factor of the row that has vanished.)
  void reference(const Team& team) {
    const bool own_centroids = !kCareful && !job.centroids;
    this->by_block(team, [&](Span rows) {
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const T* const z = row_values(job, cluster.rows[i], X + i * Cp);
        if constexpr (!kCareful) {
          if (own_centroids) {
            const T own = z[cluster.label], others = largest_but(z, C, cluster.label);
            const bool first = own > others;
            tops[i] = first ? own : others, ahead[i] = first ? own - others : T(0);
            continue;
          }
        }
        tops[i] = largest(z, C);
      }
    });
    if (!own_centroids) return;
    T least = -floor;  // all others vanish
    for (int64_t i = 0; i < n; ++i) least = ahead[i] < least ? ahead[i] : least;
    for (int64_t i = 0; i < n; ++i) tops[i] -= least;
  }

  // X, E of a chain, and `one` with its sum where that is a term of its own
  template <Source kSource>
  void exponentials(Span rows) {
    const T base = T(job.base * kUnit<T, kSource>), floor = this->floor;
    const int64_t C = this->C, Cp = this->Cp, label = cluster.label;
    const int64_t begin = rows.begin * Cp, count = rows.end * Cp - begin;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      T* const x = X + i * Cp;
      const T top = tops[i];
      each_several(row_place(job, cluster.rows[i], x), C, [&](int64_t j, auto v) CMIM_INLINE_LAMBDA {
        store_several(x + j, at_least(v - top, floor));
      });
      if constexpr (!kCareful) set_entry(x, label, floor);
    }
    // of all columns of a block, whatever row they are of
    const auto of_columns = [&](T* to, auto&& f) CMIM_INLINE_LAMBDA {
      by_several<T>(count, [&](auto several, int64_t at) CMIM_INLINE_LAMBDA {
        store_several(to + begin + at, f(load_several<decltype(several)::value>(X + begin + at)));
      });
    };
    if constexpr (kSource == Source::chain) {
      of_columns(E, [=](const auto& x) CMIM_INLINE_LAMBDA { return exp_nonpositive(x * base); });
      if constexpr (!kCareful)
        for (int64_t i = rows.begin; i < rows.end; ++i) set_entry(E + i * Cp, label, T(0));
      by_chunk(K, [&](auto, int k0) CMIM_INLINE_LAMBDA {
        T* const first = first_of<kSource>(k0);
        const T scaled = T(job.a[k0] * kLog2<T>), vanishes = least[k0];
        if (first != E)
          of_columns(first,
                     [=](const auto& x) CMIM_INLINE_LAMBDA { return exp_scaled(x, scaled, vanishes); });
      });
    }
    if (this->own_ce()) {
      of_columns(one, [](const auto& x) CMIM_INLINE_LAMBDA { return exp_nonpositive(x); });
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        RowSum<T> sum;
        for (int64_t j = 0; j < Cp; j += W) sum.add(j, load<V>(one + i * Cp + j));
        sums_one[i] = sum.value();
      }
    }
  }

  // off: S, of a row's exponentials
  template <Source kSource>
  void sum_rows(Span rows) {
    if constexpr (kSource == Source::chain) {
      sum_exponentials<kSource, 1>(rows, [=](auto, int64_t at, int k0) CMIM_INLINE_LAMBDA {
        return Exponentials<kSource, T>{E, this->template first_of<kSource>(k0), {}}.at(at, at);
      });
      return;
    }
    if constexpr (kSource == Source::stored) {
      if (job.multiple) {
        const T base = T(job.base * kUnit<T, kSource>), vanishes = vanishing(job.base);
        sum_exponentials<kSource, kTogether>(rows, [=](auto several, int64_t at, int k0) CMIM_INLINE_LAMBDA {
          constexpr int U = decltype(several)::value;
          const auto x = load_several<U>(X + at);
          return PowersOfColumns<T, Several<T, U>>{
              {x, scales_from(k0)}, exp_scaled(x, base, vanishes), job.multiple + k0};
        });
        return;
      }
    }
    sum_exponentials<kSource, kTogether>(rows, [=](auto several, int64_t at, int k0) CMIM_INLINE_LAMBDA {
      constexpr int U = decltype(several)::value;
      return OfColumns<T, Several<T, U>>{load_several<U>(X + at), scales_from(k0)};
    });
  }

  // make(how many vectors of columns as a constant, place in (n, Cp), k0) gives the exponentials of a chunk;
  // stored ones are kept in E, so that one pass makes them and adds them up.
  template <Source kSource, int kColumns, class F>
  CMIM_INLINE void sum_exponentials(Span rows, F&& make) {
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const int64_t most = cols * kFlushTiles, Cp = this->Cp, K = this->K;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const int64_t at = i * K + k0;
        for (int k = 0; k < N; ++k) off[at + k] = 0;
        T* const keep = this->template place_of<kSource>(i, k0);
        for (int64_t j0 = 0; j0 < Cp; j0 += most) {
          V s[N] = {};
          by_several<T, kColumns>(Cp - j0 < most ? Cp - j0 : most,
                                  [&](auto several, int64_t from) CMIM_INLINE_LAMBDA {
                                    const int64_t j = j0 + from, place = this->template column<kSource>(j);
                                    auto ex = make(several, i * Cp + j, k0);
                                    for (int k = 0; k < N; ++k) {
                                      const auto e = ex.at(k);
                                      if constexpr (kSource == Source::stored)
                                        store_several(keep + place + k * W, e, K * W);
                                      s[k] += sum_parts(e);
                                    }
                                  });
          add_lanes<T, N>(s, off + at);
        }
      }
    });
  }

  // What follows from the sums of the rows
  template <Source kSource>
  void scales(Span rows) {
    label.exponentials(rows, tops);
    by_doubles(K, [&](auto width, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(width)::value;
      const int64_t K = this->K;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const auto sums = doubles<N>(off + i * K + k0);  // S until centre(), here of the columns in E
        const auto inverse = label.template normalise<N>(i, k0, off + i * K + k0);
        const double upstream = label.upstream[i];
        this->template set_scales<N>(i, k0, inverse, (per_row() ? 1.0 : upstream) / kUnit<T, kSource>);
        const auto mean = inverse * over_n;
        store_doubles<N>(mix + i * K + k0, mean);
        if constexpr (!kCareful)
          store_doubles<N>(rounded + i * K + k0, (doubles<N>(mix + i * K + k0) - mean) * sums);
        if (per_row()) store_doubles<N>(mix_up + i * K + k0, mean * upstream);
      }
    });
    for (int64_t i = rows.begin; i < rows.end; ++i) up[i] = T(label.upstream[i]);
    if (this->own_ce()) {
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        r_ce[i] = T(label.normalise_one(i, sums_one[i]));
        sums_one[i] = __builtin_log(sums_one[i]);
      }
      set_entropies(rows, sums_one, 1);
    } else if (job.has_ce) {
      const int64_t at = job.ce_index;
      for (int64_t i = rows.begin; i < rows.end; ++i)
        r_ce[i] = r[i * K + at], label.p_ce[i] = label.p[i * label.Kp + at];
    } else {
      for (int64_t i = rows.begin; i < rows.end; ++i) r_ce[i] = 0, this->set_entropy(i, 0, 0);
    }
  }

  // A multiple of the last place of log Q, so that adding it is exact: one rounding in every column alike
  // would not average out.
  template <class V>
  CMIM_INLINE static V on_grid(V shift) {
    constexpr double kRounds = 0x1.8p52 * 0x1p-16;  // 2^-16: the spacing of floats up to 256
    return (shift + kRounds) - kRounds;
  }

  // log_sums: log sum_j exp(z_j - max z) of every row, a stride apart
  void set_entropies(Span rows, const double* log_sums, int64_t stride) {
    if (!job.row_ce) return;
    double* const to = job.row_ce + cluster.position;
    if (job.smoothing > 0) {
      for (int64_t i = rows.begin; i < rows.end; ++i)
        this->set_entropy(i, log_sums[i * stride], double(tops[i]) + label.lead[i]);
    } else {
      const double weight = class_weight(job, cluster.label);
      for (int64_t i = rows.begin; i < rows.end; ++i)
        to[i] = weight * (log_sums[i * stride] - label.below_top[i]);
    }
  }

  // off holds S and becomes log S, in double less the shift
  template <Source kSource>
  void centre() {
    by_several<double>(n * K, [&](auto several, int64_t at) CMIM_INLINE_LAMBDA {
      const auto sums = load_several<decltype(several)::value>(off + at);
      store_several(off + at, log_positive<false, decltype(label)::kLogTerms>(sums));
    });
    if (job.has_ce && job.ce_index >= 0) set_entropies({0, n}, off + job.ce_index, K);
    by_doubles(K, [&](auto width, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(width)::value;
      constexpr double unit = kUnit<T, kSource>;
      const auto ak = doubles<N>(label.a + k0);
      auto mean = doubles<N>(off + k0) + ak * label.lead[0];
      for (int64_t i = 1; i < n; ++i) mean += doubles<N>(off + i * K + k0) + ak * label.lead[i];
      mean *= over_n * unit;
      if (job.centroids) mean = mean - mean == 0.0 ? mean : decltype(mean){};  // rows are each for itself
      store_doubles<N>(shift + k0, kCareful ? mean : on_grid(mean));
      if constexpr (kCareful)
        for (int64_t i = 0; i < n; ++i)
          store_doubles<N>(off + i * K + k0, doubles<N>(off + i * K + k0) - mean);
    });
  }
};

}  // namespace
}  // namespace cmim::cpu
