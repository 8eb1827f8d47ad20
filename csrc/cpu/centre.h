// A cluster of float rows centred on its mean logits: what of narrow.h comes before any temperature's sums.
#pragma once

#include "rows.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

// kSource: of what is chosen for exp(a_k x), here of expm1(a_k d)
template <Source kSource>
struct Centre : Rows<float> {
  using V = Vec<float>;
  static constexpr bool kChain = kSource == Source::chain;

  const float** from;             // (n) the row's logits
  float* one;                     // (Cp) exp(zbar - max)
  float *center, *ebar, *weight;  // (Cp) zbar; exp(base (zbar - max)); softmax(a_K zbar)
  double* sbar;                   // (K) sum_j ebar^(p + k)
  float* inv_sbar;                // (K) its inverse
  float *shift, *spread;          // (n) the row's constant; its largest |d|
  double one_sum = 0;
  float top = 0;  // max zbar

  Centre(const Job& j, const Cluster& cl, bool whole) : Rows(j, cl, kSource, whole) {}
  void place(Layout& layout) {
    Rows::place(layout);
    layout.take(from, n);
    layout.take(one, job.has_ce ? Cp : 0);
    layout.take(center, Cp), layout.take(ebar, kChain ? Cp : 0), layout.take(weight, Cp);
    layout.take(sbar, K), layout.take(inv_sbar, K);
    layout.take(shift, n), layout.take(spread, n);
  }

  CMIM_INLINE V logits(int64_t i, int64_t j) const {
    return j + W <= C ? load<V>(from[i] + j) : load_tail<float, float>(from[i] + j, C - j);
  }

  // zbar, -inf where a class is masked throughout; z itself, to the bit, where all rows agree
  void mean_logits(int64_t tile) {
    const float scale = 1.0f / float(n);
    for (int64_t j = tile * cols; j < end_of(tile); j += W) {
      const V first = logits(0, j);
      V total{};
      for (int64_t i0 = 0; i0 < n; i0 += kSumBlock) {
        V part{};
        for (int64_t i = i0; i < n && i < i0 + kSumBlock; ++i) {
          const V z = logits(i, j);
          part += z == first ? V{} : z - first;
        }
        total += part;
      }
      store(center + j, first + total * scale);
    }
  }

  void mean_softmax() {
    V highest = splat(-__builtin_inff());
    for (int64_t j = 0; j < Cp; j += W) highest = vmax<float>(load<V>(center + j), highest);
    top = max_lanes<float>(highest);
    const float base = float(job.base);
    for (int k = 0; k < K; ++k) sbar[k] = 0;
    if constexpr (kChain)
      by_several<float>(Cp, [&](auto several, int64_t j) CMIM_INLINE_LAMBDA {
        const auto below = load_several<decltype(several)::value>(center + j) - top;
        store_several(ebar + j, exp_of_any(below * base));
      });
    by_chunk(K, [&](auto chunk, int k0) CMIM_INLINE_LAMBDA {
      constexpr int N = decltype(chunk)::value;
      for (int64_t j0 = 0; j0 < Cp; j0 += kFlushVectors * W) {
        V s[N] = {};
        for (int64_t j = j0; j < Cp && j < j0 + kFlushVectors * W; j += W)
          each_mean<N>(k0, j, [&](int k, V e) CMIM_INLINE_LAMBDA { s[k] += e; });
        add_lanes<float, N>(s, sbar + k0);
      }
    });
    for (int k = 0; k < K; ++k) inv_sbar[k] = float(1 / sbar[k]);
    if (job.has_ce) {
      RowSum<float> sum;
      by_several<float>(Cp, [&](auto several, int64_t j) CMIM_INLINE_LAMBDA {
        const auto below = load_several<decltype(several)::value>(center + j) - top;
        const auto e = exp_of_any(below);
        store_several(one + j, e);
        sum.add(j, e);
      });
      one_sum = sum.value();
    }
    for (int64_t j = 0; j < Cp; j += W)
      each_mean<1>(K - 1, j, [&](int, V e) CMIM_INLINE_LAMBDA { store(weight + j, e * inv_sbar[K - 1]); });
  }
  // f(k, exp(a_k (zbar - max))) for one chunk
  template <int N, class F>
  CMIM_INLINE void each_mean(int k0, int64_t j, F&& f) const {
    if constexpr (kChain) {
      const V one = load<V>(ebar + j);
      PowerChain<float> ex(one, power<float>(one, job.power0 + k0));
      for (int k = 0; k < N; ++k) f(k, ex.at(k));
    } else {
      const V below = load<V>(center + j) - top;
      for (int k = 0; k < N; ++k) f(k, exp_of_any(a[k0 + k] * below));
    }
  }

  // d in X, v_1 in E
  void centre(int64_t i) {
    float* const x = X + i * Cp;
    float* const v1 = E + i * Cp;
    const float base = float(job.base);
    V dot{}, high{};
    for (int64_t j = 0; j < Cp; j += W) {
      const V z = logits(i, j), c = load<V>(center + j);
      const V d = z == c ? V{} : z - c;  // equal where a class is masked for the cluster: -inf less -inf
      store(x + j, d);
      dot += load<V>(weight + j) * d;
      high = vmax<float>(magnitude(d), high);
    }
    const float constant = sum_lanes<float>(dot);
    V wide{};
    by_several<float>(Cp, [&](auto several, int64_t j) CMIM_INLINE_LAMBDA {
      constexpr int U = decltype(several)::value;
      const auto d = load_several<U>(x + j) - constant;
      store_several(x + j, d);
      if constexpr (kChain) store_several(v1 + j, expm1_small(d * base));
      for (int u = 0; u < U; ++u) wide = vmax<float>(magnitude(part(d, u)), wide);
    });
    shift[i] = constant;
    const float most = max_lanes<float>(wide);
    // z - zbar was rounded in units of its own size: with large shifts between the rows nothing of d is left.
    // A NaN in any d is one in the constant too.
    const bool lost = max_lanes<float>(high) > 16 * most || constant != constant;
    spread[i] = lost ? __builtin_inff() : most;
  }

  // v[k] = expm1(a_k d) of row i for one chunk. kOrder: of psi_ratio, which tells how small they are. kFirst:
  // the first time, when those that are stored are made.
  template <int N, int kOrder, bool kFirst = false>
  CMIM_INLINE void expm1_of(int64_t i, int k0, int64_t j, V (&v)[N]) const {
    constexpr bool kStored = kSource == Source::stored;
    float* const kept = place_of<kSource>(i, k0) + column<kSource>(j);
    const V d = load<V>(X + i * Cp + j);
    if constexpr (kStored && !kFirst) {
      for (int k = 0; k < N; ++k) v[k] = load<V>(kept + k * W);
    } else if constexpr (kChain) {
      const V v1 = load<V>(E + i * Cp + j), e1 = v1 + 1.0f;
      v[0] = job.power0 + k0 == 1 ? v1 : expm1_small<kOrder>(a[k0] * d);
      const V step = kChains == 1 ? v1 : v1 * e1 + v1, e_step = step + 1.0f;
      for (int k = 1; k < N; ++k) v[k] = k < kChains ? v[k - 1] * e1 + v1 : v[k - kChains] * e_step + step;
    } else {
      constexpr int U = kAtOnce<N>;
      for (int k = 0; k < N; k += U)
        put_parts<float>(v + k, expm1_small<kOrder>(d * splat_each<U>(a + k0 + k)));
      for (int k = 0; kStored && k < N; ++k) store(kept + k * W, v[k]);
    }
  }
};

}  // namespace
}  // namespace cmim::cpu
