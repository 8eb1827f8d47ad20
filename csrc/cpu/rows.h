// What every way of computing a cluster shares: its scratch arrays, powers of one exponential, the scales of
// each row, and the gradient once the divergences are known.
#pragma once

#include <type_traits>

#include "elementary.h"
#include "problem.h"
#include "row.h"
#include "simd.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

constexpr int kTileVectors = 16;  // columns of a tile, fewer where many rows share the first-level cache
constexpr int64_t kTileBytes = 24 << 10;
constexpr int kSumBlock =
    32;  // rows summed before their sum joins the centroid's: rounding does not build up
constexpr int kFlushTiles = 32;  // sums in lanes of T go over to double this often, whatever C
constexpr int64_t kStoredBytes = int64_t(1) << 20;  // about a core's second-level cache

template <int N>
struct Constant {
  static constexpr int value = N;
};

// f(size of the chunk as a constant, its first temperature)
template <class F>
CMIM_INLINE void by_chunk(int K, F&& f) {
  int k = 0;
  for (; k + 8 <= K; k += 8) f(Constant<8>{}, k);
  for (; k + 4 <= K; k += 4) f(Constant<4>{}, k);
  for (; k < K; ++k) f(Constant<1>{}, k);
}

template <class T>
CMIM_INLINE Vec<T> power(Vec<T> x, int p) {  // p >= 1
  while ((p & 1) == 0) x *= x, p >>= 1;
  Vec<T> y = x;
  while (p >>= 1) {
    x *= x;
    if (p & 1) y *= x;
  }
  return y;
}

// Where a pass has exp(a_k x) from, at every temperature.
enum class Source {
  chain,   // powers of exp(base x), a_k = (power0 + k) base: from E, (n, Cp)
  stored,  // computed once per cluster: E is (n, K, Cp)
  direct,  // computed at each use from X, (n, Cp), where storing them would leave the second-level cache
};

// e[k] = exp(a_k x) for one chunk; from: its place in E or X, stride: between temperatures, p: of the first
// one.
template <Source kSource, int N, class T>
CMIM_INLINE void exponentials(const T* from, int64_t stride, const T* a, int p, Vec<T> (&e)[N]) {
  if constexpr (kSource == Source::chain) {
    const Vec<T> first = load<Vec<T>>(from);
    e[0] = power<T>(first, p);
    for (int k = 1; k < N; ++k) e[k] = e[k - 1] * first;
  } else if constexpr (kSource == Source::stored) {
    for (int k = 0; k < N; ++k) e[k] = load<Vec<T>>(from + k * stride);
  } else {
    const Vec<T> x = load<Vec<T>>(from);
    for (int k = 0; k < N; ++k) e[k] = exp_nonpositive(a[k] * x);
  }
}

// Runs f(0 .. count - 1), on all threads of the team if it has any.
template <class F>
void each(const Team& team, int64_t count, F&& f) {
  using G = std::remove_reference_t<F>;
  if (team.run)
    team.run(count, [](void* arg, int64_t i) { (*static_cast<G*>(arg))(i); }, &f);
  else
    for (int64_t i = 0; i < count; ++i) f(i);
}

template <class T>
struct Rows {
  using V = Vec<T>;
  static constexpr int W = Simd<T>::width;

  const Job& job;
  const Cluster& cluster;
  int64_t n, C, Cp;  // rows, classes, classes in whole vectors
  int K;
  int64_t cols;   // columns of a tile, whole vectors
  int64_t tiles;  // column tiles
  Source source;  // where the exponentials come from
  T *X, *E,
      *G;  // (n, Cp) what the temperatures multiply; exp(base X) up to a factor of the row; the gradient
  T *r, *c, *q;  // (n, K) P_k = r_k E^(p + k); coeff r; c sum_j P log(P/Q)
  T* a;          // (K)
  T* r_ce;       // (n) the softmax at temperature 1 is r_ce exp(X)

