// The gradient of a class's rows, a tile of columns at a time:
//
//   dL/dz_ij = sum_k c_ik exp(a_k x_ij) (t_kij - KL_ik)  +  the cross entropy's
//
// with c_ik = upstream * weight * a_k / sum. Where the temperatures are powers of one, written as polynomials
// in exp(unit x_ij), whose coefficients are linear in x_ij, that is three fused multiply-adds for each
// temperature; in a class with centred temperatures they are linear in x_ij and d_ij, and four. The
// coefficients have c_ik in them, so that t - KL is off by a rounding of t: too much at cold temperatures,
// whose P is one-hot and t = KL. Their grids take the other way (launch.cpp), where c_ik comes last.
//
// Where every row has an upstream gradient g_i of its own (reduction "none"), t - KL becomes h - sum_m P_m
// h_m with h_j = g_i t_j - rho_j and rho_j = sum_m g_m P_mj / (n Q_j). A constant added to rho changes
// nothing, so g_m is taken less its mean over the class; then rho is small in collapsed classes, and exact to
// rounding.
#pragma once

#include "entropy.cuh"
#include "group.cuh"

namespace cmim::cuda {

// What multiplies KL_k in the loss, upstream included, but for g_i
template <class A>
__device__ inline A divergence_scale(const Problem<A>& q, const Divisors<A>& by, const Backward<A>& w,
                                     int k) {
  if (q.reduction == kSpectrum) return upstream_of(w, q.order[k] * w.grad_stride) / by.rows;
  const A scale = q.cmi_weight * q.weight[k];
  if (q.reduction == kNone) return scale;
  return scale * upstream_of(w, 0) / (q.reduction == kMean ? by.rows : A(1));
}
// What the parts of a row's gradient are multiplied by
template <class A>
struct Coefficients {
  A* parts;                             // (rows, padded, 4) the table, x unit, d and 1
  A* each;                              // (rows, padded) upstream of the temperature * a / sum
  A *ce_scale, *ce_target, *ce_smooth;  // (kBatch)
  A* upstream;                          // (kBatch) g_i
  int rows;
};
// One exponential for each temperature: the table's is -1, and its place holds sum_m P_m rho_m.
enum Part { kOfTable, kOfX, kOfD, kConstant, kDot = kOfTable };

template <class T>
__device__ inline Coefficients<typename T::A> coefficients(const Block<T>& b) {
  using A = typename T::A;
  Coefficients<A> c;
  const int room = Sizes<A>::constants / int(sizeof(A)) - 4 * kBatch;
  c.rows = room / (5 * b.q.padded) < kBatch ? room / (5 * b.q.padded) : kBatch;
  c.parts = b.constants();
  if (b.is_small()) c.rows = kSmallClass, c.parts = Constants3<T>(b, kMeans).sums;
  c.each = c.parts + 4 * c.rows * b.q.padded;
  c.ce_scale = b.constants() + room, c.ce_target = c.ce_scale + kBatch, c.ce_smooth = c.ce_target + kBatch;
  c.upstream = c.ce_smooth + kBatch;
  return c;
}

// What multiplies the terms of row and temperature, to `parts`; returns c_ik but for g_i. `level`: growth in
// the centred form, log sum where centroids are given.
template <class T, class A = typename T::A>
__device__ inline A gradient_parts(const Block<T>& b, const Divisors<A>& by, const Backward<A>& w, int k,
                                   A row_sum, A divergence, A level, A g, A dot, A (&parts)[4]) {
  const Problem<A>& q = b.q;
  const A each = divergence_scale(q, by, w, k) * q.a[k] / row_sum;
  const A scale = T::kChain ? each * g : A(1);
  const bool centred = b.centred >> k & 1;
  parts[kOfX] = centred ? A(0) : scale * q.multiple[k];
  parts[kOfD] = centred ? scale * q.a[k] : A(0);
  parts[kOfTable] = T::kChain ? -scale : dot;
  parts[kConstant] = T::kChain ? each * dot - scale * (level + divergence) : -(level + divergence);
  return each;
}

template <class T>
__device__ inline void stage_gradient(Block<T>& b, const Backward<typename T::A>& w,
                                      const Coefficients<typename T::A>& c, int row0, int rows) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const Divisors<A>& by = *b.divisors();
  const auto upstream = [&](int row) {
    return q.reduction == kNone ? w.grad[b.saved.row[b.first + row] * w.grad_stride] : A(1);
  };
  b.stage(
      kGradient, stage_key(row0, 0), row0, rows, q.padded,
      [&](int i, int row) {
        if (b.centred) {
          const Difference<A> shift = shift_of(b, row);
          b.shift()[i] = shift;
        }
        const A g = upstream(row);
        const CrossEntropyParts<A> ce = cross_entropy_parts(b, by, w, b.saved.ce_sum[b.first + row], g);
        c.ce_scale[i] = ce.scale, c.ce_target[i] = ce.target, c.ce_smooth[i] = ce.smooth;
        c.upstream[i] = g;
      },
      [&](int i, int row, int k) {
        const int64_t from = b.statistic(row, k);
        const int at = i * q.padded + k;
        A parts[4] = {}, each = 0;
        if (k < q.temperatures) {  // nothing was computed beyond
          const A g = upstream(row), row_sum = b.saved.sum[from];
          const A level = b.centred >> k & 1 ? b.saved.growth[from]
                          : q.centroids      ? log_positive(row_sum)
                                             : A(0);
          each = gradient_parts(b, by, w, k, row_sum, b.saved.divergence[from], level, g,
                                q.reduction == kNone && !q.centroids ? w.dots[from] : A(0), parts);
          if (!T::kChain && q.centroids) each *= g;
        }
        store_four(c.parts + 4 * at, parts);
        c.each[at] = each;
      });
}

