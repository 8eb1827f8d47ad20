// The loss of one cluster: the rows of one class against their centroid, at every temperature.
//
//   prepare(row)         X = z - max z, E = exp(base X), S_k = sum exp(a_k X), the cross entropy
//   centroid(tile)       L_k = log Q_k, shifted by the mean over the rows of log S_k, which keeps t small
//   accumulate(row)      t = a_k X - L_k = log(P/Q) up to a constant of the row;  H_k = sum_j P t;  G = sum_k
//   c_k P t summarise(row)       KL_k from H_k write_gradient(row)  G - sum_k c_k H_k P_k, and the cross
//   entropy's gradient
//
// A constant of the row added to t changes H_k, but not t - H_k, so the gradient does not need it. Columns go
// by in tiles that stay in the first-level cache between centroid and accumulate. With consecutive powers of
// one exponential (kChain), E^p is had by multiplication; otherwise each temperature takes an exponential of
// its own.
//
// In float, t carries the rounding of numbers of the size of the logits: enough for a wide cluster. A cluster
// that has nearly collapsed is done again in double, where KL is summed as Q psi(t), which never cancels.
#pragma once

#include <type_traits>

#include "elementary.h"
#include "problem.h"
#include "row.h"
#include "simd.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

constexpr int kTileVectors = 16;
constexpr int kSumBlock =
    32;  // rows summed before their sum joins the centroid's, so that rounding does not build up
constexpr int kFlushTiles = 64;  // sums in lanes of T go over to double this often, whatever C

// Below this mean KL of a cluster, at any temperature that counts, float is not enough. docs/numerics.md
// measures both sides of the seam.
constexpr double kRedoBelow = 3e-4;

template <class T>
constexpr T kSmallestNormal = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022);
// exp(x) is zero below this, with room to spare
template <class T>
constexpr T kVanishes = sizeof(T) == 4 ? T(-200) : T(-1500);

template <int N>
struct Constant {
  static constexpr int value = N;
};

template <class T>
inline Vec<T> power(Vec<T> x, int p) {  // p >= 1
  while ((p & 1) == 0) x *= x, p >>= 1;
  Vec<T> y = x;
  while (p >>= 1) {
    x *= x;
    if (p & 1) y *= x;
  }
  return y;
}

// kGiven: the centroids are given. kPerRow: the batch's own centroids, and every row has an upstream gradient
// of its own, so that the path through the centroid does not cancel: t becomes h = g_i t - R/Q
// (docs/math.md).
template <class T, bool kGiven, bool kPerRow>
struct ClusterPass {
  using V = Vec<T>;
  static constexpr int W = Simd<T>::width, kTile = W * kTileVectors;
  static constexpr bool kCareful = sizeof(T) == 8;

  const Job& job;
  const Cluster& cluster;
  int64_t n, C, Cp;  // rows, classes, classes in whole vectors
  int K;
  int64_t tiles, slots;    // column tiles, and how many of them L holds at a time
  T *X, *E, *G;            // (n, Cp)
  V *h_acc, *kl_acc;       // (n, K) sums of P t and Q psi(t) in lanes
  double *h_sum, *kl_sum;  // (n, K)
  double* off;             // (n, K) log S less its mean over the rows
  T *r, *c, *q;            // (n, K) 1/S; coeff/S; c H
  T *mix, *mix_up;         // (n, K) weight of the row's exponentials in Q, and in R
  T *a, *log_mean;         // (K)
  T *up, *r_ce;            // (n) upstream gradient; 1/S at temperature 1
  T *L, *Q, *rho;          // (slots, K, kTile)

  ClusterPass(const Job& j, const Cluster& cl, bool whole, Workspace& ws)
      : job(j), cluster(cl), n(cl.count), C(j.classes), Cp(round_up(C, W)), K(j.temperatures) {
    tiles = (Cp + kTile - 1) / kTile;
    slots = whole ? tiles : 1;
    const int64_t own = reinterpret_cast<int64_t>(reserve(ws, place(0)));
    place(own);
    for (int k = 0; k < K; ++k) a[k] = T(job.a[k]);
  }

