// A cluster from its logits as they are, in float or double.
//
//   prepare(row)         X = z - max z, E = exp(base X), S_k = sum exp(a_k X), the cross entropy
//   centroid(tile)       L_k = log Q_k, shifted by the mean over the rows of log S_k, which keeps t small
//   accumulate(row)      t = a_k X - L_k = log(P/Q) up to a constant of the row;  H_k = sum_j P t;  G = sum_k
//   c_k P t summarise(row)       KL_k from H_k write_gradient(row)  G - sum_k c_k H_k P_k, and the cross
//   entropy's gradient
//
// A constant of the row added to t changes H_k, but not t - H_k, so the gradient does not need it. Columns go
// by in tiles that stay in the first-level cache between centroid and accumulate.
//
// In float, t carries the rounding of numbers of the size of the logits: enough where the rows differ
// visibly. A cluster where they do not is done again in double, where KL is summed as Q psi(t), which never
// cancels.
#pragma once

#include "rows.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

// Below this mean KL of a cluster, at any temperature that counts, float is not enough. docs/numerics.md
// measures both sides of the seam.
constexpr double kRedoBelow = 3e-4;

template <class T>
constexpr T kSmallestNormal = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);
// exp(x) is zero below this, with room to spare
template <class T>
constexpr T kVanishes = sizeof(T) == 4 ? T(-200) : T(-1500);

// kGiven: the centroids are given. kPerRow: the batch's own centroids, and every row has an upstream gradient
// of its own, so that the path through the centroid does not cancel: t becomes h = g_i t - R/Q
// (docs/math.md).
template <class T, bool kGiven, bool kPerRow>
struct Wide : Rows<T> {
  using Base = Rows<T>;
  using Base::a, Base::c, Base::C, Base::cluster, Base::Cp, Base::E, Base::G, Base::job, Base::K;
  using Base::cols, Base::n, Base::q, Base::r, Base::source, Base::tiles, Base::W, Base::X;
  using V = Vec<T>;
  static constexpr bool kCareful = sizeof(T) == 8;

  int64_t slots;           // how many tiles L holds at a time
  V *h_acc, *kl_acc;       // (n, K) sums of P t and Q psi(t) in lanes
  double *h_sum, *kl_sum;  // (n, K)
  double* off;             // (n, K) log S less its mean over the rows
  T *mix, *mix_up;         // (n, K) weight of the row's exponentials in Q, and in R
  T *log_mean, *up;        // (K), (n) upstream gradient
  T *L, *Q, *rho;          // (slots, K, cols)

  Wide(const Job& j, const Cluster& cl, bool whole, Workspace& ws) : Base(j, cl), slots(whole ? tiles : 1) {
    typename Base::Layout layout{0};
    place(layout);
    layout.at = reinterpret_cast<int64_t>(reserve(ws, layout.at));
    place(layout);
    this->fill();
  }
  void place(typename Base::Layout& layout) {
    Base::place(layout, source == Source::direct || this->own_ce());
    layout.take(h_acc, n * K), layout.take(kl_acc, kCareful ? n * K : 0);
    layout.take(h_sum, n * K), layout.take(kl_sum, kCareful ? n * K : 0);
    layout.take(off, n * K + Simd<double>::width);
    layout.take(mix, n * K), layout.take(mix_up, kPerRow ? n * K : 0);
    layout.take(log_mean, K), layout.take(up, n);
    layout.take(L, slots * K * cols);
    layout.take(Q, kCareful ? slots * K * cols : 0);
    layout.take(rho, kPerRow ? slots * K * cols : 0);
  }

