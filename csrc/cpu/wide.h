// A cluster from its logits as they are, in float or double.
//
//   prepare(row)         X = z - max z, E = exp(base X), S_k = sum exp(a_k X), the cross entropy
//   centroid(tile)       L_k = log Q_k, shifted by the mean over the rows of log S_k, which keeps t small
//   accumulate(row)      t = a_k X - L_k = log(P/Q) up to a constant of the row;  H_k = sum_j P t;
//                        G = sum_k c_k P t
//   divergences()        KL_k from H_k
//   write_gradient(row)  G - sum_k c_k H_k P_k, and the cross entropy's gradient
//
// A constant of the row added to t changes H_k, but not t - H_k, so the gradient does not need it. Columns go
// by in tiles that stay in the first-level cache between centroid and accumulate.
//
// In float, t carries the rounding of numbers of the size of the logits: enough where the rows differ
// visibly. A cluster where they do not is done again in double, where KL is summed as Q psi(t), which never
// cancels.
#pragma once

#include "label.h"
#include "rows.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

// Below this mean KL of a cluster, at any temperature that counts, float is not enough. docs/numerics.md
// measures both sides of the seam.
constexpr double kRedoBelow = 3e-4;

template <class T>
constexpr T kSmallestNormal = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);

// kGiven: the centroids are given. kPerRow: the batch's own centroids, and every row has an upstream gradient
// of its own, so that the path through the centroid does not cancel: t becomes h = g_i t - R/Q
// (docs/math.md).
template <class T, bool kGiven, bool kPerRow>
struct Wide : Rows<T> {
  using Base = Rows<T>;
  using Base::a, Base::c, Base::C, Base::cluster, Base::Cp, Base::E, Base::G, Base::job, Base::K;
  using Base::cols, Base::n, Base::q, Base::r, Base::source, Base::tiles, Base::W, Base::X, Base::kStride;
  using V = Vec<T>;
  static constexpr bool kCareful = sizeof(T) == 8;

  int64_t slots;             // how many tiles L holds at a time
  V *h_acc, *kl_acc;         // (n, K) sums of P t and Q psi(t) in lanes
  double *h_sum, *kl_sum;    // (n, K)
  double* off;               // (n, K) log S less its mean over the rows; in float, then KL
  double *excess, *mean_kl;  // (K) sum_j Q - 1 of given centroids; sum of KL over the rows
  T *mix, *mix_up;           // (n, K) weight of the row's exponentials in Q, and in R
  T *log_mean, *up;          // (K), (n) upstream gradient
  T* tops;                   // (n) largest logit
  LabelColumn<kPerRow> label;
  T *log_label, *rho_label;  // (K) L and rho at the label
  T *L, *Q, *rho;            // (slots, K, kStride)

  Wide(const Job& j, const Cluster& cl, bool whole, Workspace& ws)
      : Base(j, cl), slots(whole ? tiles : 1), label(j, cl) {
    typename Base::Layout layout{0};
    place(layout);
    layout.at = reinterpret_cast<int64_t>(reserve(ws, layout.at));
    place(layout);
    this->fill();
    if (job.grad) label.fill();
  }
  void place(typename Base::Layout& layout) {
    Base::place(layout, source == Source::direct);
    layout.take(this->one, this->own_ce() ? n * this->Cp : 0);
    layout.take(h_acc, n * K), layout.take(kl_acc, kCareful ? n * K : 0);
    layout.take(h_sum, n * K), layout.take(kl_sum, kCareful ? n * K : 0);
    layout.take(off, n * K + Simd<double>::width);
    layout.take(excess, kGiven && !kCareful ? K : 0), layout.take(mean_kl, kCareful ? 0 : K);
    layout.take(mix, n * K), layout.take(mix_up, kPerRow ? n * K : 0);
    layout.take(log_mean, K), layout.take(up, n), layout.take(tops, n);
    if (job.grad) label.place(layout);
    layout.take(log_label, kCareful ? K : 0), layout.take(rho_label, kPerRow ? K : 0);
    layout.take(L, slots * K * kStride);
    layout.take(Q, kCareful ? slots * K * kStride : 0);
    layout.take(rho, kPerRow ? slots * K * kStride : 0);
  }