  Rows(const Job& j, const Cluster& cl)
      : job(j),
        cluster(cl),
        n(cl.count),
        C(j.classes),
        Cp(round_up(C, W)),
        K(j.temperatures),
        source(choose(j, cl)) {
    const int64_t vectors = (kTileBytes / n) / (kVectorBytes * (source == Source::stored ? K : 2));
    cols = W * (vectors < kTileVectors / 4 ? kTileVectors / 4
                : vectors < kTileVectors   ? vectors
                                           : kTileVectors);
    tiles = (Cp + cols - 1) / cols;
  }

  static Source choose(const Job& j, const Cluster& cl) {
    if (j.power0 > 0) return Source::chain;
    return cl.count * j.classes * j.temperatures * int64_t(sizeof(T)) <= kStoredBytes ? Source::stored
                                                                                      : Source::direct;
  }
  // f(the source as a constant)
  template <class F>
  CMIM_INLINE auto with_source(F&& f) {
    if (source == Source::chain) return f(std::integral_constant<Source, Source::chain>{});
    if (source == Source::stored) return f(std::integral_constant<Source, Source::stored>{});
    return f(std::integral_constant<Source, Source::direct>{});
  }
  // the place of row i, temperature k0, column 0 in what exponentials() reads
  template <Source kSource>
  CMIM_INLINE T* place_of(int64_t i, int k0) const {
    if constexpr (kSource == Source::stored) return E + (i * K + k0) * Cp;
    return (kSource == Source::chain ? E : X) + i * Cp;
  }

  // Lays arrays out one after the other from an address.
  struct Layout {
    int64_t at;
    template <class P>
    void take(P*& p, int64_t count) {
      p = reinterpret_cast<P*>(at);
      at += round_up(count * int64_t(sizeof(P)), 64);
    }
  };

  // `reread`: X is needed after G has been written
  void place(Layout& layout, bool reread) {
    layout.take(X, n * Cp);
    layout.take(E, source == Source::chain ? n * Cp : source == Source::stored ? n * K * Cp : 0);
    const bool one_chunk = K == 1 || K == 4 || K == 8;
    if (one_chunk && !reread)
      G = X;
    else
      layout.take(G, n * Cp);
    layout.take(r, n * K), layout.take(c, n * K), layout.take(q, n * K);
    layout.take(a, K), layout.take(r_ce, n);
  }
  void fill() {
    for (int k = 0; k < K; ++k) a[k] = T(job.a[k]);
  }

  // by_tile(team, f, g): f(tile, slot) prepares what g(row, tile, slot) uses. Alone, a thread keeps one tile
  // at a time in its first-level cache (slot 0); a team prepares all of them first.
  template <class F, class H>
  void by_tile(const Team& team, F&& f, H&& g) {
    if (team.run) {
      each(team, tiles, [&](int64_t t) { f(t, t); });
      each(team, n, [&](int64_t i) {
        for (int64_t t = 0; t < tiles; ++t) g(i, t, t);
      });
    } else {
      for (int64_t t = 0; t < tiles; ++t) {
        f(t, 0);
        for (int64_t i = 0; i < n; ++i) g(i, t, 0);
      }
    }
  }

  // softmax at temperature 1 up to r_ce, at columns j .. of row i, where it is not one of the powers
  template <bool kCentred>
  CMIM_INLINE static V unscaled_softmax(const T* x, const T* center_exp, int64_t j) {
    const V v = load<V>(x + j);
    if constexpr (kCentred) {
      const V center = load<V>(center_exp + j);
      return expm1_small(v) * center + center;
    } else {
      return exp_nonpositive(v);
    }
  }

  bool own_ce() const { return job.has_ce && job.ce_index < 0; }