  // Lays the arrays out from address `at`; returns the bytes they take.
  int64_t place(int64_t at) {
    const int64_t start = at;
    auto take = [&](auto& p, int64_t count) {
      p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(at);
      at += round_up(count * int64_t(sizeof(*p)), 64);
    };
    take(X, n * Cp);
    take(E, chain() ? n * Cp : 0);
    // G can take X's place where nothing reads X after it: one chunk of temperatures, exponentials from E
    // alone
    const bool one_chunk = K == 1 || K == 4 || K == 8;
    if (one_chunk && chain() && (job.ce_index >= 0 || !job.has_ce))
      G = X;
    else
      take(G, n * Cp);
    take(h_acc, n * K);
    take(kl_acc, kCareful ? n * K : 0);
    take(h_sum, n * K);
    take(kl_sum, kCareful ? n * K : 0);
    take(r, n * K + W), take(c, n * K + W), take(q, n * K + W);
    take(off, n * K + Simd<double>::width);
    take(mix, n * K + W), take(mix_up, n * K + W);
    take(a, K), take(log_mean, K), take(up, n), take(r_ce, n);
    take(L, slots * K * kTile);
    take(Q, kCareful ? slots * K * kTile : 0);
    take(rho, kPerRow ? slots * K * kTile : 0);
    return at - start;
  }

  bool chain() const { return job.power0 > 0; }

  template <class F>
  void by_chunk(F&& f) const {  // f(size of the chunk as a constant, its first temperature)
    int k = 0;
    for (; k + 8 <= K; k += 8) f(Constant<8>{}, k);
    for (; k + 4 <= K; k += 4) f(Constant<4>{}, k);
    for (; k < K; ++k) f(Constant<1>{}, k);
  }
  template <class F>
  void by_vector(int64_t tile, F&& f) const {  // f(column, column within the tile)
    const int64_t begin = tile * kTile, end = begin + kTile < Cp ? begin + kTile : Cp;
    for (int64_t j = begin; j < end; j += W) f(j, j - begin);
  }

  // exp(a_k X) at one vector, k = k0, k0 + 1, ...
  template <bool kChain>
  struct Exponentials {
    V first, current;
    const T* a;
    Exponentials(const ClusterPass& p, int64_t at, int k0) : a(p.a + k0) {
      first = load<V>((kChain ? p.E : p.X) + at);
      if constexpr (kChain) current = power<T>(first, p.job.power0 + k0);
    }
    V operator()(int k) {  // k = 0, 1, ... in turn
      if constexpr (!kChain) return exp_nonpositive(a[k] * first);
      if (k > 0) current *= first;
      return current;
    }
  };

