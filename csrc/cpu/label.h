// The label's column of a cluster, where probabilities are large and differences of nearly equal numbers
// decide: had in double from the logits themselves. In float the other columns are computed without it, so
// that what is left of a confident row is not lost beside a probability near one.
//
//   exponentials(rows)  exp(a_k x)
//   normalise(i, k)     p_k = exp(a_k x) / S_k                                     once S of the row is known
//   finish()            t_k = a_k x - log S_k - log q_k, q_k the centroid's entry  once Q is
//   entries(rows)       sum_k coeff_k p_k (t_k - sum_j P_j t_j)  and the cross entropy's part
#pragma once

#include "rows.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

// kApart: the caller's sums leave the label out.
template <bool kApart>
struct LabelColumn {
  using V = Vec<double>;
  static constexpr int D = Simd<double>::width;

  const Job& job;
  const Cluster& cluster;
  int64_t n;
  int Kp;                   // temperatures in whole vectors, with coefficients of 0 at the end
  double *a, *coeff;        // (Kp) w_k a_k cmi_weight / normaliser
  double *p, *t, *mean;     // (n, Kp) see above; sum_j P_j t_j, which the caller writes
  double* rest;             // (n, Kp) kApart: 1 - p, without the cancellation
  double *log_q, *rho;      // (Kp) of the centroid; R/Q
  double *below_top, *x;    // (n) logit less the row's largest; the same, no less than where all vanishes
  double *p_ce, *upstream;  // (n) softmax at temperature 1
  double* lead;             // (n) the row's largest less what the caller's exponentials are relative to
  double* others;           // (n, Kp) kApart: exp(-a_k lead)

  LabelColumn(const Job& j, const Cluster& cl)
      : job(j), cluster(cl), n(cl.count), Kp(int(round_up(j.temperatures, D))) {}

  // t is g_i t - R/Q, see wide.h
  bool per_row() const { return !kApart && has_own_upstreams(job); }

  void place(Layout& layout) {
    for (double** of_row : {&p, &t, &mean}) layout.take(*of_row, n * Kp);
    layout.take(rest, kApart ? n * Kp : 0);
    for (double** of_all : {&a, &coeff, &log_q, &rho}) layout.take(*of_all, Kp);
    layout.take(others, kApart ? n * Kp : 0);
    for (double** one : {&x, &below_top, &p_ce, &upstream, &lead}) layout.take(*one, n);
  }
  template <class F>
  void fill(F&& inverse_temperature) {
    for (int k = 0; k < Kp; ++k) {
      const bool real = k < job.temperatures;
      a[k] = real ? inverse_temperature(k) : 0, coeff[k] = real ? job.coeff[k] : 0;
    }
  }

  // of the exponential's series: a relative error of 3e-10 in float, which x = 0 does not have
  static constexpr int kTerms = kApart ? 7 : 12;
  static constexpr int kPowerTerms = 9;  // 3e-13, which a power multiplies
  static constexpr int kLogTerms = kApart ? 5 : 11;

