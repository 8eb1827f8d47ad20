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

#include "cluster.cuh"

namespace cmim::cuda {

// What multiplies KL_k and CE in the loss, upstream included, but for g_i
template <class A>
__device__ inline A upstream_of(const Backward<A>& w, int64_t at) {
  return w.grad ? w.grad[at] : A(1);
}
template <class A>
__device__ inline A divergence_scale(const Problem<A>& q, const Divisors<A>& by, const Backward<A>& w,
                                     int k) {
  if (q.reduction == kSpectrum) return upstream_of(w, q.order[k] * w.grad_stride) / by.rows;
  const A scale = q.cmi_weight * q.weight[k];
  if (q.reduction == kNone) return scale;
  return scale * upstream_of(w, 0) / (q.reduction == kMean ? by.rows : A(1));
}
template <class A>
__device__ inline A cross_entropy_scale(const Problem<A>& q, const Divisors<A>& by, const Backward<A>& w) {
  if (q.reduction == kNone) return q.ce_weight;
  return q.ce_weight * upstream_of(w, 0) / (q.reduction == kMean ? by.weights : A(1));
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
  c.each = c.parts + 4 * c.rows * b.q.padded;
  c.ce_scale = b.constants() + room, c.ce_target = c.ce_scale + kBatch, c.ce_smooth = c.ce_target + kBatch;
  c.upstream = c.ce_smooth + kBatch;
  return c;
}

// `cluster`: the class's divergences count.
template <class T>
__device__ inline void stage_gradient(Block<T>& b, const Backward<typename T::A>& w,
                                      const Coefficients<typename T::A>& c, int row0, int rows,
                                      bool cluster) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const Divisors<A>& by = *b.divisors();
  b.stage(
      stage_key(kGradient, row0, 0), row0, rows, cluster ? q.padded : 0,
      [&](int i, int row) {
        const int position = b.first + row;
        const A g = q.reduction == kNone ? w.grad[b.saved.row[position] * w.grad_stride] : A(1);
        if (b.centred) {
          const Difference<A> shift = shift_of(b, row);
          b.shift()[i] = shift;
        }
        const A scale = q.has_ce ? cross_entropy_scale(q, by, w) * g : A(0);
        const A hard = scale * (A(1) - q.smoothing) * (q.class_weight ? q.class_weight[b.label()] : A(1));
        const A smooth = scale * q.smoothing / A(q.classes);
        const A both = q.smoothing > A(0) ? fma(smooth, by.smoothing, hard) : hard;
        c.ce_scale[i] = q.has_ce ? both / b.saved.ce_sum[position] : A(0);
        c.ce_target[i] = hard;
        c.ce_smooth[i] = smooth;
        c.upstream[i] = g;
      },
      [&](int i, int row, int k) {
        const int64_t from = b.statistic(row, k);
        const int at = i * q.padded + k;
        A parts[4] = {};
        if (k >= q.temperatures) {  // nothing was computed there
          store_four(c.parts + 4 * at, parts);
          c.each[at] = 0;
          return;
        }
        const A row_sum = b.saved.sum[from], divergence = b.saved.divergence[from];
        const A g = q.reduction == kNone ? w.grad[b.saved.row[b.first + row] * w.grad_stride] : A(1);
        const A dot = q.reduction == kNone && !q.centroids ? w.dots[from] : A(0);
        const A each = divergence_scale(q, by, w, k) * q.a[k] / row_sum;
        const A scale = T::kChain ? each * g : A(1);
        const bool centred = b.centred >> k & 1;
        const A level = centred ? b.saved.growth[from] : q.centroids ? log_positive(row_sum) : A(0);
        parts[kOfX] = centred ? A(0) : scale * q.multiple[k];
        parts[kOfD] = centred ? scale * q.a[k] : A(0);
        if constexpr (T::kChain) {
          parts[kOfTable] = -scale;
          parts[kConstant] = each * dot - scale * (level + divergence);
        } else {
          parts[kDot] = dot;
          parts[kConstant] = -(level + divergence);
        }
        store_four(c.parts + 4 * at, parts);
        c.each[at] = !T::kChain && q.centroids ? each * g : each;
      });
}