  template <Source kSource>
  void prepare(int64_t i) {
    const int64_t row = cluster.rows[i], Cp = this->Cp;
    const T* const z = row_values(job, row, X + i * Cp);
    const T top = largest(z, C), floor = kVanishes<T> / a[0], base = T(job.base);
    tops[i] = top;
    T *const x = X + i * Cp, *const e = E + i * Cp;
    each_vector(z, C, [=](int64_t j, V v) CMIM_INLINE_LAMBDA {
      v = at_least(v - top, floor);
      store(x + j, v);
      if constexpr (kSource == Source::chain) store(e + j, exp_nonpositive(base * v));
    });
    double* const sums = off + i * K;           // its place until centre()
    if constexpr (kSource == Source::stored) {  // here, so that one pass makes them and adds them up
      if (job.multiple)
        sum_exponentials<kSource>(i, sums, [=](const T* at, int k0) CMIM_INLINE_LAMBDA {
          return Powers<T>(at, base, a + k0, job.multiple + k0);
        });
      else
        sum_exponentials<kSource>(i, sums, [=](const T* at, int k0) CMIM_INLINE_LAMBDA {
          return Exponentials<Source::direct, T>(at, 0, a + k0, 0);
        });
    } else {
      sum_exponentials<kSource>(i, sums, [=](const T* at, int k0) CMIM_INLINE_LAMBDA {
        return Exponentials<kSource, T>(at, 0, a + k0, job.power0 + k0);
      });
    }
    double s_ce = job.has_ce && !this->own_ce() ? sums[job.ce_index] : 0;
    if (this->own_ce())  // 1 is not one of the inverse temperatures
      s_ce = store_exponentials(this->one + i * Cp, Cp,
                                [=](int64_t j) CMIM_INLINE_LAMBDA { return load<V>(x + j); });
    const double upstream = job.upstream ? job.upstream[row] : 1.0;
    this->set_row(i, sums, s_ce, kPerRow ? 1.0 : upstream);
    if (job.grad)
      label.template set_row<kCareful ? 12 : 7>(i, double(top), double(kVanishes<T>) / job.a[0], sums, s_ce);
    if (this->own_ce() || !job.has_ce)
      this->set_entropy(i, job.has_ce ? __builtin_log(s_ce) : 0, double(top));
    up[i] = T(upstream);
    for (int64_t at = i * K; at < (i + 1) * K; ++at) {
      mix[at] = r[at] / T(n);
      h_acc[at] = V{}, h_sum[at] = 0;
      if constexpr (kPerRow) mix_up[at] = mix[at] * up[i];
      if constexpr (kCareful) kl_acc[at] = V{}, kl_sum[at] = 0;
    }
  }

