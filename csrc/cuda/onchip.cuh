// A class all of whose rows fit on chip, with up to eight temperatures that are powers of one: from its
// logits to its gradient without a stop in global memory. The forms are those of forms.cuh; what differs from
// cluster.cuh is where things lie, see chip.cuh.
#pragma once

#include "chip.cuh"
#include "classes.cuh"

namespace cmim::cuda {

template <class T>
class OnChip : ChipRows<T> {
  using Rows = ChipRows<T>;
  using Rows::b, Rows::f, Rows::q, Rows::t, Rows::n, Rows::keeps;
  using Rows::K, Rows::kHalf;
  using Rows::kShiftHigh, Rows::kShiftLow;
  using Rows::kSum, Rows::kDivergence, Rows::kGrowth, Rows::kWeight, Rows::kLoss, Rows::kKl,
      Rows::kCoefficients;
  using Rows::kTopOf, Rows::kCe, Rows::kCeSum, Rows::kCeScale, Rows::kCeTarget, Rows::kCeSmooth;
  using Rows::of_rows, Rows::of_both, Rows::rows, Rows::logit, Rows::centroids, Rows::scales,
      Rows::reciprocals, Rows::in_columns, Rows::for_rows, Rows::for_both;
  using Rows::take, Rows::take_logits, Rows::take_first, Rows::take_powers;
  using typename Rows::A, typename Rows::S;

 public:
  using Rows::serves, Rows::prepare;
  __device__ OnChip(Block<T>& block, const Forward<A>& forward) : Rows(block, forward) {}

  // `cluster`: the class's divergences count. Barriers before and after.
  __device__ void run(int slot, bool cluster, const Backward<A>& w) {
    const bool shared_sum = shares_sum(q, cluster);
    Rows::load();
    __syncthreads();
    Rows::sums(cluster, shared_sum);
    __syncthreads();
    Rows::finish_sums(cluster, shared_sum);
    __syncthreads();
    if (cluster) {
      choose_weights();
      __syncthreads();
      plain_divergences();
      __syncthreads();
      finish_plain();
    }
    const unsigned collapsed = sum_class(slot, cluster);
    if (cluster && collapsed && centre(collapsed)) sum_class(slot, cluster);
    if (q.reduction == kNone) store_rows(cluster);
    if (f.saves) save(cluster);
    if (!w.out) return;
    stage(w, cluster);
    __syncthreads();
    gradient(w, cluster);
  }

 private:
  // The plain form's scales, and the rows' weights in the mean
  __device__ void choose_weights() {
    for_both([&](int i, int k) {
      A scale = 0;
#pragma unroll 1
      for (int other = 0; other < n; ++other) scale += of_both(kSum)[other * K + k];
      scale /= A(n);
      of_both(kWeight)[i * K + k] = scale / of_both(kSum)[i * K + k];
      if (i == 0) scales()[k] = scale;
    });
  }

