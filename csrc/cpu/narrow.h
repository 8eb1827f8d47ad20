// A cluster whose rows nearly coincide, in float: centred on the mean logits zbar, so that no two rounded
// probabilities are ever subtracted.
//
//   d = z - zbar - shift                 the row's shift makes the mean of d over softmax(a_K zbar) vanish
//   Pbar_k = softmax(a_k zbar)           v_k = expm1(a_k d)              s_k = sum_j Pbar_k v_k
//   P = Pbar (1 + v) / (1 + s)           vbar = mean of (v - s)/(1 + s)  Q = Pbar (1 + vbar)
//   t = log(P/Q) = a_k d - log1p(s) - log1p(vbar)                        KL = sum_j P t psi_ratio(t)
//
// The shift matters for confident rows: with it the dominating class has d near 0, and its v - s does not
// cancel. The terms of KL are never negative. v_{k+1} = v_k + v_1 + v_k v_1 keeps the relative accuracy of
// expm1. In the arrays of Rows, X holds d, and E holds v_1 until accumulate turns it into exp(base (z - shift
// - max zbar)); where the temperatures are no chain, it holds every v_k if there is room.
#pragma once

#include "centre.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

// Bounds of a_K |d|. |log P - log Pbar| is at most twice that and |t| four times, within the domains of
// psi_ratio<2> and <4> for the first two; for the third the domain of psi_ratio<8> is checked.
constexpr float kCollapsed = 0.005f, kNarrowest = 0.07f, kNarrow = 1.0f;

template <Source kSource>
struct Narrow : Centre<kSource> {
  using Base = Centre<kSource>;
  using Base::a, Base::C, Base::center, Base::cluster, Base::cols, Base::Cp, Base::c, Base::E, Base::ebar;
  using Base::from;
  using Base::inv_sbar, Base::job, Base::K, Base::kChain, Base::kStride, Base::n, Base::one, Base::one_sum;
  using Base::q, Base::r, Base::r_ce, Base::sbar, Base::shift, Base::slots, Base::spread, Base::table,
      Base::tiles, Base::top, Base::X;
  using typename Base::V;
  static constexpr int W = Base::W;

  float* G;          // (n, Cp) the gradient as far as it has come
  float* m;          // (K) mean of s / (1 + s)
  float *mix, *off;  // (n, K) 1 / (n (1 + s)); log1p(s), before that s
  float* widest;     // (tiles) bounds of log1p(vbar)
  V* acc;            // (n, K) sums in lanes: for s, then for KL
  double* sum;       // (n, K)
  float *pbar, *L;   // (slots, K, kStride) Pbar; log1p(vbar)

  Narrow(const Job& j, const Cluster& cl, bool whole, Workspace& ws) : Base(j, cl, whole) {
    lay_out(ws.pass, [&](Layout& layout) { place(layout); });
    for (int k = 0; k < K; ++k) a[k] = float(job.a[k]);
  }
  void place(Layout& layout) {
    Base::place(layout);
    layout.take(G, n * Cp);
    layout.take(m, K), layout.take(mix, n * K), layout.take(off, n * K + W);
    layout.take(widest, tiles), layout.take(acc, n * K), layout.take(sum, n * K);
    layout.take(pbar, slots * K * kStride), layout.take(L, slots * K * kStride);
  }
  void clear_sums(Span rows) {
    for (int64_t at = rows.begin * K; at < rows.end * K; ++at) sum[at] = 0;
  }