  template <bool kChain>
  void prepare(int64_t i) {
    const int64_t row = cluster.rows[i];
    T* x = X + i * Cp;
    const T top = load_row(job, row, x);
    const T floor = kVanishes<T> / a[0];
    double s_ce = 0;
    V s_one{};
    const bool own_ce = job.has_ce && job.ce_index < 0;
    for (int64_t j = 0; j < Cp; j += W) {
      V v = load<V>(x + j) - top;
      v = v < floor ? splat(floor) : v;
      store(x + j, v);
      if constexpr (kChain) store(E + i * Cp + j, exp_nonpositive(T(job.base) * v));
      if (own_ce) s_one += exp_nonpositive(v);
      if (own_ce && (j / W) % 1024 == 1023) s_ce += double(sum_lanes<T>(s_one)), s_one = V{};
    }
    double* sums = h_sum + i * K;  // its place until the accumulation starts
    by_chunk([&](auto chunk, int k0) {
      constexpr int N = decltype(chunk)::value;
      V s[N] = {};
      double total[N] = {};
      for (int64_t j = 0; j < Cp; j += W) {
        Exponentials<kChain> e(*this, i * Cp + j, k0);
        for (int k = 0; k < N; ++k) s[k] += e(k);
        if ((j / W) % 1024 == 1023)
          for (int k = 0; k < N; ++k) total[k] += double(sum_lanes<T>(s[k])), s[k] = V{};
      }
      for (int k = 0; k < N; ++k) sums[k0 + k] = total[k] + double(sum_lanes<T>(s[k]));
    });
    up[i] = job.upstream ? T(job.upstream[row]) : T(1);
    for (int k = 0; k < K; ++k) {
      const int64_t at = i * K + k;
      r[at] = T(1 / sums[k]);
      off[at] = sums[k];
      mix[at] = r[at] / T(n);
      mix_up[at] = mix[at] * up[i];
      c[at] = T(job.coeff[k] / sums[k]) * (kPerRow ? T(1) : up[i]);
      h_acc[at] = V{};
      if constexpr (kCareful) kl_acc[at] = V{}, kl_sum[at] = 0;
    }
    if (job.has_ce) {
      s_ce = own_ce ? s_ce + double(sum_lanes<T>(s_one)) : sums[job.ce_index];
      r_ce[i] = T(1 / s_ce);
      if (job.row_ce)
        job.row_ce[row] = row_entropy_value(job, row, cluster.label, __builtin_log(s_ce) + double(top));
    } else if (job.row_ce) {
      job.row_ce[row] = 0;
    }
    for (int k = 0; k < K; ++k) sums[k] = 0;
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

  template <bool kChain>
  void centroid(int64_t tile, int64_t slot) {
    by_chunk([&](auto chunk, int k0) {
      constexpr int N = decltype(chunk)::value;
      by_vector(tile, [&](int64_t j, int64_t at) {
        V mean[N] = {}, weighted[N] = {};
        if constexpr (kGiven) {
          for (int k = 0; k < N; ++k) mean[k] = given(k0 + k, j);
        } else {
          for (int64_t i0 = 0; i0 < n; i0 += kSumBlock) {
            V part[N] = {}, part_up[N] = {};
            for (int64_t i = i0; i < n && i < i0 + kSumBlock; ++i) {
              Exponentials<kChain> e(*this, i * Cp + j, k0);
              for (int k = 0; k < N; ++k) {
                const V p = e(k);
                part[k] += p * mix[i * K + k0 + k];
                if constexpr (kPerRow) part_up[k] += p * mix_up[i * K + k0 + k];
              }
            }
            for (int k = 0; k < N; ++k) {
              mean[k] += part[k];
              if constexpr (kPerRow) weighted[k] += part_up[k];
            }
          }
        }
        for (int k = 0; k < N; ++k) {
          const int64_t to = (slot * K + k0 + k) * kTile + at;
          const auto vanished =
              mean[k] < kSmallestNormal<T>;  // then so have all its P, which multiply L below
          const V log_q = log_positive(mean[k]) + log_mean[k0 + k];
          store(L + to, vanished ? splat(kGiven ? T(-__builtin_inf()) : T(0)) : log_q);
          if constexpr (kCareful) store(Q + to, mean[k]);
          if constexpr (kPerRow) store(rho + to, vanished ? V{} : weighted[k] / mean[k]);
        }
      });
    });
  }

  V given(int k, int64_t j) const {  // Q of temperature k at columns j ..
    const int64_t from = (int64_t(job.order[k]) * C + cluster.label) * C + j;
    V v{};
    for (int l = 0; l < W && j + l < C; ++l) v[l] = T(entry(job, job.centroids, from + l));
    return v;
  }

  template <bool kChain>
  void accumulate(int64_t i, int64_t tile, int64_t slot) {
    by_chunk([&](auto chunk, int k0) {
      constexpr int N = decltype(chunk)::value;
      V h[N], kl[N];
      T scale[N];
      for (int k = 0; k < N; ++k) {
        h[k] = h_acc[i * K + k0 + k];
        if constexpr (kCareful) kl[k] = kl_acc[i * K + k0 + k];
        scale[k] = c[i * K + k0 + k];
      }
      by_vector(tile, [&](int64_t j, int64_t at) {
        const V x = load<V>(X + i * Cp + j);
        V g = k0 == 0 ? V{} : load<V>(G + i * Cp + j);
        Exponentials<kChain> e(*this, i * Cp + j, k0);
        for (int k = 0; k < N; ++k) {
          const int64_t from = (slot * K + k0 + k) * kTile + at;
          const V p = e(k);
          V t = a[k0 + k] * x - load<V>(L + from);
          if constexpr (kCareful) {
            t -= T(off[i * K + k0 + k]);
            const V mean = load<V>(Q + from), soft = p * r[i * K + k0 + k];
            const V positive = mean * psi(t, soft / mean);
            // P = 0 contributes Q; with a given Q = 0 under P > 0 the divergence is infinite
            kl[k] += soft == T(0) ? mean : mean == T(0) ? splat(T(__builtin_inf())) : positive;
          }
          if constexpr (kPerRow) t = up[i] * t - load<V>(rho + from);
          V pt = p * t;
          if constexpr (kGiven) pt = p == T(0) ? V{} : pt;
          h[k] += pt;
          g += scale[k] * pt;
        }
        store(G + i * Cp + j, g);
      });
      for (int k = 0; k < N; ++k) {
        h_acc[i * K + k0 + k] = h[k];
        if constexpr (kCareful) kl_acc[i * K + k0 + k] = kl[k];
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

  // KL of row i at temperature k
  double divergence(int64_t i, int k) const {
    const int64_t at = i * K + k;
    if constexpr (kCareful) return kl_sum[at];
    const double kl = h_sum[at] * double(r[at]) - off[at];
    if constexpr (kGiven) return kl + given_excess(k);
    return kl;
  }

  double given_excess(int k) const {  // sum_j Q - 1: zero for a distribution
    double sum = 0;
    for (int64_t j = 0; j < C; ++j)
      sum += entry(job, job.centroids, (int64_t(job.order[k]) * C + cluster.label) * C + j);
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
    const int64_t row = cluster.rows[i];
    double total = 0;
    for (int k = 0; k < K; ++k) {
      q[i * K + k] = c[i * K + k] * T(h_sum[i * K + k] * double(r[i * K + k]));
      const double kl = divergence(i, k);
      total += job.w[k] * kl;
      if (job.kl) job.kl[row * K + job.order[k]] = kl;
    }
    if (job.row_cmi) job.row_cmi[row] = total;
  }

  template <bool kChain>
  void write_gradient(int64_t i) {
    const int64_t row = cluster.rows[i];
    const RowEntropy e = row_entropy(job, row, cluster.label);
    T* g = G + i * Cp;
    subtract_target(job, e, cluster.label, g);
    const T soft = job.has_ce ? T(e.probability) * r_ce[i] : T(0);
    if (job.has_ce && job.ce_index >= 0) q[i * K + job.ce_index] -= soft;
    const bool own_ce = job.has_ce && job.ce_index < 0;
    by_chunk([&](auto chunk, int k0) {
      constexpr int N = decltype(chunk)::value;
      const T* qi = q + i * K + k0;
      const bool last = k0 + N == K;
      auto value = [&](int64_t j) {
        V v = load<V>(g + j);
        if constexpr (kChain) {  // Horner's rule in E
          const V x = load<V>(E + i * Cp + j);
          V h = splat(qi[N - 1]);
          for (int k = N - 2; k >= 0; --k) h = h * x + qi[k];
          v -= h * power<T>(x, job.power0 + k0);
        } else {
          Exponentials<kChain> ex(*this, i * Cp + j, k0);
          for (int k = 0; k < N; ++k) v -= qi[k] * ex(k);
        }
        if (last && own_ce) v += soft * exp_nonpositive(load<V>(X + i * Cp + j));
        return v;
      };
      if (last)
        write_row<T>(job, row, value);
      else
        for (int64_t j = 0; j < Cp; j += W) store(g + j, value(j));
    });
  }

  // Returns false, with no gradient written, when the cluster has to be done again in double.
  template <bool kChain>
  bool run(const Team& team, bool whole) {
    auto each = [&](int64_t count, auto&& f) {
      using F = std::remove_reference_t<decltype(f)>;
      if (whole)
        team.run(count, [](void* arg, int64_t i) { (*static_cast<F*>(arg))(i); }, &f);
      else
        for (int64_t i = 0; i < count; ++i) f(i);
    };
    each(n, [&](int64_t i) { prepare<kChain>(i); });
    centre();
    if (whole) {
      each(tiles, [&](int64_t t) { centroid<kChain>(t, t); });
      each(n, [&](int64_t i) {
        for (int64_t t = 0; t < tiles; ++t) accumulate<kChain>(i, t, t);
      });
    } else {
      for (int64_t t = 0; t < tiles; ++t) {
        centroid<kChain>(t, 0);
        for (int64_t i = 0; i < n; ++i) accumulate<kChain>(i, t, 0);
      }
    }
    if (!kCareful && collapsed()) return false;
    each(n, [&](int64_t i) {
      summarise(i);
      if (job.grad) write_gradient<kChain>(i);
    });
    return true;
  }
};

}  // namespace
}  // namespace cmim::cpu