// The tables of the tile: log-ratio tables by each temperature's form and, if `with_rho`, rho into the
// second.
template <class T>
__device__ inline void build_gradient_tables(Block<T>& b, const Tiling& t, int c0, bool with_rho,
                                             const typename T::A* upstream) {
  using A = typename T::A;
  const uint64_t all = b.every_temperature();
  A* const rho = b.table() + (b.q.padded << t.shift);
  const auto build = [&](auto form, uint64_t wanted) {
    using F = decltype(form);
    build_tables<F>(b, t, c0, wanted, false);
#pragma unroll 1
    for (int k0 = 0; with_rho && k0 < b.q.padded; k0 += T::kChunk) {
      if (!b.in_chunk(wanted, k0)) continue;
      const int from = k0 << t.shift;
      sum_over_rows<F>(b, t, c0, k0, wanted, upstream, rho + from, [&](int k, int column, A sum) {
        return sum * exp_of(-b.table()[from + (k << t.shift) + column]) / A(b.count);
      });
    }
  };
  build(Plain<T>(), all & ~b.centred);
  build(Centred<T>(), b.centred);
}

// What lies beyond the last temperature has coefficients of zero, and must be finite.
template <class T>
__device__ inline void clear_padding(const Block<T>& b, const Tiling& t, int tables) {
#pragma unroll 1
  for (int table = 0; table < tables; ++table)
#pragma unroll 1
    for (int i = (b.q.temperatures << t.shift) + opaque(int(threadIdx.x)); i < b.q.padded << t.shift;
         i += kThreads)
      b.table()[(table * b.q.padded << t.shift) + i] = 0;
}

