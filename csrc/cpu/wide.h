// A cluster from its logits as they are, in float or double.
//
//   prepare()            X = z less a constant of the row, E = exp(base X), S_k = sum exp(a_k X), the cross
//                        entropy
//   centroid(tile)       L_k = log Q_k, shifted by the mean over the rows of log S_k, which keeps t small
//   accumulate(rows)     t = a_k X - L_k = log(P/Q) up to a constant of the row;  H_k = sum_j P t;
//                        G = sum_k c_k P t
//   divergences()        KL_k from H_k
//   write(rows)          G - sum_k c_k H_k P_k, and the cross entropy's gradient
//
// A constant of the row added to t changes H_k, but not t - H_k, so the gradient does not need it. Columns go
// by in tiles that stay in the first-level cache between centroid and accumulate. G and what is taken from it
// nearly cancel where one class has most of a row's probability: sums over temperatures are by pairs or in
// two chains.
//
// In float, t carries the rounding of numbers of the size of X: enough where the rows differ visibly. The
// label's column is left out of E, and its part of every sum comes in double from label.h; where it is ahead
// of the others in all rows, X is relative to them. Where the rows are close, KL is small beside what P t
// sums to but for the signs; such temperatures have it summed once more, as P t psi_ratio(t). A cluster that
// float cannot resolve even so is done again in double, where KL is summed as Q psi(t), which never cancels.
#pragma once

#include "gradient.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

// Float is not enough where a cluster's mean KL is, at any temperature that counts, below the first of these,
// and below the second in units of the probability outside the label: what carries the rounding.
// docs/numerics.md measures both sides of the seam.
constexpr double kRedoBelow = 3e-4, kRedoBelowRest = 0.02;
// In place of the second at the close temperatures, where KL is summed as P t psi_ratio(t): no term of that
// is negative, and what t is off by in all columns alike does not count. It is the gradient that limits
// these.
constexpr double kRedoBelowClose = 3e-5;
constexpr double kFarthest = 1.5;  // |t|, of psi_ratio<8>

// kGiven: the centroids are given. kPerRow: the batch's own centroids, and every row has an upstream gradient
// of its own, so that the path through the centroid does not cancel: t becomes h = g_i t - R/Q
// (docs/math.md).
template <class T, bool kGiven, bool kPerRow>
struct Wide : UncentredGradient<T> {
  using Base = UncentredGradient<T>;
  using Base::a, Base::acc, Base::c, Base::C, Base::cluster, Base::cols, Base::Cp, Base::job, Base::K,
      Base::kCareful;
  using Base::kStride, Base::label, Base::mix, Base::mix_up, Base::n, Base::off, Base::one, Base::q, Base::r;
  using Base::r_ce, Base::slots, Base::table, Base::tiles, Base::up, Base::W, Base::X;
  using V = Vec<T>;

  V* kl_acc;                  // (n, K) sums of Q psi(t) in lanes, acc those of P t
  double *h_sum, *kl_sum;     // (n, K), the second where kCareful or close
  T* farthest;                // (n) largest |t| at the close temperatures
  double* excess;             // (K) sum_j Q - 1 of given centroids
  double *all_kl, *all_rest;  // (K) sums over the rows of KL and of 1 - p at the label
  T *log_label, *rho_label;   // (K) L and rho at the label
  T *L, *Q, *rho;             // (slots, K, kStride)

  Wide(const Job& j, const Cluster& cl, bool whole, Workspace& ws) : Base(j, cl, whole) {
    lay_out(ws.pass, [&](Layout& layout) { place(layout); });
  }
  void place(Layout& layout) {
    Base::place(layout);
    layout.take(kl_acc, kCareful ? n * K : 0);
    layout.take(h_sum, n * K), layout.take(kl_sum, kCareful || close() > 0 ? n * K : 0);
    layout.take(farthest, close() > 0 ? n : 0);
    layout.take(excess, kGiven && !kCareful ? K : 0);
    layout.take(all_kl, kCareful ? 0 : K), layout.take(all_rest, kCareful ? 0 : K);
    layout.take(log_label, kCareful ? K : 0), layout.take(rho_label, kPerRow ? K : 0);
    layout.take(L, slots * K * kStride), layout.take(Q, kCareful ? slots * K * kStride : 0);
    layout.take(rho, kPerRow ? slots * K * kStride : 0);
  }
  // The close temperatures: the batch's own centroids, in float
  int close() const { return kCareful || kGiven ? 0 : job.close; }
  void clear_sums(Span rows) {
    for (int64_t at = rows.begin * K; at < rows.end * K; ++at) {
      h_sum[at] = 0;
      if (kCareful || close() > 0) kl_sum[at] = 0;
    }
    for (int64_t i = rows.begin; close() > 0 && i < rows.end; ++i) farthest[i] = 0;
  }