  // sums (K): S_k = sum_j E^(p + k); s_ce = sum_j exp(z - top).
  void set_row(int64_t i, const double* sums, double s_ce, double top, double upstream) {
    const int64_t row = cluster.rows[i];
    for (int k = 0; k < K; ++k) {
      const double inverse = 1 / sums[k];
      r[i * K + k] = T(inverse);
      c[i * K + k] = T(job.coeff[k] * upstream * inverse);
    }
    if (job.has_ce) {
      r_ce[i] = T(1 / s_ce);
      if (job.row_ce) job.row_ce[row] = row_entropy_value(job, row, cluster.label, s_ce, top);
    } else if (job.row_ce) {
      job.row_ce[row] = 0;
    }
  }

  void report(int64_t i, int k, double kl, double& total) const {
    total += job.w[k] * kl;
    if (job.kl) job.kl[cluster.rows[i] * K + job.order[k]] = kl;
  }

  // The gradient at the label, before write_gradient changes anything
  template <Source kSource, bool kCentred>
  double label_entry(int64_t i, const RowEntropy& e, const T* center_exp) const {
    const int64_t label = cluster.label;
    double value = double(G[i * Cp + label]), ce = 0;
    T ex = T(1);
    for (int k = 0; k < K; ++k) {
      const T* const from = place_of<kSource>(i, k) + label;
      if constexpr (kSource == Source::chain) {
        for (int step = k == 0 ? job.power0 : 1; step > 0; --step) ex *= *from;
      } else {
        ex = kSource == Source::stored ? *from : exp_nonpositive(splat(a[k] * *from))[0];
      }
      value -= double(q[i * K + k]) * double(ex);
      if (k == job.ce_index) ce = double(ex);
    }
    if (!job.has_ce) return value;
    if (kCentred || own_ce()) {
      const int64_t j = label / W * W;
      ce = double(unscaled_softmax<kCentred>(X + i * Cp, center_exp, j)[label - j]);
    }
    return value + (e.probability * double(r_ce[i]) * ce - e.one_hot - e.smooth * class_weight(job, label));
  }

  // G - sum_k q_k E^(p + k), and the cross entropy's gradient
  // kCentred: X is centred, center_exp (Cp) is the exponential of the centre, and the softmax at temperature
  // 1 is taken from them, since a power of E carries its rounding several times over.
  template <Source kSource, bool kCentred = false>
  void write_gradient(int64_t i, const T* center_exp = nullptr) {
    const int64_t row = cluster.rows[i];
    const RowEntropy e = row_entropy(job, row, cluster.label);
    T* const g = G + i * Cp;
    const T soft = job.has_ce ? T(e.probability) * r_ce[i] : T(0);
    const double at_label = label_entry<kSource, kCentred>(i, e, center_exp);
    subtract_smooth(job, e, g);
    const bool add_ce = job.has_ce && (kCentred || own_ce());
    if (job.has_ce && !add_ce) q[i * K + job.ce_index] -= soft;
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      T qi[N];
      for (int k = 0; k < N; ++k) qi[k] = q[i * K + k0 + k];
      const T *const ai = a + k0, *const x = X + i * Cp,
                     *const from = this->template place_of<kSource>(i, k0);
      const int64_t stride = Cp;
      const int p = job.power0 + k0;
      const bool last = k0 + N == K;
      auto value = [=](int64_t j) CMIM_INLINE_LAMBDA {
        V v = load<V>(g + j);
        if constexpr (kSource == Source::chain) {  // Horner's rule
          const V e1 = load<V>(from + j);
          V h = splat(qi[N - 1]);
          for (int k = N - 2; k >= 0; --k) h = h * e1 + qi[k];
          v -= h * power<T>(e1, p);
        } else {
          V ex[N];
          exponentials<kSource, N>(from + j, stride, ai, p, ex);
          for (int k = 0; k < N; ++k) v -= qi[k] * ex[k];
        }
        if (last && add_ce) v += soft * unscaled_softmax<kCentred>(x, center_exp, j);
        return v;
      };
      if (last)
        write_row<T>(job, row, value);
      else
        for (int64_t j = 0; j < Cp; j += W) store(g + j, value(j));
    });
    write_entry<T>(job, row, cluster.label, at_label);
  }
};

}  // namespace
}  // namespace cmim::cpu