// `kMixed`: there are centred temperatures. g += the divergences' part, for one row and kVector columns; base
// = exp(unit x) of a chain
template <bool kMixed, class T>
__device__ inline void add_divergences(const Problem<typename T::A>& q, const Coefficients<typename T::A>& c,
                                       int i, const typename T::A* table, int columns, bool with_rho,
                                       const typename T::A (&x)[kVector], const typename T::A (&d)[kVector],
                                       const typename T::A (&base)[kVector], typename T::A (&g)[kVector]) {
  using A = typename T::A;
  A y[kVector];
#pragma unroll
  for (int u = 0; u < kVector; ++u) y[u] = x[u] * q.unit;
  constexpr int run =
      4;  // temperatures that follow from one exponential; its rounding counts fourfold at most
#pragma unroll 1
  for (int k0 = 0; k0 < q.padded; k0 += run) {
    A sum[kVector] = {};
#pragma unroll
    for (int m = run - 1; m >= 0; --m) {
      const int k = k0 + m, at = i * q.padded + k;
      A parts[4], log_ratio[kVector];
      load_four(c.parts + 4 * at, parts);
      load_four(table + k * columns, log_ratio);
#pragma unroll
      for (int u = 0; u < kVector; ++u) {
        if constexpr (T::kChain) {
          A value = fma(parts[kOfTable], log_ratio[u], fma(parts[kOfX], y[u], parts[kConstant]));
          if (kMixed) value = fma(parts[kOfD], d[u], value);
          if (with_rho) value = fma(-c.each[at], table[(q.padded + k) * columns + u], value);
          sum[u] = fma(sum[u], base[u], value);
        } else {
          A value = fma(parts[kOfX], y[u], -log_ratio[u]);
          if (kMixed) value = fma(parts[kOfD], d[u], value);
          value += parts[kConstant];  // t - KL: nothing is left where t is KL
          if (with_rho) value = fma(c.upstream[i], value, parts[kDot] - table[(q.padded + k) * columns + u]);
          g[u] = fma(exp_nonpositive(product(q.a[k], x[u])) * c.each[at], value, g[u]);
        }
      }
    }
    if constexpr (T::kChain)
#pragma unroll
      for (int u = 0; u < kVector; ++u)
        g[u] = fma(sum[u], q.multiple[k0] == A(1) ? base[u] : exp_nonpositive(q.multiple[k0] * y[u]), g[u]);
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
  const Tiling t = b.tiling(with_rho || q.centroids ? 2 : 1, share.lanes);
  const Coefficients<A> c = coefficients(b);
  const int label = b.label();
#pragma unroll 1
  for (int c0 = share.begin; c0 < share.end; c0 += t.columns) {
    if (cluster && q.centroids) load_tables(b, t, c0);
    if (cluster && !q.centroids && !at_hand) build_gradient_tables(b, t, c0, with_rho, w.upstream);
    if (cluster && !q.centroids) clear_padding(b, t, with_rho ? 2 : 1);
    const int columns = share.end - c0 < t.columns ? share.end - c0 : t.columns;
#pragma unroll 1
    for (int row0 = 0; row0 < b.count; row0 += c.rows) {
      const int rows = b.rows_in_batch(row0, c.rows);
      stage_gradient(b, w, c, row0, rows, cluster);
      const int lanes = lanes_for_rows(rows, columns);
#pragma unroll 1
      for (int i = threadIdx.x / lanes; i < rows; i += kThreads / lanes) {
        S* const to = static_cast<S*>(w.out) + int64_t(b.saved.row[b.first + row0 + i]) * q.classes;
#pragma unroll 1
        for (int column = threadIdx.x % lanes * kVector; column < columns; column += lanes * kVector) {
          const int j = c0 + column;
          A z[kVector], x[kVector], d[kVector] = {}, g[kVector] = {};
          load_vector(b.row_at(b.data()[i]), j, q.storage, z);
#pragma unroll
          for (int u = 0; u < kVector; ++u) x[u] = larger(z[u] - b.top()[i], q.floor);
          if (cluster) {
            A base[kVector];
            if constexpr (T::kChain) first_powers(b, row0 + i, j, x, base);
            if (b.centred) {
              A z0[kVector];
              load_vector(b.row_at(b.row_data(0)), j, q.storage, z0);
#pragma unroll
              for (int u = 0; u < kVector; ++u) d[u] = offset(z[u], z0[u], b.shift()[i]);
              add_divergences<true, T>(q, c, i, b.table() + column, t.columns, with_rho, x, d, base, g);
            } else {
              add_divergences<false, T>(q, c, i, b.table() + column, t.columns, with_rho, x, d, base, g);
            }
          }
          if (q.has_ce) {
#pragma unroll
            for (int u = 0; u < kVector;
                 ++u)  // first its own terms, whose difference may be small beside either
              g[u] += fma(c.ce_scale[i], exp_nonpositive(x[u]), j + u == label ? -c.ce_target[i] : A(0));
            if (q.smoothing > A(0))
              for (int u = 0; u < kVector && j + u < share.end; ++u)
                g[u] -= c.ce_smooth[i] * (q.class_weight ? q.class_weight[j + u] : A(1));
          }
          store_vector(to, j, share.end, w.out_vector, q.storage, g);
        }
      }
    }
  }
}

// Rows outside every class: zero if ignored, NaN if the label is out of range. Shared out over the grid.
template <class T>
__device__ inline void other_rows_gradient(const Problem<typename T::A>& q,
                                           const Backward<typename T::A>& w) {
  using A = typename T::A;
#pragma unroll 1
  for (int i = blockIdx.x; i < q.rows; i += gridDim.x) {
    const int64_t label = q.target[i * q.target_stride];
    const bool ignored = label == q.ignore_index;
    if (!ignored && label >= 0 && label < q.classes) continue;
    const A value = ignored ? A(0) : not_a_number<A>();
    const A g[kVector] = {value, value, value, value};
    auto* const to = static_cast<typename T::S*>(w.out) + int64_t(i) * q.classes;
#pragma unroll 1
    for (int j = threadIdx.x * kVector; j < q.classes; j += kThreads * kVector)
      store_vector(to, j, q.classes, w.out_vector, q.storage, g);
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