  template <Source kSource>
  void centroid(int64_t tile) {
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const int64_t n = this->n, Cp = this->Cp, K = this->K;
      const Scales<T> scales = this->scales_from(k0);
      const T* const from = this->template place_of<kSource>(0, k0);
      const int64_t row_stride = this->template column<kSource>(Cp);
      const T* const first = this->template first_of<kSource>(k0);
      const int64_t begin = tile * cols, end = this->end_of(tile);
      T *const l = table(L, k0, tile), *const mean_to = kCareful ? table(Q, k0, tile) : l;
      T* const rho_to = table(rho, k0, tile);
      // Logarithms are apart from the sums, so that many are under way at a time; but where the exponentials
      // come from the second-level cache, by one vector of columns, while the next is waited for.
      constexpr int64_t kGroup = W * (kSource == Source::stored ? 1 : kTileVectors);
      for (int64_t j0 = begin; j0 < end; j0 += kGroup) {
        const int64_t group_end = j0 + kGroup < end ? j0 + kGroup : end;
        for (int64_t j = j0; j < group_end; j += W) {
          V mean[N] = {}, weighted[N] = {};
          if constexpr (kGiven) {
            for (int k = 0; k < N; ++k) mean[k] = given(k0 + k, j);
          } else {
            const auto add_rows = [&](int64_t i, V(&sum)[N], V(&sum_up)[N]) CMIM_INLINE_LAMBDA {
              for (const int64_t block_end = i + kSumBlock < n ? i + kSumBlock : n; i < block_end; ++i) {
                auto ex = Exponentials<kSource, T>{from + i * row_stride, first + i * Cp, scales}.at(
                    this->template column<kSource>(j), j);
                for (int k = 0; k < N; ++k) {
                  const V e = ex.at(k);
                  sum[k] += e * mix[i * K + k0 + k];
                  if constexpr (kPerRow) sum_up[k] += e * mix_up[i * K + k0 + k];
                }
              }
            };
            add_rows(0, mean, weighted);
            for (int64_t i0 = kSumBlock; i0 < n; i0 += kSumBlock) {
              V part[N] = {}, part_up[N] = {};
              add_rows(i0, part, part_up);
              for (int k = 0; k < N; ++k) {
                mean[k] += part[k];
                if constexpr (kPerRow) weighted[k] += part_up[k];
              }
            }
          }
          for (int k = 0; k < N; ++k) {
            store(mean_to + k * kStride + j, mean[k]);
            if constexpr (kPerRow)  // where the mean vanished, so have all its P, which multiply this
              store(rho_to + k * kStride + j, mean[k] < kSmallestNormal<T> ? V{} : weighted[k] / mean[k]);
          }
        }
        constexpr int U = kAtOnce<N>;
        for (int k = 0; k < N; k += U) {
          const auto shift = splat_each<U>(this->shift + k0 + k);
          for (int64_t j = j0; j < group_end; j += W) {
            const auto mean = load_several<U>(mean_to + k * Base::kStride + j, Base::kStride);
            const auto log_q = log_positive<kUnit<T, kSource> != 1>(mean, shift);
            const auto chosen = map<T>(
                [](auto mean, auto log_q) CMIM_INLINE_LAMBDA {
                  return mean < kSmallestNormal<T> ? splat(kGiven ? T(-__builtin_inf()) : kLeast<kSource>)
                                                   : log_q;
                },
                mean, log_q);
            store_several(l + k * Base::kStride + j, chosen, Base::kStride);
          }
        }
      }
      if (!kCareful || cluster.label < begin || cluster.label >= end) return;
      for (int k = 0; k < N; ++k) {
        log_label[k0 + k] = l[k * kStride + cluster.label];
        if constexpr (kPerRow) rho_label[k0 + k] = rho_to[k * kStride + cluster.label];
      }
    });
  }

  V given(int k, int64_t j) const {  // Q of temperature k at columns j ..
    const int64_t from = centroid_row(job, k, cluster.label) + j;
    V v{};
    for (int l = 0; l < W && j + l < C; ++l) v[l] = T(centroid_entry(job, from + l));
    return v;
  }

  template <Source kSource>
  void accumulate(Span rows, int64_t tile) {
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const int64_t Cp = this->Cp, K = this->K, begin = tile * cols, end = this->end_of(tile);
      T ak[N];
      for (int k = 0; k < N; ++k) ak[k] = a[k0 + k];
      const T *const l = table(L, k0, tile), *const mean_of = table(Q, k0, tile);
      const T* const rho_of = table(rho, k0, tile);
      const T* const firsts = this->template first_of<kSource>(k0);
      T* const parts = this->part_of(0, k0);
      const bool wanted = job.grad, adds = N < 8 && k0 % 8 != 0;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const int64_t at = i * K + k0;
        V h[N] = {}, kl[N] = {};  // sums of this tile, apart: fewer additions to a large sum
        V scale[N];
        T constant[N], probability[N];
        for (int k = 0; k < N; ++k) {
          scale[k] = splat<T>(c[at + k]);
          if constexpr (kCareful) constant[k] = T(off[at + k]), probability[k] = r[at + k];
        }
        const T* const x = X + i * Cp;
        const T* const from = this->template place_of<kSource>(i, k0);
        const T* const first = firsts + i * Cp;
        T* const g_to = parts + i * Cp;
        const T gain = up[i];
        for (int64_t j = begin; j < end; j += W) {
          const V v = load<V>(x + j);
          auto ex = Exponentials<kSource, T>{from, first, this->scales_from(k0)}.at(
              this->template column<kSource>(j), j);
          SumOfProducts<T, N> g;
          for (int k = 0; k < N; ++k) {
            const V e = ex.at(k);
            V t = ak[k] * v - load<V>(l + k * kStride + j);
            if constexpr (kCareful) {
              t -= constant[k];
              const V mean = load<V>(mean_of + k * kStride + j), prob = e * probability[k];
              const V positive = mean * psi(t, prob / mean);
              // P = 0 contributes Q; with a given Q = 0 under P > 0 the divergence is infinite. A mean of the
              // batch's own that vanishes does so beside a P that nearly has, and there is nothing to add.
              const T without_mean = kGiven ? T(__builtin_inf()) : T(0);
              kl[k] += prob == T(0) ? mean : mean == T(0) ? splat(without_mean) : positive;
            }
            if constexpr (kPerRow) t = gain * t - load<V>(rho_of + k * kStride + j);
            V pt = e * t;
            if constexpr (kGiven) pt = e == T(0) ? V{} : pt;
            h[k] += pt;
            g.add(k, scale[k], pt);
          }
          if (wanted) store(g_to + j, adds ? g.total() + load<V>(g_to + j) : g.total());
        }
        this->add_tile(tile, h, acc + at, h_sum + at);
        if constexpr (kCareful) this->add_tile(tile, kl, kl_acc + at, kl_sum + at);
      }
    });
  }

  // a X of a probability that vanishes, and L of a centroid's that does: a column where all rows agree on
  // that has a small t, and one where they do not a large one.
  template <Source kSource>
  static constexpr T kLeast = T(double(kVanishes<T>) * kUnit<T, kSource>);

  // kl_sum: those of P t psi_ratio(t) at the close temperatures, t with the constant of the row
  template <Source kSource>
  void accumulate_close(Span rows, int64_t tile) {
    constexpr double unit = kUnit<T, kSource>;
    const int64_t begin = tile * cols, end = this->end_of(tile);
    for (int k = 0; k < close(); ++k) {
      if (!counts(job, k)) continue;
      const T* const l = table(L, k, tile);
      const T ak = a[k];
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const T* const x = X + i * Cp;
        const T constant = T((off[i * K + k] + label.a[k] * label.lead[i]) * unit - double(this->shift[k]));
        V sum{}, most{};
        by_several<T>(end - begin, [&](auto several, int64_t from) CMIM_INLINE_LAMBDA {
          constexpr int U = decltype(several)::value;
          const int64_t j = begin + from;
          const auto log_p = at_least(load_several<U>(x + j) * ak, kLeast<kSource>);
          const auto t = (log_p - load_several<U>(l + j) - constant) * T(1 / unit);
          sum += sum_parts(this->template exponentials_at<kSource, U>(i, k, j) * t * psi_ratio<8>(t));
          for (int u = 0; u < U; ++u) most = vmax<T>(magnitude(part(t, u)), most);
        });
        kl_sum[i * K + k] += double(sum_lanes<T>(sum));
        const T far = max_lanes<T>(most);
        farthest[i] = far > farthest[i] ? far : farthest[i];
      }
    }
  }

  void finish_label() {
    if constexpr (kCareful)
      label.finish(off, log_label, rho_label);
    else
      label.template finish<kGiven>(off, [&](int k) {
        return centroid_entry(job, centroid_row(job, k, cluster.label) + cluster.label);
      });
  }

  // q, what P_k is multiplied by in the gradient, of every row; in float also KL, which takes the place of
  // off. False: float cannot resolve this cluster.
  template <Source kSource>
  bool divergences() {
    constexpr double unit = kUnit<T, kSource>;
    if constexpr (kCareful) {
      for (int64_t i = 0; i < n; ++i)
        by_doubles(K, [&](auto width, int k0) CMIM_INLINE_LAMBDA {
          constexpr int N = decltype(width)::value;
          const auto h = doubles<N>(h_sum + i * K + k0) * doubles<N>(r + i * K + k0);
          store_doubles<N>(q + i * K + k0, doubles<N>(c + i * K + k0) * h);
          if (job.grad) store_doubles<N>(label.mean + i * label.Kp + k0, h);
        });
      return true;
    }
    if constexpr (kGiven)
      for (int k = 0; k < K; ++k)
        if (!given_excess(k)) return false;
    by_doubles(K, [&](auto width, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(width)::value;
      const int64_t K = this->K;
      const auto ak = doubles<N>(label.a + k0), shift = doubles<N>(this->shift + k0) * (1 / unit);
      decltype(doubles<N>(off)) sum_kl{}, sum_rest{};
      const auto above = kGiven ? doubles<N>(excess + k0) : rounded_weights<N>(k0);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = i * K + k0, of_label = i * label.Kp + k0;
        const auto rest = doubles<N>(label.rest + of_label), p = doubles<N>(label.p + of_label);
        const auto constant = doubles<N>(off + at) + ak * label.lead[i] - shift;
        auto own = p * doubles<N>(label.t + of_label);
        own = p == 0.0 ? decltype(own){} : own;  // a given Q = 0 under P = 0
        // sum_j P log(P/Q): the other columns' t lacks the constant of the row
        const auto mean = doubles<N>(h_sum + at) * doubles<N>(r + at) / unit - rest * constant + own;
        store_doubles<N>(label.mean + of_label, mean);
        store_doubles<N>(q + at, doubles<N>(c + at) * (mean + constant) * unit);
        const auto value = mean + above;
        store_doubles<N>(off + at, value);
        sum_kl += value, sum_rest += rest;
      }
      store_doubles<N>(all_kl + k0, sum_kl), store_doubles<N>(all_rest + k0, sum_rest);
    });
    for (int k = 0; k < close(); ++k) close_divergences(k);
    for (int64_t i = 0; close() > 0 && i < n; ++i)
      if (farthest[i] > kFarthest) return false;
    for (int k = 0; k < K; ++k)
      if (counts(job, k) && all_kl[k] < kRedoBelow * double(n) &&
          !(all_kl[k] >= (k < close() ? kRedoBelowClose : kRedoBelowRest) * all_rest[k]))
        return false;
    return true;
  }
  // off, all_kl at a close temperature: the other columns' from kl_sum, the label's the same way in double
  void close_divergences(int k) {
    if (!counts(job, k)) return;
    double q = 0;
    for (int64_t i = 0; i < n; ++i) q += label.p[i * label.Kp + k] / double(n);
    all_kl[k] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t of_label = i * label.Kp + k;
      const auto ratio = splat<double>(label.p[of_label] / q);
      const double own = q == 0 ? 0 : q * psi(splat<double>(label.t[of_label]), ratio)[0];
      all_kl[k] += off[i * K + k] = kl_sum[i * K + k] * double(r[i * K + k]) + own;
    }
  }

  // sum_j Q - 1 of the batch's own centroids, as far as it is the same in every column: other roundings
  // average out.
  template <int N>
  CMIM_INLINE auto rounded_weights(int k0) const {
    auto sum = doubles<N>(this->rounded + k0);
    for (int64_t i = 1; i < n; ++i) sum += doubles<N>(this->rounded + i * K + k0);
    return sum;
  }

  // sum_j Q - 1: zero for a distribution. False: float has no such small numbers.
  bool given_excess(int k) {
    const int64_t from = centroid_row(job, k, cluster.label);
    double sum = 0;
    bool normal = true;
    for (int64_t j = 0; j < C; ++j) {
      const double q = centroid_entry(job, from + j);
      sum += q, normal &= q == 0 || q >= double(kSmallestNormal<T>);
    }
    excess[k] = sum - 1;
    return normal;
  }

  // Returns false, with no gradient written, when the cluster has to be done again in double.
  template <Source kSource>
  bool run(const Team& team) {
    this->template fill<kSource>();
    this->template prepare<kSource>(team);
    this->by_block(team, [&](Span rows) { clear_sums(rows); });
    this->template centre<kSource>();
    this->by_tile(
        team, [&](int64_t t) { centroid<kSource>(t); },
        [&](Span rows, int64_t t) {
          accumulate<kSource>(rows, t);
          if constexpr (!kCareful && !kGiven) accumulate_close<kSource>(rows, t);
        });
    finish_label();
    if (!divergences<kSource>()) return false;
    this->by_block(team, [&](Span rows) {
      this->report(rows, kCareful ? kl_sum : off);
      if (job.grad) this->template write<kSource>(rows);
    });
    return true;
  }
};

template <class T, bool kGiven, bool kPerRow>
bool run_wide(const Job& job, const Cluster& cluster, const Team& team, Workspace& ws) {
  Wide<T, kGiven, kPerRow> pass(job, cluster, team.run != nullptr, ws);
  return pass.with_source([&](auto source) { return pass.template run<decltype(source)::value>(team); });
}

}  // namespace
}  // namespace cmim::cpu