// The divisors of a batch that the gradient's kernel finds itself, to b.divisors(); thread 0 has put the
// number of rows there.
template <class T>
__device__ inline void find_divisors(const Block<T>& b) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  A sums[2] = {};
  if (q.class_weight) {
#pragma unroll 1
    for (int i = threadIdx.x; i < q.rows; i += kThreads) {
      const int64_t label = target_at(q, i);
      if (kept(q, label)) sums[0] += q.class_weight[label];
    }
#pragma unroll 1
    for (int j = threadIdx.x; q.smoothing > A(0) && j < q.classes; j += kThreads)
      sums[1] += q.class_weight[j];
    sum_group(sums, kThreads, b.scratch());
  }
  if (threadIdx.x != 0) return;
  b.divisors()->weights = q.class_weight ? sums[0] : b.divisors()->rows;
  b.divisors()->smoothing = q.class_weight ? sums[1] : A(q.classes);
}

// The logarithm of the smallest normal number
template <class A>
constexpr A kVanishedLog = sizeof(A) == 4 ? A(-87.336) : A(-708.396);

// The tables of the tile: log-ratio tables by each temperature's form and, if `with_rho`, rho into the
// second. A thread may read its own columns then, the others' after a barrier.
template <class T>
__device__ inline void build_gradient_tables(Block<T>& b, const Tiling& t, int c0, bool with_rho,
                                             const typename T::A* upstream) {
  using A = typename T::A;
  const auto build = [&](auto form, uint64_t wanted) {
    using F = decltype(form);
#pragma unroll 1
    for (int k0 = 0; k0 < b.q.padded; k0 += kStep<F, T>) {
      if (!in_step<T>(wanted, k0, kStep<F, T>)) continue;
      A* const table = b.table() + (k0 << t.shift);
      build_tables<F>(b, t, c0, k0, wanted, table, static_cast<A*>(nullptr));
      if (with_rho)
        sum_over_rows<F>(b, t, c0, k0, wanted, upstream, table + (b.q.padded << t.shift),
                         [&](int k, int column, A sum) {
                           // where the mean vanished, so have all its P, which multiply this
                           const A log_mean = table[(k << t.shift) + column];
                           return log_mean < kVanishedLog<A> ? A(0) : sum * exp_of(-log_mean) / A(b.count);
                         });
    }
  };
  build(Plain<T>(), b.every_temperature() & ~b.centred);
  build(Centred<T>(), b.centred);
}

// What lies beyond the last temperature has coefficients of zero, and must be finite.
template <class T>
__device__ inline void clear_padding(const Block<T>& b, const Tiling& t, int tables) {
  const typename T::A zero[kVector] = {};
#pragma unroll 1
  for (int table = 0; table < tables; ++table)
#pragma unroll 1
    for (int k = b.q.temperatures + t.group(); k < b.q.padded; k += t.groups)
      store_four(b.table() + ((table * b.q.padded + k) << t.shift) + t.column(), zero);
  if (t.groups > 1 && b.q.temperatures < b.q.padded) __syncthreads();
}