  void mean_tile(int64_t tile) {
    const int64_t begin = tile * cols, end = this->end_of(tile);
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      float* const to = table(pbar, k0, tile);
      for (int64_t j = begin; j < end; j += W) {
        this->template each_mean<N>(
            k0, j, [&](int k, V e) CMIM_INLINE_LAMBDA { store(to + k * kStride + j, e * inv_sbar[k0 + k]); });
      }
    });
  }

  template <int kOrder>
  void row_sums(Span rows, int64_t tile) {
    const int64_t begin = tile * cols, end = this->end_of(tile);
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const float* const from = table(pbar, k0, tile);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        V s[N] = {};
        for (int64_t j = begin; j < end; j += W) {
          V v[N];
          this->template expm1_of<N, kOrder, true>(i, k0, j, v);
          for (int k = 0; k < N; ++k) s[k] += load<V>(from + k * kStride + j) * v[k];
        }
        this->add_tile(tile, s, acc + i * K + k0, sum + i * K + k0);
      }
    });
  }

  // Everything of a row that follows from its sums s. False: outside log1p_small's range.
  bool finish_sums() {
    for (int64_t i = 0; i < n; ++i) {
      double* const s = sum + i * K;
      for (int k = 0; k < K; ++k) {
        if (!(s[k] >= -0.42 && s[k] <= 0.7)) return false;
        off[i * K + k] = float(s[k]);
        mix[i * K + k] = float(1 / (double(n) * (1 + s[k])));
      }
    }
    for (int k = 0; k < K; ++k) {
      double total = 0;
      for (int64_t i = 0; i < n; ++i) total += sum[i * K + k] / (1 + sum[i * K + k]);
      m[k] = float(total / double(n));
    }
    for (int64_t i = 0; i < n; ++i) {
      double* const s = sum + i * K;
      const double s_ce = job.has_ce ? one_sum * (1 + s[job.ce_index]) : 0;
      for (int k = 0; k < K; ++k) s[k] = 1 / ((kChain ? sbar[k] : 1.0) * (1 + s[k]));
      by_doubles(K, [&](auto width, int k0) CMIM_INLINE_LAMBDA {
        constexpr int N = decltype(width)::value;
        this->template set_scales<N>(i, k0, doubles<N>(s + k0), 1.0);
      });
      r_ce[i] = job.has_ce ? float(1 / s_ce) : 0;
      this->set_entropy(i, job.has_ce ? __builtin_log(s_ce) : 0, double(top) + double(shift[i]));
      for (int k = 0; k < K; ++k) s[k] = 0;
    }
    for (int64_t at = 0; at < n * K; at += W) store(off + at, log1p_small(load<V>(off + at)));
    return true;
  }

  template <int kOrder>
  void centroid(int64_t tile) {
    const int64_t begin = tile * cols, end = this->end_of(tile);
    V lo{}, hi{};
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const int64_t n = this->n, K = this->K;
      float* const to = table(L, k0, tile);
      for (int64_t j = begin; j < end; j += W) {
        V mean[N];
        for (int k = 0; k < N; ++k) mean[k] = splat(-m[k0 + k]);
        for (int64_t i0 = 0; i0 < n; i0 += kSumBlock) {
          V part[N] = {};
          for (int64_t i = i0; i < n && i < i0 + kSumBlock; ++i) {
            V v[N];
            this->template expm1_of<N, kOrder>(i, k0, j, v);
            for (int k = 0; k < N; ++k) part[k] += v[k] * mix[i * K + k0 + k];
          }
          for (int k = 0; k < N; ++k) mean[k] += part[k];
        }
        for (int k = 0; k < N; ++k) lo = mean[k] < lo ? mean[k] : lo, hi = mean[k] > hi ? mean[k] : hi;
        constexpr int U = kAtOnce<N>;
        for (int k = 0; k < N; k += U) {
          const auto l = log1p_small(take_parts<float, U>(mean + k));
          store_several(to + k * Base::kStride + j, l, Base::kStride);
        }
      }
    });
    const float low = -max_lanes<float>(-lo), high = max_lanes<float>(hi);
    // |log1p(x)| <= |x| / (1 + min(x, 0))
    widest[tile] = low >= -0.42f && high <= 0.7f ? (high > -low ? high : -low) / (1 + low) : __builtin_inff();
  }

  template <int kOrder>
  void accumulate(Span rows, int64_t tile) {
    const int64_t begin = tile * cols, end = this->end_of(tile);
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const float *const l = table(L, k0, tile), *const mean_of = table(pbar, k0, tile);
      const int p = job.power0 + k0;
      float ak[N];
      for (int k = 0; k < N; ++k) ak[k] = a[k0 + k];
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const float* const x = X + i * Cp;
        float *const e = E + i * Cp, *const g_to = G + i * Cp;
        V kl[N] = {};
        float scale[N], shift[N];
        for (int k = 0; k < N; ++k) {
          scale[k] = c[i * K + k0 + k], shift[k] = off[i * K + k0 + k];
        }
        for (int64_t j = begin; j < end; j += W) {
          const V d = load<V>(x + j);
          V g = k0 == 0 ? V{} : load<V>(g_to + j);
          if (kChain && k0 == 0) {
            const V mean = load<V>(ebar + j);
            store(e + j, load<V>(e + j) * mean + mean);
          }
          V powers[N];
          if constexpr (kChain) {
            const V one = load<V>(e + j);
            PowerChain<float> ex(one, power<float>(one, p));
            for (int k = 0; k < N; ++k) powers[k] = ex.at(k);
          } else {
            this->template expm1_of<N, kOrder>(i, k0, j, powers);
            for (int k = 0; k < N; ++k) {
              const V mean = load<V>(mean_of + k * kStride + j);
              powers[k] = powers[k] * mean + mean;
            }
          }
          constexpr int U = kAtOnce<N>;
          for (int k = 0; k < N; k += U) {
            const auto t = (d * splat_each<U>(ak + k) - splat_each<U>(shift + k)) -
                           load_several<U>(l + k * Base::kStride + j, Base::kStride);
            const auto ratio = psi_ratio<kOrder>(t);
            for (int u = 0; u < U; ++u) {
              const V pt = powers[k + u] * part(t, u);
              g += scale[k + u] * pt;
              kl[k + u] += pt * part(ratio, u);
            }
          }
          store(g_to + j, g);
        }
        this->add_tile(tile, kl, acc + i * K + k0, sum + i * K + k0);
      }
    });
  }

  // The rows' KL, in the place of their sums, and q, what P_k is multiplied by in the gradient
  void finish_rows(Span rows) {
    for (int64_t i = rows.begin; i < rows.end; ++i)
      by_doubles(K, [&](auto width, int k0) CMIM_INLINE_LAMBDA {
        constexpr int N = decltype(width)::value;
        const int64_t at = i * K + k0;
        const auto value = doubles<N>(sum + at) * doubles<N>(r + at);
        store_doubles<N>(q + at, doubles<N>(c + at) * value);
        store_doubles<N>(sum + at, value);
      });
    this->report(rows, sum);
  }

  // The gradient at the label, before anything is taken off G
  double label_entry(int64_t i) const {
    const int64_t label = cluster.label;
    double value = double(G[i * Cp + label]);
    if constexpr (kChain) {
      const float first = E[i * Cp + label];
      float ex = 1;
      for (int k = 0; k < K; ++k) {
        for (int step = k == 0 ? job.power0 : 1; step > 0; --step) ex *= first;
        value -= double(q[i * K + k]) * double(ex);
      }
    } else {
      const double to_mean = double(X[i * Cp + label]), below = double(center[label] - top);
      for (int k = 0; k < K; ++k)
        value -= double(q[i * K + k]) / sbar[k] * __builtin_exp(double(a[k]) * (below + to_mean));
    }
    if (!job.has_ce) return value;
    const RowEntropy e = row_entropy(job, cluster.rows[i], label);
    const int64_t j = label / W * W;
    const double ce = double(unscaled_softmax(i, j)[label - j]);
    return value + (e.probability * double(r_ce[i]) * ce - e.one_hot - e.smooth * class_weight(job, label));
  }

  // softmax at temperature 1 up to r_ce, at columns j .., from d, since a power of E carries its rounding
  // several times over
  CMIM_INLINE V unscaled_softmax(int64_t i, int64_t j) const {
    const V mean = load<V>(one + j);
    return expm1_small(load<V>(X + i * Cp + j)) * mean + mean;
  }

  // G less sum_k q_k P_k / r_k, one tile: direct
  template <int kOrder>
  void subtract_mean(Span rows, int64_t tile) {
    const int64_t begin = tile * cols, end = this->end_of(tile);
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const float* const mean_of = table(pbar, k0, tile);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        float* const g = G + i * Cp;
        for (int64_t j = begin; j < end; j += W) {
          V v[N], value = load<V>(g + j);
          this->template expm1_of<N, kOrder>(i, k0, j, v);
          for (int k = 0; k < N; ++k) {
            const V mean = load<V>(mean_of + k * kStride + j);
            value -= q[i * K + k0 + k] * (v[k] * mean + mean);
          }
          store(g + j, value);
        }
      }
    });
  }
  // G less sum_k q_k E^(p + k), and the cross entropy's gradient: chain
  void subtract_powers(int64_t i) {
    const RowEntropy e = row_entropy(job, cluster.rows[i], cluster.label);
    float* const g = G + i * Cp;
    const float soft = job.has_ce ? float(e.probability) * r_ce[i] : 0.0f;
    subtract_smooth(job, e, g);
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      V qi[N];
      for (int k = 0; k < N; ++k) qi[k] = splat(q[i * K + k0 + k]);
      const float* const from = E + i * Cp;
      const int p = job.power0 + k0;
      const bool add_ce = job.has_ce && k0 + N == K;
      for (int64_t j = 0; j < Cp; j += W) {
        const V e1 = load<V>(from + j);
        const auto factor = [&](int k) CMIM_INLINE_LAMBDA { return qi[k]; };
        V v = load<V>(g + j) - polynomial<float, N>(e1, e1 * e1, factor) * power<float>(e1, p);
        if (add_ce) v += soft * unscaled_softmax(i, j);
        store(g + j, v);
      }
    });
  }
  void write(int64_t i, double at_label) const {
    const float* const g = G + i * Cp;
    if (job.carry) {
      for (int64_t j = 0; j < Cp; j += W) store(job.carry + i * Cp + j, load<V>(g + j));
      job.carry_label[i] = at_label;
      return;
    }
    write_row<float>(job, cluster.rows[i], [=](int64_t j) { return load<V>(g + j); });
    write_entry<float>(job, cluster.rows[i], cluster.label, at_label);
  }

  // What follows the spread. False: outside the domains of the polynomials.
  template <int kOrder>
  bool finish(const Team& team, float most) {
    this->by_tile(
        team, [&](int64_t t) { mean_tile(t); }, [&](Span rows, int64_t t) { row_sums<kOrder>(rows, t); });
    if (!finish_sums()) return false;
    const auto prepare = [&](int64_t t) {
      if (!kChain && slots == 1) mean_tile(t);
    };
    this->by_tile(
        team, [&](int64_t t) { prepare(t), centroid<kOrder>(t); },
        [&](Span rows, int64_t t) { accumulate<kOrder>(rows, t); });
    if (kOrder == 8) {
      for (int64_t at = 0; at < n * K; ++at) {
        const float bound = off[at] < 0 ? -off[at] : off[at];
        if (bound > 0.2f) return false;
      }
      for (int64_t t = 0; t < tiles; ++t)
        if (!(widest[t] + most + 0.2f <= 1.5f)) return false;
    }
    this->by_block(team, [&](Span rows) { finish_rows(rows); });
    if (!job.grad) return true;
    double* const at_label = sum;  // (n): KL has been reported
    for (int64_t i = 0; i < n; ++i) at_label[i] = label_entry(i);
    if constexpr (!kChain)
      this->by_tile(team, prepare, [&](Span rows, int64_t t) { subtract_mean<kOrder>(rows, t); });
    each(team, n, [&](int64_t i) {
      if constexpr (kChain) subtract_powers(i);
      write(i, at_label[i]);
    });
    return true;
  }

  // Returns 0, or how far |d| reaches where that is too far, with nothing written but what another pass will
  // write again.
  float run(const Team& team) {
    each(team, n, [&](int64_t i) { from[i] = row_values(job, cluster.rows[i], X + i * Cp); });
    each(team, tiles, [&](int64_t t) { this->mean_logits(t); });
    this->mean_softmax();
    each(team, n, [&](int64_t i) { this->centre(i), clear_sums({i, i + 1}); });
    float reach = 0;
    for (int64_t i = 0; i < n; ++i) reach = spread[i] > reach ? spread[i] : reach;
    const float most = a[K - 1] * reach;
    const bool done = most <= kCollapsed   ? finish<2>(team, most)
                      : most <= kNarrowest ? finish<4>(team, most)
                      : most <= kNarrow    ? finish<8>(team, most)
                                           : false;
    return done ? 0 : reach > 0 ? reach : __builtin_inff();
  }
};

}  // namespace
}  // namespace cmim::cpu
