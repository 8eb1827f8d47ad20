// The centroids of a class, a tile of columns at a time, and the divergences of its rows from them.
#pragma once

#include "forms.cuh"

namespace cmim::cuda {

// The mask of the temperatures at which the class in a slot is centred, kept in two halves
template <class A>
__device__ inline void keep_mask(const Saved<A>& saved, int slot, uint64_t mask) {
  saved.centred[2 * slot] = uint32_t(mask);
  saved.centred[2 * slot + 1] = uint32_t(mask >> 32);
}

// The class in a slot, as the forward pass found it
template <class T>
__device__ inline void recall_class(Block<T>& b, int slot) {
  const uint64_t mask = b.saved.centred[2 * slot] | uint64_t(b.saved.centred[2 * slot + 1]) << 32;
  b.set_class(b.saved.first[slot], b.saved.count[slot], mask);
  __syncthreads();  // the class before this one may still be in use
}

// Parts that a class's columns are cut into, so that `items` of them are at hand, but no more than `most`
__device__ inline int parts_of_each(int items, int classes, int most) {
  const int parts = classes > 0 ? items / classes : 1;
  return parts < 1 ? 1 : parts > most ? most : parts;
}

// The columns begin .. end - 1 of one part, in tiles of at most `lanes`; `parts`: those that have columns.
// The same in every pass, since it depends on the class alone.
struct Share {
  int begin, end, lanes, parts;
};
template <class T>
__device__ inline Share share_of(const Block<T>& b, int part, int parts) {
  const int lanes = b.count >= kManyRows && parts > 1 ? kNarrowLanes : kThreads;
  const int width = b.tiling(b.q.padded, lanes).columns, tiles = (b.q.classes + width - 1) / width;
  const int each = (tiles + parts - 1) / parts;
  const int begin = part * each * width, end = begin + each * width;
  return {begin, end < b.q.classes ? end : b.q.classes, lanes, (tiles + each - 1) / each};
}

// The plain form's scale of a class, see forms.cuh. Kept where the class's first row has its growth at the
// temperatures that are centred.
template <class T>
__device__ inline typename T::A plain_scale(const Block<T>& b, int k) {
  return b.saved.growth[b.statistic(0, k)];
}
template <class T>
__device__ inline void choose_scales(const Block<T>& b) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 1
  for (int k = warp; k < q.padded; k += kWarps) {
    A total = 0;
#pragma unroll 1
    for (int row = lane; row < b.count; row += kWarp) total += b.saved.sum[b.statistic(row, k)];
    total = sum_over_warp(total);
    if (lane == 0) b.saved.growth[b.statistic(0, k)] = total / A(b.count);
  }
  __syncthreads();
}

// Where the constants of a batch lie: three numbers for each row and temperature of a chunk, then the sums.
template <class T>
struct Constants3 {
  typename T::A *weight, *loss, *level, *sums;
  __device__ Constants3(const Block<T>& b, StagedFor what)
      : weight(b.constants() + (b.is_small() ? what * (kSmallClass * T::kChunk) : 0)),
        loss(weight + kBatch * T::kChunk),
        level(loss + kBatch * T::kChunk),
        sums(b.constants() + 3 * kBatch * T::kChunk) {}
};
__device__ inline unsigned stage_key(int row0, int k0) {
  return unsigned(row0) * (kMaxTemperatures / kDirectChunk) + k0 / kDirectChunk;
}
template <class Form>
__device__ inline StagedFor staged_for(const void* upstream) {
  return StagedFor((upstream ? kUpstream : kMeans) + (Form::kForm == kCentred));
}

// Finds the first column where the class's first row is largest: b.flags()[0]. Barriers before and after.
template <class T>
__device__ inline void find_largest_column(Block<T>& b) {
  const Problem<typename T::A>& q = b.q;
  __syncthreads();
  if (threadIdx.x == 0) b.flags()[0] = q.classes - 1;
  __syncthreads();
  const typename T::A top = b.saved.top[b.first];
#pragma unroll 8
  for (int j = threadIdx.x; j < q.classes; j += kThreads)
    if (b.logit(0, j) == top) atomicMin(&b.flags()[0], j);
  __syncthreads();
}