  // x, lead and upstream, and in the place of p what normalise() divides
  template <class T>
  void exponentials(Span rows, const T* tops) {
    const double floor = floor_of<double>(job);
    with_storage(job.storage, [&](auto tag) CMIM_INLINE_LAMBDA {
      const auto* const z = static_cast<const decltype(tag)*>(job.logits) + cluster.label * job.col_stride;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const double ahead = number(z[cluster.rows[i] * job.row_stride]) - double(tops[i]);
        below_top[i] = ahead > 0 ? 0 : ahead;
        x[i] = ahead < floor ? floor : below_top[i];
        lead[i] = ahead > 0 ? ahead : 0;
      }
    });
    for (int64_t i = rows.begin; i < rows.end; ++i)
      upstream[i] = job.upstream ? job.upstream[cluster.rows[i]] : 1.0;
    if constexpr (kApart)
      if (job.power0 > 0) return powers(rows);
    for (int k0 = 0; k0 < Kp; k0 += D) {
      const V ak = load<V>(a + k0);
      for (int64_t i = rows.begin; i < rows.end; ++i) put(i, k0, exp_nonpositive<kTerms>(ak * below(i)));
    }
  }
  // The row's exponent, its own or that of the others: one of them is zero.
  CMIM_INLINE double below(int64_t i) const { return x[i] - lead[i]; }
  CMIM_INLINE void put(int64_t i, int k0, V less) {
    const bool first = kApart && lead[i] > 0;
    store(p + i * Kp + k0, first ? splat(1.0) : less);
    if constexpr (kApart) store(others + i * Kp + k0, first ? less : splat(1.0));
    store(mean + i * Kp + k0, V{});
  }
  // Where the a_k are consecutive multiples of a base: one exponential for D rows, and its powers
  void powers(Span rows) {
    by_several<double>(rows.end - rows.begin, [&](auto several, int64_t from) CMIM_INLINE_LAMBDA {
      constexpr int U = decltype(several)::value;
      double of_rows[U * D] = {};
      for (int64_t l = 0; l < U * D && rows.begin + from + l < rows.end; ++l)
        of_rows[l] = below(rows.begin + from + l);
      const auto exponents = load_several<U>(of_rows);
      const auto one = exp_nonpositive<kPowerTerms>(exponents * (a[0] / job.power0));
      const auto first = job.power0 == 1 ? one : exp_nonpositive<kPowerTerms>(exponents * a[0]);
      for (int u = 0; u < U; ++u) {
        const int64_t i = rows.begin + from + u * D, count = i + D < rows.end ? D : rows.end - i;
        V now = part(first, u);
        for (int k0 = 0; k0 < Kp; k0 += D) {
          V block[D];
          for (V& of_rows_at_k : block) of_rows_at_k = now, now *= part(one, u);
          transpose(block);
          for (int64_t l = 0; l < count; ++l) put(i + l, k0, block[l]);
        }
      }
    });
  }
  // N temperatures of a row. sums (N): the caller's S_k, which become those of the whole row, relative to its
  // largest logit, where kApart. Returns what the caller's exponentials are multiplied by to give P.
  template <int N>
  CMIM_INLINE auto normalise(int64_t i, int k0, double* sums) {
    const int64_t at = i * Kp + k0;
    auto sum = doubles<N>(sums);
    if constexpr (kApart) sum *= doubles<N>(others + at);
    const auto own = doubles<N>(p + at), without = sum;
    if constexpr (kApart) store_doubles<N>(sums, sum += own);
    const auto inverse = 1.0 / sum;  // once: processors divide slowly
    if constexpr (kApart) store_doubles<N>(rest + at, without * inverse);
    store_doubles<N>(p + at, own * inverse);
    if constexpr (kApart)
      return inverse * doubles<N>(others + at);
    else
      return inverse;
  }
  // The same for temperature 1, where that is a term of its own.
  CMIM_INLINE double normalise_one(int64_t i, double& s_ce) {
    const double less = exp_nonpositive<kTerms>(splat<double>(x[i] - lead[i]))[0];
    const bool first = kApart && lead[i] > 0;
    if constexpr (kApart) s_ce = first ? s_ce * less + 1 : s_ce + less;
    p_ce[i] = (first ? 1 : less) / s_ce;
    return (first ? less : 1) / s_ce;
  }

  // log_sums (n, K): log S_k; given(k): the centroid's entry where it is given. For float.
  template <bool kGiven, class F>
  void finish(const double* log_sums, F&& given) {
    const int K = job.temperatures;
    for (int k0 = 0; k0 < Kp; k0 += D) {
      V q{};
      for (int64_t i = 0; i < n; ++i) q += load<V>(p + i * Kp + k0);
      store(log_q + k0, q * (1 / double(n)));
    }
    if constexpr (kGiven)
      for (int k = 0; k < K; ++k) log_q[k] = given(k);
    for (int k0 = 0; k0 < Kp; k0 += D) {
      const V q = load<V>(log_q + k0);
      store(log_q + k0,
            q == 0.0 ? splat<double>(kGiven ? -__builtin_inf() : 0.0) : log_positive<false, kLogTerms>(q));
    }
    set_t(log_sums);
  }
  // In double: log_q (K) with its shift, and rho (K), as every other column had them, so that whatever their
  // rounding is, it cancels in t - mean.
  void finish(const double* log_sums, const double* log_q_of_tile, const double* rho_of_tile) {
    for (int k = 0; k < job.temperatures; ++k) {
      log_q[k] = log_q_of_tile[k];
      if (per_row()) rho[k] = rho_of_tile[k];
    }
    set_t(log_sums);
  }
  void set_t(const double* log_sums) {
    const int K = job.temperatures;
    for (int k = K; k < Kp; ++k) log_q[k] = 0, rho[k] = 0;
    for (int k0 = 0; k0 < Kp; k0 += D) {
      const V ak = load<V>(a + k0), log_qk = load<V>(log_q + k0);
      for (int64_t i = 0; i < n; ++i) {
        V of_row{};
        if (k0 + D <= K)
          of_row = load<V>(log_sums + i * K + k0);
        else
          for (int k = k0; k < K; ++k) of_row[k - k0] = log_sums[i * K + k];
        V value = ak * x[i] - log_qk - of_row;
        if (per_row()) value = upstream[i] * value - load<V>(rho + k0);
        store(t + i * Kp + k0, value);
      }
    }
  }

  // to (n): e of the cluster's cross entropy for upstream gradients of 1
  void entries(Span rows, const RowEntropy& e, double* to) const {
    const double taken = e.one_hot + e.smooth * class_weight(job, cluster.label);
    const bool per_row = this->per_row(), has_ce = job.has_ce;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      V sum{};
      for (int k0 = 0; k0 < Kp; k0 += D) {
        const int64_t at = i * Kp + k0;
        const V pi = load<V>(p + at);
        const V part = load<V>(coeff + k0) * pi * (load<V>(t + at) - load<V>(mean + at));
        sum += pi == 0.0 ? V{} : part;
      }
      const double value = per_row ? sum_lanes<double>(sum) : sum_lanes<double>(sum) * upstream[i];
      to[i] = has_ce ? value + (e.probability * p_ce[i] - taken) * upstream[i] : value;
    }
  }
};

}  // namespace
}  // namespace cmim::cpu