// Temperatures that follow from one exponential; its rounding counts fourfold at most.
constexpr int kRun = 4;
// Up to so many powers, the table of a thread's columns is in registers.
constexpr int kFew = 8;

// What is known of a row in a thread's columns: x = logit - top, d of the centred form, exp(unit x) of a
// chain
template <class A>
struct Columns {
  A x[kVector], d[kVector], first[kVector];
};

// g += the divergences' part, for one row. `log_ratio`: the table at the thread's columns, where it is in
// registers.
template <bool kTableInRegisters, class T>
__device__ inline void add_divergences(const Problem<typename T::A>& q, const Coefficients<typename T::A>& c,
                                       int i, const typename T::A (&log_ratio)[kFew][kVector],
                                       const typename T::A* table, int columns, bool with_rho,
                                       const Columns<typename T::A>& at, typename T::A (&g)[kVector]) {
  using A = typename T::A;
  A y[kVector];
#pragma unroll
  for (int u = 0; u < kVector; ++u) y[u] = at.x[u] * q.unit;
  const auto run = [&](int k0) {
    A sum[kVector] = {};
#pragma unroll
    for (int m = kRun - 1; m >= 0; --m) {
      const int k = k0 + m, from = i * q.padded + k;
      A parts[4], ratio[kVector];
      load_four(c.parts + 4 * from, parts);
      if constexpr (kTableInRegisters) {
#pragma unroll
        for (int u = 0; u < kVector; ++u) ratio[u] = log_ratio[k % kFew][u];
      } else {
        load_four(table + k * columns, ratio);
      }
#pragma unroll
      for (int u = 0; u < kVector; ++u) {
        if constexpr (T::kChain) {
          A value = fma(parts[kOfTable], ratio[u], fma(parts[kOfX], y[u], parts[kConstant]));
          value = fma(parts[kOfD], at.d[u], value);
          if (!kTableInRegisters && with_rho)
            value = fma(-c.each[from], table[(q.padded + k) * columns + u], value);
          sum[u] = fma(sum[u], at.first[u], value);
        } else {
          A value = fma(parts[kOfX], y[u], -ratio[u]);
          value = fma(parts[kOfD], at.d[u], value);
          value += parts[kConstant];  // t - KL: nothing is left where t is KL
          if (!kTableInRegisters && with_rho)
            value = fma(c.upstream[i], value, parts[kDot] - table[(q.padded + k) * columns + u]);
          g[u] = fma(exp_nonpositive(product(q.a[k], at.x[u])) * c.each[from], value, g[u]);
        }
      }
    }
    if constexpr (T::kChain)
#pragma unroll
      for (int u = 0; u < kVector; ++u)
        g[u] =
            fma(sum[u], q.multiple[k0] == A(1) ? at.first[u] : exp_nonpositive(q.multiple[k0] * y[u]), g[u]);
  };
  if constexpr (kTableInRegisters) {
    run(0);
    run(kRun);
  } else {
#pragma unroll 1
    for (int k0 = 0; k0 < q.padded; k0 += kRun) run(k0);
  }
}