// z[j0] - z0[j0] of row i, see forms.cuh; j0 is in flags[0]
template <class T>
__device__ inline Difference<typename T::A> shift_of(const Block<T>& b, int row) {
  return shift_between(b.logit(row, b.flags()[0]), b.logit(0, b.flags()[0]));
}

// Temperatures that a form does at a time, within a chunk: two tables take the registers of one of twice as
// many.
template <class Form, class T>
constexpr int kStep = Form::kTables == 2 ? kDirectChunk : T::kChunk;

template <class T>
__device__ inline bool in_step(uint64_t mask, int k0, int step) {
  return (mask >> k0 & ((uint64_t(1) << step) - 1)) != 0;
}

// Constants for the form's load and terms, of the chunk of k0. `upstream` null: weights of the mean; else
// (position) -> weight of the row in its class, for sum_i g_i P_i.
template <class Form, class T>
__device__ inline void stage_rows(Block<T>& b, int row0, int rows, int k0, const typename T::A* upstream) {
  using A = typename T::A;
  const StagedFor what = staged_for<Form>(upstream);
  const Constants3<T> c(b, what);
  const int first = k0 / T::kChunk * T::kChunk;
  b.stage(
      what, stage_key(row0, first), row0, rows, T::kChunk,
      [&](int i, int row) {
        if constexpr (Form::kForm == kCentred) {
          const Difference<A> shift = shift_of(b, row);
          b.shift()[i] = shift;
        }
      },
      [&](int i, int row, int k) {
        const int64_t from = b.statistic(row, first + k);
        const A g = upstream ? upstream[b.first + row] : A(1);
        const int at = i * T::kChunk + k;
        if constexpr (Form::kForm == kCentred) {
          const A growth = b.centred >> (first + k) & 1 ? b.saved.growth[from] : A(0);
          c.level[at] = growth;
          c.weight[at] = g * exp_of(-growth);
          c.loss[at] = -g * expm1_of(-growth);
        } else {
          c.weight[at] = g * (plain_scale(b, first + k) / b.saved.sum[from]);
          if constexpr (Form::kForm == kGiven) {
            c.weight[at] = A(1) / b.saved.sum[from];
            c.level[at] = log_positive(b.saved.sum[from]);
          }
        }
      });
}

// Sums of the form's mean terms over the class's rows, for those temperatures of a step that are wanted:
// to[k - k0][column of the tile] = finish(k - k0, column, sum), as combine_groups() has it.
template <class Form, class T, class Finish>
__device__ inline void sum_over_rows(Block<T>& b, const Tiling& t, int c0, int k0, uint64_t wanted,
                                     const typename T::A* upstream, typename T::A* to, Finish finish) {
  using A = typename T::A;
  constexpr int N = kStep<Form, T>;
  const Constants3<T> c(b, staged_for<Form>(upstream));
  const int group = t.group(), j = c0 + t.column(), within = k0 % T::kChunk;
  Form form;
  A mean[N][kVector] = {};
#pragma unroll 1
  for (int row0 = 0; row0 < b.count; row0 += kBatch) {
    const int rows = b.rows_in_batch(row0, kBatch);
    stage_rows<Form>(b, row0, rows, k0, upstream);
    if (j < b.end) {
#pragma unroll 1
      for (int i = group; i < rows; i += t.groups) {
        form.load(b, i, row0 + i, j, k0);
        A weight[kVector] = {}, loss[kVector] = {};  // of four temperatures
#pragma unroll
        for (int k = 0; k < N; ++k) {
          if (k % kVector == 0) {
            load_four(c.weight + i * T::kChunk + within + k, weight);
            if (Form::kForm == kCentred) load_four(c.loss + i * T::kChunk + within + k, loss);
          }
#pragma unroll
          for (int u = 0; u < kVector; ++u)
            mean[k][u] =
                form.add_mean_term(b.q, k0 + k, u, weight[k % kVector], loss[k % kVector], mean[k][u]);
          form.next();
        }
      }
    }
  }
  b.combine_groups(t, mean, unsigned(wanted >> k0), to, finish);
}