  // The table, and the warps' sums of P t'
  __device__ void plain_divergences() {
    A mean[K][kVector] = {};
    for_rows([&](int i, bool there) {
      if (!there || !in_columns()) return;
      A power[kVector], begin[kVector];
      take_powers(i, begin, power);
      A weight[kVector] = {};
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k % kVector == 0) load_four(of_both(kWeight) + i * K + k, weight);
#pragma unroll
        for (int u = 0; u < kVector; ++u) {
          mean[k][u] = fma(power[u], weight[k % kVector], mean[k][u]);
          power[u] *= begin[u];
        }
      }
    });
    const A rows = A(n), per_row = A(1) / rows;
    b.combine_groups(t, mean, ~0u, b.table(), [&](int, int, A sum) {
      // Divided, not multiplied by 1/n: that would be off by the same part everywhere, and so would KL.
      const A p = divided(sum, rows, per_row);
      return chosen(p > A(0), log_positive(p), p);  // keeps a NaN; a class masked throughout has P = 0
    });
    A log_ratio[K][kVector];
#pragma unroll
    for (int k = 0; k < K; ++k) load_four(b.table() + (k << t.shift) + t.column(), log_ratio[k]);
    for_rows([&](int i, bool there) {
      A sum[K] = {};
      if (there && in_columns()) {
        A y[kVector], power[kVector], begin[kVector];
        take(i, y);
        take_powers(i, begin, power);
#pragma unroll
        for (int u = 0; u < kVector; ++u) y[u] *= q.unit;
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int u = 0; u < kVector; ++u) {
            sum[k] = fma(power[u], fma(q.multiple[k], y[u], -log_ratio[k][u]), sum[k]);
            power[u] *= begin[u];
          }
      }
      b.deposit(t, i, there, sum, false);
    });
  }
  __device__ void finish_plain() {
    if (threadIdx.x == 0) b.flags()[0] = q.classes - 1;  // for find_shifts()
    for_both([&](int i, int k) {
      const int at = i * K + k;
      const A sum = of_both(kSum)[at], divergence = Rows::template total<K>(b.combine(), i, k) / sum;
      const A nats = divergence + log_positive(scales()[k] / sum);
      of_both(kDivergence)[at] = divergence;
      of_both(kKl)[at] = nats < A(0) ? A(0) : nats;  // rounding; keeps a NaN
    });
  }

  __device__ unsigned sum_class(int slot, bool cluster) const {
    return unsigned(cuda::sum_class(
        b, f, slot, cluster, true, [&](int i) { return of_rows(kCe)[i]; },
        [&](int i, int k) { return of_both(kKl)[i * K + k]; }));
  }

  // The divergences of the temperatures in `wanted`, in the centred form unless the rows are too far apart
  // for it: b.centred are those that were not. Barriers before and after.
  __device__ bool centre(unsigned wanted) {
    Centred<T> form;
    find_shifts();
#pragma unroll 1
    for (int k0 = 0; k0 < K; k0 += kHalf) {
      if (!in_step<T>(wanted, k0, kHalf)) continue;
      const A widest = largest_in_group(centred_sums(form, k0, wanted), kThreads, b.scratch());
      const uint64_t fit = not_too_wide(b, wanted, widest);
      if (!fit) return b.centred != 0;  // of all temperatures the first is the last to be too wide
      b.centred |= fit & (((1u << kHalf) - 1) << k0);
      if (!in_step<T>(b.centred, k0, kHalf)) break;
      for_both([&](int i, int k) {
        if (!(b.centred >> k & 1) || k < k0 || k >= k0 + kHalf) return;
        const int at = i * K + k;
        const A growth = log1p_of(Rows::template total<kHalf>(b.combine(), i, k - k0) / of_both(kSum)[k]);
        if (i == 0) reciprocals()[k] = A(1) / of_both(kSum)[k];
        of_both(kGrowth)[at] = growth;
        of_both(kWeight)[at] = exp_of(-growth);
        of_both(kLoss)[at] = -expm1_of(-growth);
      });
      __syncthreads();
      centred_divergences(form, k0);
      __syncthreads();
      for_both([&](int i, int k) {
        if (!(b.centred >> k & 1) || k < k0 || k >= k0 + kHalf) return;
        const A kl = Rows::template total<kHalf>(b.combine(), i, k - k0);
        of_both(kKl)[i * K + k] = of_both(kDivergence)[i * K + k] = kl;
      });
      __syncthreads();
    }
    return b.centred != 0;
  }
  // z[j0] - z0[j0] of every row, see forms.cuh: j0 is the first column where row 0 is largest
  __device__ void find_shifts() {
    if (t.group() == 0 && in_columns()) {
      A z[kVector];
      take_logits(0, z);
#pragma unroll
      for (int u = 0; u < kVector; ++u)
        if (z[u] == of_rows(kTopOf)[0]) atomicMin(b.flags(), t.column() + u);
    }
    __syncthreads();
    const int j0 = *b.flags();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const Difference<A> shift = shift_between(logit(i, j0), logit(0, j0));
      of_rows(kShiftHigh)[i] = shift.high, of_rows(kShiftLow)[i] = shift.low;
    }
    __syncthreads();
  }
  __device__ void take_offsets(int i, const A (&z0)[kVector], A (&d)[kVector]) const {
    const Difference<A> shift{of_rows(kShiftHigh)[i], of_rows(kShiftLow)[i]};
    A z[kVector];
    take_logits(i, z);
#pragma unroll
    for (int u = 0; u < kVector; ++u) d[u] = offset(z[u], z0[u], shift);
  }
  // The warps' sums of P0 v, but for the sum of row 0: (row, warp, kHalf); returns the thread's largest d
  __device__ A centred_sums(Centred<T>& form, int k0, unsigned wanted) {
    A p0[kHalf][kVector] = {}, z0[kVector] = {}, widest = 0;
    if (in_columns()) {
      take_logits(0, z0);
#pragma unroll
      for (int u = 0; u < kVector; ++u) {
        Powers<A, true> powers;
        powers.start(q, larger(z0[u] - of_rows(kTopOf)[0], q.floor), k0);
#pragma unroll
        for (int k = 0; k < kHalf; ++k) {
          p0[k][u] = powers.now;
          powers.next();
        }
      }
    }
    for_rows([&](int i, bool there) {
      A sum[kHalf] = {};
      if (there && in_columns()) {
        take_offsets(i, z0, form.d);
        form.start(q, k0);
#pragma unroll
        for (int u = 0; u < kVector; ++u)
          widest = larger(widest, t.column() + u < q.classes ? form.d[u] : A(0));
#pragma unroll
        for (int k = 0; k < kHalf; ++k) {
          if (!(wanted >> k0 >> k)) break;
#pragma unroll
          for (int u = 0; u < kVector; ++u) sum[k] = fma(p0[k][u], form.v[u], sum[k]);
          form.next();
        }
      }
      b.deposit(t, i, there, sum, false);
    });
    return widest;
  }
  // The tables, and the warps' sums of Q psi(t)
  __device__ void centred_divergences(Centred<T>& form, int k0) {
    A mean[kHalf][kVector] = {}, z0[kVector] = {};
    if (in_columns()) take_logits(0, z0);
    for_rows([&](int i, bool there) {
      if (!there || !in_columns()) return;
      take_offsets(i, z0, form.d);
      form.start(q, k0);
      A weight[kVector], loss[kVector];
      load_four(of_both(kWeight) + i * K + k0, weight);
      load_four(of_both(kLoss) + i * K + k0, loss);
#pragma unroll
      for (int k = 0; k < kHalf; ++k) {
        if (!(b.centred >> k0 >> k)) break;
#pragma unroll
        for (int u = 0; u < kVector; ++u)
          mean[k][u] = form.add_mean_term(q, k0 + k, u, weight[k], loss[k], mean[k][u]);
        form.next();
      }
    });
    const A rows = A(n), per_row = A(1) / rows;
    A* const table = b.table() + (k0 << t.shift);
    b.combine_groups(t, mean, unsigned(b.centred >> k0), table, [&](int k, int column, A sum) {
      const A p = divided(sum, rows, per_row);
      A at = 0;
      if (column < q.classes)
        at = exp_nonpositive(q.a[k0 + k] * larger(logit(0, column) - of_rows(kTopOf)[0], q.floor));
      centroids()[(k << t.shift) + column] = at * reciprocals()[k0 + k] * (A(1) + p);
      return log1p_of(p);
    });
    A log_ratio[kHalf][kVector], centroid[kHalf][kVector];
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      load_four(table + (k << t.shift) + t.column(), log_ratio[k]);
      load_four(centroids() + (k << t.shift) + t.column(), centroid[k]);
    }
    __syncthreads();  // they may lie where the sums go
    for_rows([&](int i, bool there) {
      A sum[kHalf] = {};
      if (there && in_columns()) {
        take_offsets(i, z0, form.d);
        A growth[kVector];
        load_four(of_both(kGrowth) + i * K + k0, growth);
#pragma unroll
        for (int k = 0; k < kHalf; ++k)
          if (b.centred >> (k0 + k) & 1)
#pragma unroll
            for (int u = 0; u < kVector; ++u)
              sum[k] = form.add_divergence_term(q, k0 + k, u, A(0), growth[k], log_ratio[k][u],
                                                centroid[k][u], sum[k]);
      }
      b.deposit(t, i, there, sum, false);
    });
  }

  // The values of the class's rows, for reduction "none"
  __device__ void store_rows(bool cluster) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += kThreads) {
      A cmi = 0;
#pragma unroll 1
      for (int k = 0; cluster && k < q.temperatures; ++k)
        cmi = fma(q.weight[k], of_both(kKl)[i * K + k], cmi);
      f.value[rows()[i]] = row_value(q, of_rows(kCe)[i], cmi);
    }
  }

  // What the backward kernels read, to Saved
  __device__ void save(bool cluster) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += kThreads) {
      b.saved.top[b.first + i] = of_rows(kTopOf)[i];
      b.saved.ce_sum[b.first + i] = of_rows(kCeSum)[i];
    }
    if (!cluster) return;
    for_both([&](int i, int k) {
      const int64_t to = b.statistic(i, k);
      b.saved.sum[to] = of_both(kSum)[i * K + k];
      b.saved.divergence[to] = of_both(kDivergence)[i * K + k];
      b.saved.growth[to] = b.centred >> k & 1 ? of_both(kGrowth)[i * K + k] : scales()[k];
    });
  }

  // What the gradient's terms are multiplied by
  __device__ void stage(const Backward<A>& w, bool cluster) {
    find_divisors(b);
    __syncthreads();
    const Divisors<A> by = *b.divisors();
    for_both([&](int i, int k) {
      const int at = i * K + k;
      if (k == 0) {
        const CrossEntropyParts<A> ce = cross_entropy_parts(b, by, w, of_rows(kCeSum)[i], A(1));
        of_rows(kCeScale)[i] = ce.scale, of_rows(kCeTarget)[i] = ce.target, of_rows(kCeSmooth)[i] = ce.smooth;
      }
      A parts[4] = {};
      if (cluster && k < q.temperatures)
        gradient_parts<T>(b, by, w, k, of_both(kSum)[at], of_both(kDivergence)[at],
                          b.centred >> k & 1 ? of_both(kGrowth)[at] : A(0), A(1), A(0), parts);
      store_four(of_both(kCoefficients) + 4 * at, parts);
    });
  }

  __device__ void gradient(const Backward<A>& w, bool cluster) {
    if (!in_columns()) return;
    const int label = b.label(), j = t.column();
    Coefficients<A> c{};
    c.parts = of_both(kCoefficients);
    A log_ratio[kFew][kVector] = {}, z0[kVector] = {};
    if (cluster) {
      take_logits(0, z0);
#pragma unroll
      for (int k = 0; k < kFew; ++k)
        if (k < q.temperatures) load_four(b.table() + (k << t.shift) + j, log_ratio[k]);
    }
    for_rows([&](int i, bool there) {
      if (!there) return;
      Columns<A> at;
      A g[kVector] = {};
      take(i, at.x);
      if (cluster) take_first(i, at.first);
#pragma unroll
      for (int u = 0; u < kVector; ++u) at.d[u] = 0;
      if (b.centred) take_offsets(i, z0, at.d);
      if (cluster) add_divergences<true, T>(q, c, i, log_ratio, nullptr, 0, false, at, g);
      if (q.has_ce)
        add_cross_entropy<T>(q, of_rows(kCeScale)[i], of_rows(kCeTarget)[i], of_rows(kCeSmooth)[i], j, label,
                             q.classes, at.x, g);
      store_vector(static_cast<S*>(w.out) + int64_t(rows()[i]) * q.classes, j, q.classes, w.out_vector,
                   q.storage, g);
    });
  }
};

}  // namespace cmim::cuda