// The gradient of the class's rows in a share of the columns, with b.divisors(). `cluster`: its divergences
// count. `at_hand`: the tables of the share's one tile are what the plain form's divergences left.
template <class T>
__device__ inline void class_gradient(Block<T>& b, const Backward<typename T::A>& w, const Share& share,
                                      bool cluster, bool with_rho, bool at_hand) {
  using A = typename T::A;
  using S = typename T::S;
  const Problem<A>& q = b.q;
  if (!cluster) return cross_entropy_gradient(b, w, share);
  const Tiling t = b.tiling((with_rho || q.centroids ? 2 : 1) * q.padded, share.lanes);
  const Coefficients<A> c = coefficients(b);
  const int label = b.label();
  const bool few = T::kChain && q.padded == kFew && !with_rho;
#pragma unroll 1
  for (int c0 = share.begin; c0 < share.end; c0 += t.columns) {
    if (q.centroids)
      load_tables(b, t, c0, 0, q.padded, b.table(), static_cast<A*>(nullptr));
    else if (!at_hand)
      build_gradient_tables(b, t, c0, with_rho, w.upstream);
    if (!q.centroids) clear_padding(b, t, with_rho ? 2 : 1);
    const A* const table = b.table() + t.column();
    const int j = c0 + t.column();
    A log_ratio[kFew][kVector] = {};
    const int shift = opaque(t.shift);
    if constexpr (T::kChain) {
#pragma unroll
      for (int k = 0; k < kFew; ++k)
        if (few) load_four(table + (k << shift), log_ratio[k]);
    }
#pragma unroll 1
    for (int row0 = 0; row0 < b.count; row0 += c.rows) {
      const int rows = b.rows_in_batch(row0, c.rows);
      stage_gradient(b, w, c, row0, rows);
      if (j >= share.end) continue;
#pragma unroll 1
      for (int i = t.group(); i < rows; i += t.groups) {
        Columns<A> at;
        A z[kVector], g[kVector] = {};
        load_vector(b.row_at(b.data()[i]), j, q.storage, z);
#pragma unroll
        for (int u = 0; u < kVector; ++u) at.x[u] = larger(z[u] - b.top()[i], q.floor), at.d[u] = 0;
        if constexpr (T::kChain) first_powers(b, row0 + i, j, at.x, at.first);
        if (b.centred) {
          A z0[kVector];
          load_vector(b.row_at(b.row_data(0)), j, q.storage, z0);
#pragma unroll
          for (int u = 0; u < kVector; ++u) at.d[u] = offset(z[u], z0[u], b.shift()[i]);
        }
        if (few)
          add_divergences<T::kChain, T>(q, c, i, log_ratio, table, t.columns, with_rho, at, g);
        else
          add_divergences<false, T>(q, c, i, log_ratio, table, t.columns, with_rho, at, g);
        if (q.has_ce)
          add_cross_entropy<T>(q, c.ce_scale[i], c.ce_target[i], c.ce_smooth[i], j, label, share.end, at.x,
                               g);
        S* const to = static_cast<S*>(w.out) + int64_t(b.saved.row[b.first + row0 + i]) * q.classes;
        store_vector(to, j, share.end, w.out_vector, q.storage, g);
      }
    }
  }
}

// Rows outside every class: zero if ignored, NaN if the label is out of range. Shared out over the grid; each
// thread looks at a label of its own, for there are many and few of them concern anyone, and each warp writes
// the rows that it found.
template <class T>
__device__ inline void other_rows_gradient(const Problem<typename T::A>& q,
                                           const Backward<typename T::A>& w) {
  using A = typename T::A;
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int64_t i0 = blockIdx.x; i0 < q.rows; i0 += int64_t(gridDim.x) * kThreads) {
    const int64_t mine = i0 + int64_t(gridDim.x) * threadIdx.x;
    unsigned others = __ballot_sync(kEveryLane, mine < q.rows && !kept(q, target_at(q, int(mine))));
#pragma unroll 1
    for (int64_t i = mine - int64_t(gridDim.x) * lane; others != 0; i += gridDim.x, others >>= 1) {
      if ((others & 1) == 0) continue;
      const A value = target_at(q, int(i)) == q.ignore_index ? A(0) : not_a_number<A>();
      const A g[kVector] = {value, value, value, value};
      auto* const to = static_cast<typename T::S*>(w.out) + i * q.classes;
#pragma unroll 1
      for (int j = lane * kVector; j < q.classes; j += kWarp * kVector)
        store_vector(to, j, q.classes, w.out_vector, q.storage, g);
    }
  }
}

// kept times the upstream gradient, to out
template <class T>
__device__ inline void scale_kept(const Problem<typename T::A>& q, const Backward<typename T::A>& w) {
  using S = typename T::S;
  using A = typename T::A;
  const A g = *w.grad;
  const int64_t count = int64_t(q.rows) * q.classes;
  const S* const from = static_cast<const S*>(w.kept);
  S* const to = static_cast<S*>(w.out);
  const bool vector = reinterpret_cast<uintptr_t>(from) % alignof(Vector<S>) == 0 && w.out_vector;
#pragma unroll 1
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVector; i < count;
       i += int64_t(gridDim.x) * kThreads * kVector) {
    const int left = count - i < kVector ? int(count - i) : kVector;
    A v[kVector];
    load_vector(Row<S>{from + i, 1, left, vector}, 0, q.storage, v);
#pragma unroll
    for (int u = 0; u < kVector; ++u) v[u] *= g;
    store_vector(to + i, 0, left, vector, q.storage, v);
  }
}

}  // namespace cmim::cuda