// The tables of the step k0 in the tile that starts at column c0, see forms.cuh: (step, columns) to `table`
// and, of the centred form, Q to `centroid` if that is not null. Only the temperatures in `wanted`.
template <class Form, class T>
__device__ inline void build_tables(Block<T>& b, const Tiling& t, int c0, int k0, uint64_t wanted,
                                    typename T::A* table, typename T::A* centroid) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const A n = A(b.count), per_row = A(1) / n;
  sum_over_rows<Form>(
      b, t, c0, k0, wanted, static_cast<const A*>(nullptr), table, [&](int k, int column, A sum) {
        // Divided, not multiplied by 1/n: that would be off by the same part everywhere, and so would KL.
        const A mean = divided(sum, n, per_row);
        if constexpr (Form::kForm == kCentred) {
          if (centroid) {
            const int j = c0 + column;
            A at = 0;
            if (j < b.end) {  // what a tile has beyond may be no part of this block's rows
              const int64_t from = b.on_chip ? j : j * q.col_stride;
              const A x = larger(widen(b.row_data(0)[from], q.storage) - b.saved.top[b.first], q.floor);
              at = exp_nonpositive(q.a[k0 + k] * x) / b.saved.sum[b.statistic(0, k0 + k)];
            }
            centroid[(k << t.shift) + column] = at * (A(1) + mean);
          }
          return log1p_of(mean);
        }
        return chosen(mean > A(0), log_positive(mean),
                      mean);  // keeps a NaN; a class masked throughout has P = 0
      });
}

// The tables of given centroids, of `step` temperatures from k0
template <class T>
__device__ inline void load_tables(Block<T>& b, const Tiling& t, int c0, int k0, int step,
                                   typename T::A* table, typename T::A* centroid) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const int label = b.label();
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < step << t.shift; i += kThreads) {
    const int k = k0 + (i >> t.shift), j = c0 + (i & (t.columns - 1));
    A given = 0;
    if (k < q.temperatures && j < q.classes)
      given = q.centroids[(int64_t(q.order[k]) * q.classes + label) * q.classes + j];
    table[i] = given > A(0) ? log_positive(given) : A(-1e4);  // finite: 0 * x is 0
    if (centroid) centroid[i] = given;
  }
  __syncthreads();
}

// The tiles of divergences()
template <class Form, class T>
__device__ inline Tiling tiling_for(const Block<T>& b, int widest = kThreads) {
  return b.tiling(Form::kTables == 2 ? 2 * kStep<Form, T> : b.q.padded, widest);
}

// For the rows of the class, the part of the columns begin .. end - 1 of: sum_j P t' in the plain form, else
// KL; to out[position * padded + k]. Only the temperatures in `wanted`, and others of their steps, where it
// may be anything. begin is a multiple of the tiles' columns. Barrier after.
//
// The plain form leaves its table of the last tile: (padded, columns).
template <class Form, class T>
__device__ inline void divergences(Block<T>& b, const Tiling& t, int begin, int end, uint64_t wanted,
                                   typename T::A* out) {
  using A = typename T::A;
  constexpr int N = kStep<Form, T>;
  const Problem<A>& q = b.q;
  const Constants3<T> c(b, staged_for<Form>(nullptr));
#pragma unroll 1
  for (int k0 = 0; k0 < q.padded; k0 += N) {
    if (!in_step<T>(wanted, k0, N)) continue;
    A* const table = b.table() + (Form::kTables == 2 ? 0 : k0 << t.shift);
    A* const centroids = Form::kTables == 2 ? table + (N << t.shift) : nullptr;
    const int within = k0 % T::kChunk;
    A log_ratio[N][kVector], centroid[N][kVector];
    Form form;
    b.template sum_by_tiles<N>(
        t, begin, end,
        [&](int c0) {
          if constexpr (Form::kForm == kGiven)
            load_tables(b, t, c0, k0, N, table, centroids);
          else
            build_tables<Form>(b, t, c0, k0, wanted, table, centroids);
          const int shift = opaque(t.shift);
#pragma unroll
          for (int k = 0; k < N; ++k) {
            load_four(table + (k << shift) + t.column(), log_ratio[k]);
            if (centroids) load_four(centroids + (k << shift) + t.column(), centroid[k]);
          }
        },
        [&](int row0, int rows) { stage_rows<Form>(b, row0, rows, k0, nullptr); },
        [&](int i, int row, int j, A(&sum)[N]) {
          form.load(b, i, row, j, k0);
          A weight[kVector] = {}, level[kVector] = {};
#pragma unroll
          for (int k = 0; k < N; ++k) {
            if (Form::kTables == 2 && k % kVector == 0) {
              if (Form::kForm == kGiven) load_four(c.weight + i * T::kChunk + within + k, weight);
              load_four(c.level + i * T::kChunk + within + k, level);
            }
#pragma unroll
            for (int u = 0; u < kVector; ++u)
              sum[k] = form.add_divergence_term(q, k0 + k, u, weight[k % kVector], level[k % kVector],
                                                log_ratio[k][u], centroids ? centroid[k][u] : A(0), sum[k]);
            form.next();
          }
        },
        [&](int row, int k, A sum, bool first) {
          const int64_t to = b.statistic(row, k0 + k);
          if (Form::kForm == kPlain) sum /= b.saved.sum[to];
          out[to] = first ? sum : out[to] + sum;
        });
  }
}