  // sums[k] = S_k. make(place in E or X, k0) gives the exponentials of a chunk; stored ones are kept in E.
  template <Source kSource, class F>
  CMIM_INLINE void sum_exponentials(int64_t i, double* sums, F&& make) {
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const int64_t Cp = this->Cp;
      const T* const from = (kSource == Source::chain ? E : X) + i * Cp;
      T* const keep = E + (i * K + k0) * Cp;
      for (int k = 0; k < N; ++k) sums[k0 + k] = 0;
      for (int64_t j0 = 0; j0 < Cp; j0 += kFlushVectors * W) {
        const int64_t end = j0 + kFlushVectors * W < Cp ? j0 + kFlushVectors * W : Cp;
        V s[N] = {};
        for (int64_t j = j0; j < end; j += W) {
          auto ex = make(from + j, k0);
          for (int k = 0; k < N; ++k) {
            const V e = ex.at(k);
            s[k] += e;
            if constexpr (kSource == Source::stored) store(keep + k * Cp + j, e);
          }
        }
        add_lanes<T, N>(s, sums + k0);
      }
    });
  }

  // off holds S; it becomes the deviation of log S from its mean over the cluster
  void centre() {
    for (int64_t at = 0; at < n * K; at += Simd<double>::width)
      store(off + at, log_positive(load<Vec<double>>(off + at)));
    if (job.has_ce && job.ce_index >= 0)
      for (int64_t i = 0; i < n; ++i) this->set_entropy(i, off[i * K + job.ce_index], double(tops[i]));
    for (int k = 0; k < K; ++k) {
      double mean = 0;
      for (int64_t i = 0; i < n; ++i) mean += off[i * K + k];
      log_mean[k] = T(mean / double(n));
      for (int64_t i = 0; i < n; ++i) off[i * K + k] -= double(log_mean[k]);
    }
  }

  template <Source kSource>
  void centroid(int64_t tile, int64_t slot) {
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const int64_t n = this->n, Cp = this->Cp, K = this->K;
      const T *const from = this->template place_of<kSource>(0, k0), *const ak = a + k0;
      const int64_t row_stride = kSource == Source::stored ? K * Cp : Cp;
      const int p = job.power0 + k0;
      const int64_t begin = tile * cols, end = begin + cols < Cp ? begin + cols : Cp;
      T* const l = L + (slot * K + k0) * kStride - begin;
      T* const mean_to = (kCareful ? Q : L) + (slot * K + k0) * kStride - begin;
      T* const rho_to = rho + (slot * K + k0) * kStride - begin;
      for (int64_t j = begin; j < end; j += W) {
        V mean[N] = {}, weighted[N] = {};
        if constexpr (kGiven) {
          for (int k = 0; k < N; ++k) mean[k] = given(k0 + k, j);
        } else {
          for (int64_t i0 = 0; i0 < n; i0 += kSumBlock) {
            V part[N] = {}, part_up[N] = {};
            for (int64_t i = i0; i < n && i < i0 + kSumBlock; ++i) {
              Exponentials<kSource, T> ex(from + i * row_stride + j, Cp, ak, p);
              for (int k = 0; k < N; ++k) {
                const V e = ex.at(k);
                part[k] += e * mix[i * K + k0 + k];
                if constexpr (kPerRow) part_up[k] += e * mix_up[i * K + k0 + k];
              }
            }
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
      // apart from the sums, so that many logarithms are under way at a time
      for (int k = 0; k < N; ++k) {
        const T shift = log_mean[k0 + k];
        for (int64_t j = begin; j < end; j += W) {
          const V mean = load<V>(mean_to + k * kStride + j), log_q = log_positive(mean) + shift;
          store(l + k * kStride + j,
                mean < kSmallestNormal<T> ? splat(kGiven ? T(-__builtin_inf()) : T(0)) : log_q);
        }
        if (kCareful && cluster.label >= begin && cluster.label < end) {
          log_label[k0 + k] = l[k * kStride + cluster.label];
          if constexpr (kPerRow) rho_label[k0 + k] = rho_to[k * kStride + cluster.label];
        }
      }
    });
  }

  V given(int k, int64_t j) const {  // Q of temperature k at columns j ..
    const int64_t from = (int64_t(job.order[k]) * C + cluster.label) * C + j;
    V v{};
    for (int l = 0; l < W && j + l < C; ++l) v[l] = T(entry(job, job.centroids, from + l));
    return v;
  }

  template <Source kSource>
  void accumulate(int64_t i, int64_t tile, int64_t slot) {
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const int64_t at = i * K + k0;
      V h[N] = {}, kl[N] = {};  // sums of this tile, apart: fewer additions to a large sum
      T scale[N], ak[N], shift[N], soft[N];
      for (int k = 0; k < N; ++k) {
        scale[k] = c[at + k], ak[k] = a[k0 + k];
        if constexpr (kCareful) shift[k] = T(off[at + k]), soft[k] = r[at + k];
      }
      const int64_t begin = tile * cols, end = begin + cols < Cp ? begin + cols : Cp;
      const T *const x = X + i * Cp, *const from = this->template place_of<kSource>(i, k0);
      const T* const l = L + (slot * K + k0) * kStride - begin;
      const T* const mean_of = Q + (slot * K + k0) * kStride - begin;
      const T* const rho_of = rho + (slot * K + k0) * kStride - begin;
      T* const g_to = G + i * Cp;
      const int p = job.power0 + k0;
      const T gain = up[i];
      for (int64_t j = begin; j < end; j += W) {
        const V v = load<V>(x + j);
        V g = k0 == 0 ? V{} : load<V>(g_to + j);
        Exponentials<kSource, T> ex(from + j, Cp, ak, p);
        for (int k = 0; k < N; ++k) {
          const V e = ex.at(k);
          V t = ak[k] * v - load<V>(l + k * kStride + j);
          if constexpr (kCareful) {
            t -= shift[k];
            const V mean = load<V>(mean_of + k * kStride + j), prob = e * soft[k];
            const V positive = mean * psi(t, prob / mean);
            // P = 0 contributes Q; with a given Q = 0 under P > 0 the divergence is infinite
            kl[k] += prob == T(0) ? mean : mean == T(0) ? splat(T(__builtin_inf())) : positive;
          }
          if constexpr (kPerRow) t = gain * t - load<V>(rho_of + k * kStride + j);
          V pt = e * t;
          if constexpr (kGiven) pt = e == T(0) ? V{} : pt;
          h[k] += pt;
          g += scale[k] * pt;
        }
        store(g_to + j, g);
      }
      for (int k = 0; k < N; ++k) {
        h_acc[at + k] += h[k];
        if constexpr (kCareful) kl_acc[at + k] += kl[k];
      }
    });
    if (tile % kFlushTiles == kFlushTiles - 1 || tile == tiles - 1) flush(i);
  }

  void flush(int64_t i) {
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      const int64_t at = i * K + k0;
      V lanes[N], kl_lanes[N];
      for (int k = 0; k < N; ++k) lanes[k] = h_acc[at + k], h_acc[at + k] = V{};
      add_lanes<T, N>(lanes, h_sum + at);
      if constexpr (kCareful) {
        for (int k = 0; k < N; ++k) kl_lanes[k] = kl_acc[at + k], kl_acc[at + k] = V{};
        add_lanes<T, N>(kl_lanes, kl_sum + at);
      }
    });
  }

  void finish_label() {
    if constexpr (kCareful)
      label.finish(off, log_label, rho_label);
    else
      label.template finish<kGiven>(off, log_mean, [&](int k) {
        return entry(job, job.centroids, (int64_t(job.order[k]) * C + cluster.label) * C + cluster.label);
      });
  }

  // q, what P_k is multiplied by in the gradient, of every row; in float also KL, which takes the place of
  // off. False: float cannot resolve this cluster.
  bool divergences() {
    if constexpr (kGiven && !kCareful)
      for (int k = 0; k < K; ++k) excess[k] = given_excess(k);
    for (int k = 0; k < K && !kCareful; ++k) mean_kl[k] = 0;
    for (int64_t i = 0; i < n; ++i)
      by_doubles(K, [&](auto width, int k0) CMIM_INLINE_LAMBDA {
        constexpr int N = decltype(width)::value;
        const int64_t at = i * K + k0;
        const auto h = doubles<N>(h_sum + at) * doubles<N>(r + at);
        store_doubles<N>(q + at, doubles<N>(c + at) * h);
        if (job.grad)
          store_doubles<N>(label.mean + i * label.Kp + k0, kCareful ? h : h - doubles<N>(off + at));
        if constexpr (!kCareful) {
          auto value = h - doubles<N>(off + at);
          if constexpr (kGiven) value += doubles<N>(excess + k0);
          store_doubles<N>(off + at, value);
          store_doubles<N>(mean_kl + k0, doubles<N>(mean_kl + k0) + value);
        }
      });
    for (int k = 0; k < K && !kCareful; ++k)
      if ((job.w[k] != 0 || job.kl) && mean_kl[k] < kRedoBelow * double(n)) return false;
    return true;
  }

  double given_excess(int k) const {  // sum_j Q - 1: zero for a distribution
    const int64_t from = (int64_t(job.order[k]) * C + cluster.label) * C;
    double sum = 0;
    for (int64_t j = 0; j < C; ++j) sum += entry(job, job.centroids, from + j);
    return sum - 1;
  }

  // Returns false, with no gradient written, when the cluster has to be done again in double.
  template <Source kSource>
  bool run(const Team& team) {
    each(team, n, [&](int64_t i) { prepare<kSource>(i); });
    centre();
    this->by_tile(
        team, [&](int64_t t, int64_t slot) { centroid<kSource>(t, slot); },
        [&](int64_t i, int64_t t, int64_t slot) { accumulate<kSource>(i, t, slot); });
    if (job.grad) finish_label();
    if (!divergences()) return false;
    each(team, n, [&](int64_t i) {
      this->report(i, (kCareful ? kl_sum : off) + i * K);
      if (job.grad) this->template write_gradient<kSource>(i, label.entry(i));
    });
    return true;
  }
};

}  // namespace
}  // namespace cmim::cpu