  template <Source kSource>
  void prepare(int64_t i) {
    const int64_t row = cluster.rows[i], Cp = this->Cp;
    T* const x = X + i * Cp;
    const T floor = kVanishes<T> / a[0], base = T(job.base);
    T top{};
    double s_ce = 0;
    V s_one{};
    const bool own_ce = this->own_ce();
    with_row<T>(job, row, [&](auto read) CMIM_INLINE_LAMBDA {
      V best = splat<T>(-__builtin_inf());
      for (int64_t j = 0; j < C; j += W) best = vmax<T>(read(j), best);
      top = max_lanes<T>(best);
      T* const e = E + i * Cp;
      for (int64_t j = 0; j < C; j += W) {
        V v = read(j) - top;
        v = v < floor ? splat(floor) : v;
        store(x + j, v);
        if constexpr (kSource == Source::chain) store(e + j, exp_nonpositive(base * v));
        if (own_ce) s_one += exp_nonpositive(v);
        if (own_ce && (j / W) % kFlushVectors == 0) s_ce += double(sum_lanes<T>(s_one)), s_one = V{};
      }
    });
    double* const sums = off + i * K;  // its place until centre()
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      // the stored exponentials are made here, so that this one pass computes them
      constexpr Source kFrom = kSource == Source::stored ? Source::direct : kSource;
      const T *const from = this->template place_of<kFrom>(i, k0), *const ai = a + k0;
      T* const keep = this->template place_of<kSource>(i, k0);
      const int p = job.power0 + k0;
      V s[N] = {};
      double total[N] = {};
      for (int64_t j0 = 0; j0 < Cp; j0 += kFlushVectors * W) {
        const int64_t end = j0 + kFlushVectors * W < Cp ? j0 + kFlushVectors * W : Cp;
        for (int64_t j = j0; j < end; j += W) {
          V ex[N];
          exponentials<kFrom, N>(from + j, Cp, ai, p, ex);
          for (int k = 0; k < N; ++k) s[k] += ex[k];
          if constexpr (kSource == Source::stored)
            for (int k = 0; k < N; ++k) store(keep + k * Cp + j, ex[k]);
        }
        for (int k = 0; k < N; ++k) total[k] += double(sum_lanes<T>(s[k])), s[k] = V{};
      }
      for (int k = 0; k < N; ++k) sums[k0 + k] = total[k];
    });
    s_ce = own_ce ? s_ce + double(sum_lanes<T>(s_one)) : job.has_ce ? sums[job.ce_index] : 0;
    const double upstream = job.upstream ? job.upstream[row] : 1.0;
    this->set_row(i, sums, s_ce, double(top), kPerRow ? 1.0 : upstream);
    up[i] = T(upstream);
    for (int64_t at = i * K; at < (i + 1) * K; ++at) {
      mix[at] = r[at] / T(n);
      h_acc[at] = V{}, h_sum[at] = 0;
      if constexpr (kPerRow) mix_up[at] = mix[at] * up[i];
      if constexpr (kCareful) kl_acc[at] = V{}, kl_sum[at] = 0;
    }
  }

  // off holds S; it becomes the deviation of log S from its mean over the cluster
  void centre() {
    for (int64_t at = 0; at < n * K; at += Simd<double>::width)
      store(off + at, log_positive(load<Vec<double>>(off + at)));
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
      const T *const from = this->template place_of<kSource>(0, k0), *const ai = a + k0;
      const int64_t row_stride = kSource == Source::stored ? K * Cp : Cp;
      const int p = job.power0 + k0;
      const int64_t begin = tile * cols, end = begin + cols < Cp ? begin + cols : Cp;
      T* const l = L + (slot * K + k0) * cols - begin;
      T* const mean_to = Q + (slot * K + k0) * cols - begin;
      T* const rho_to = rho + (slot * K + k0) * cols - begin;
      for (int64_t j = begin; j < end; j += W) {
        V mean[N] = {}, weighted[N] = {};
        if constexpr (kGiven) {
          for (int k = 0; k < N; ++k) mean[k] = given(k0 + k, j);
        } else {
          for (int64_t i0 = 0; i0 < n; i0 += kSumBlock) {
            V part[N] = {}, part_up[N] = {};
            for (int64_t i = i0; i < n && i < i0 + kSumBlock; ++i) {
              V ex[N];
              exponentials<kSource, N>(from + i * row_stride + j, Cp, ai, p, ex);
              for (int k = 0; k < N; ++k) {
                part[k] += ex[k] * mix[i * K + k0 + k];
                if constexpr (kPerRow) part_up[k] += ex[k] * mix_up[i * K + k0 + k];
              }
            }
            for (int k = 0; k < N; ++k) {
              mean[k] += part[k];
              if constexpr (kPerRow) weighted[k] += part_up[k];
            }
          }
        }
        for (int k = 0; k < N; ++k) {
          const auto vanished =
              mean[k] < kSmallestNormal<T>;  // then so have all its P, which multiply L below
          const V log_q = log_positive(mean[k]) + log_mean[k0 + k];
          store(l + k * cols + j, vanished ? splat(kGiven ? T(-__builtin_inf()) : T(0)) : log_q);
          if constexpr (kCareful) store(mean_to + k * cols + j, mean[k]);
          if constexpr (kPerRow) store(rho_to + k * cols + j, vanished ? V{} : weighted[k] / mean[k]);
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
      const T* const l = L + (slot * K + k0) * cols - begin;
      const T* const mean_of = Q + (slot * K + k0) * cols - begin;
      const T* const rho_of = rho + (slot * K + k0) * cols - begin;
      T* const g_to = G + i * Cp;
      const int p = job.power0 + k0;
      const T gain = up[i];
      for (int64_t j = begin; j < end; j += W) {
        const V v = load<V>(x + j);
        V g = k0 == 0 ? V{} : load<V>(g_to + j);
        V ex[N];
        exponentials<kSource, N>(from + j, Cp, ak, p, ex);
        for (int k = 0; k < N; ++k) {
          V t = ak[k] * v - load<V>(l + k * cols + j);
          if constexpr (kCareful) {
            t -= shift[k];
            const V mean = load<V>(mean_of + k * cols + j), prob = ex[k] * soft[k];
            const V positive = mean * psi(t, prob / mean);
            // P = 0 contributes Q; with a given Q = 0 under P > 0 the divergence is infinite
            kl[k] += prob == T(0) ? mean : mean == T(0) ? splat(T(__builtin_inf())) : positive;
          }
          if constexpr (kPerRow) t = gain * t - load<V>(rho_of + k * cols + j);
          V pt = ex[k] * t;
          if constexpr (kGiven) pt = ex[k] == T(0) ? V{} : pt;
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
    for (int64_t at = i * K; at < (i + 1) * K; ++at) {
      h_sum[at] += double(sum_lanes<T>(h_acc[at]));
      h_acc[at] = V{};
      if constexpr (kCareful) kl_sum[at] += double(sum_lanes<T>(kl_acc[at])), kl_acc[at] = V{};
    }
  }

  double divergence(int64_t i, int k) const {
    const int64_t at = i * K + k;
    if constexpr (kCareful) return kl_sum[at];
    const double kl = h_sum[at] * double(r[at]) - off[at];
    if constexpr (kGiven) return kl + given_excess(k);
    return kl;
  }

  double given_excess(int k) const {  // sum_j Q - 1: zero for a distribution
    const int64_t from = (int64_t(job.order[k]) * C + cluster.label) * C;
    double sum = 0;
    for (int64_t j = 0; j < C; ++j) sum += entry(job, job.centroids, from + j);
    return sum - 1;
  }

  // Whether float cannot resolve this cluster.
  bool collapsed() const {
    for (int k = 0; k < K; ++k) {
      if (job.w[k] == 0 && !job.kl) continue;
      double mean = 0;
      for (int64_t i = 0; i < n; ++i) mean += divergence(i, k);
      if (mean < kRedoBelow * double(n)) return true;
    }
    return false;
  }

  void summarise(int64_t i) {
    double total = 0;
    for (int k = 0; k < K; ++k) {
      q[i * K + k] = c[i * K + k] * T(h_sum[i * K + k] * double(r[i * K + k]));
      this->report(i, k, divergence(i, k), total);
    }
    if (job.row_cmi) job.row_cmi[cluster.rows[i]] = total;
  }

  // Returns false, with no gradient written, when the cluster has to be done again in double.
  template <Source kSource>
  bool run(const Team& team) {
    each(team, n, [&](int64_t i) { prepare<kSource>(i); });
    centre();
    this->by_tile(
        team, [&](int64_t t, int64_t slot) { centroid<kSource>(t, slot); },
        [&](int64_t i, int64_t t, int64_t slot) { accumulate<kSource>(i, t, slot); });
    if (!kCareful && collapsed()) return false;
    each(team, n, [&](int64_t i) {
      summarise(i);
      if (job.grad) this->template write_gradient<kSource>(i);
    });
    return true;
  }
};

}  // namespace
}  // namespace cmim::cpu