// The first pass of the centred form over columns begin .. end - 1: their part of sum_j P0 v for each row, to
// out[position * padded + k], where P0 is still to be divided by its sum. Returns, to every thread, the
// largest d. b.flags()[0] holds j0. Only steps with a temperature in `wanted`. Barrier after.
template <class T>
__device__ inline typename T::A centred_sums(Block<T>& b, int begin, int end, uint64_t wanted,
                                             typename T::A* out) {
  using A = typename T::A;
  constexpr int N = kStep<Centred<T>, T>;
  const Problem<A>& q = b.q;
  const Tiling t = b.tiling(1);
  A widest = 0;
#pragma unroll 1
  for (int k0 = 0; k0 < q.padded; k0 += N) {
    if (!in_step<T>(wanted, k0, N)) continue;
    A p0[N][kVector];
    Centred<T> form;
    b.template sum_by_tiles<N>(
        t, begin, end,
        [&](int c0) {
          const int j = c0 + t.column();
          if (j < end) load_vector(b.row_at(b.row_data(0)), j, q.storage, form.z0);
#pragma unroll
          for (int u = 0; u < kVector; ++u) {
            Powers<A, T::kChain> powers;
            powers.start(q, larger((j < end ? form.z0[u] : A(0)) - b.saved.top[b.first], q.floor), k0);
#pragma unroll
            for (int k = 0; k < N; ++k) {
              p0[k][u] = powers.power(q, k0 + k);
              powers.next();
            }
          }
        },
        [&](int row0, int rows) {
          b.stage(
              kShifts, stage_key(row0, 0), row0, rows, 0,
              [&](int i, int row) {
                const Difference<A> shift = shift_of(b, row);
                b.shift()[i] = shift;
              },
              [](int, int, int) {});
        },
        [&](int i, int, int j, A(&sum)[N]) {
          form.take_offsets(b, b.data()[i], j, b.shift()[i]);
          form.start(q, k0);
#pragma unroll
          for (int u = 0; u < kVector; ++u) widest = larger(widest, j + u < end ? form.d[u] : A(0));
#pragma unroll
          for (int k = 0; k < N; ++k) {
#pragma unroll
            for (int u = 0; u < kVector; ++u) sum[k] = fma(p0[k][u], form.expm1(q, k0 + k, u), sum[k]);
            form.next();
          }
        },
        [&](int row, int k, A sum, bool first) {
          const int64_t to = b.statistic(row, k0 + k);
          out[to] = first ? sum : out[to] + sum;
        });
  }
  return largest_in_group(widest, kThreads, b.scratch());
}

// Those of the temperatures at which exp(a d) is in range for every d up to `widest`
template <class T>
__device__ inline uint64_t not_too_wide(const Block<T>& b, uint64_t temperatures, typename T::A widest) {
#pragma unroll 1
  for (int k = 0; k < b.q.temperatures; ++k)
    if (!(b.q.a[k] * widest <= kWidestExponent<typename T::A>)) temperatures &= ~(uint64_t(1) << k);
  return temperatures;
}

}  // namespace cmim::cuda
