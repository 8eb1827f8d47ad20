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
  const int width = b.tiling(1, lanes).columns, tiles = (b.q.classes + width - 1) / width;
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
  __device__ explicit Constants3(const Block<T>& b)
      : weight(b.constants()),
        loss(weight + kBatch * T::kChunk),
        level(loss + kBatch * T::kChunk),
        sums(level + kBatch * T::kChunk) {}
};

enum StagedFor { kMeans, kCentredMeans, kUpstream, kCentredUpstream, kGradient, kStagedFors };
__device__ inline unsigned stage_key(int what, int row0, int k0) {
  return (unsigned(row0) * (kMaxTemperatures / kDirectChunk) + k0 / kDirectChunk) * kStagedFors + what;
}

// Finds the first column where the class's first row is largest: b.flags()[0]. Barriers before and after.
template <class T>
__device__ inline void find_largest_column(Block<T>& b) {
  const Problem<typename T::A>& q = b.q;
  __syncthreads();
  if (threadIdx.x == 0) b.flags()[0] = q.classes - 1;
  __syncthreads();
#pragma unroll 1
  for (int j = threadIdx.x; j < q.classes; j += kThreads)
    if (b.logit(0, j) == b.saved.top[b.first]) {
      atomicMin(&b.flags()[0], j);
      break;
    }
  __syncthreads();
}

// z[j0] - z0[j0] of row i, see forms.cuh; j0 is in flags[0]
template <class T>
__device__ inline Difference<typename T::A> shift_of(const Block<T>& b, int row) {
  return difference(b.logit(row, b.flags()[0]), b.logit(0, b.flags()[0]));
}

// Constants for the form's load and terms. `upstream` null: weights of the mean; else (position) -> weight of
// the row in its class, for sum_i g_i P_i.
template <class Form, class T>
__device__ inline void stage_rows(Block<T>& b, int row0, int rows, int k0, const typename T::A* upstream) {
  using A = typename T::A;
  const Constants3<T> c(b);
  b.stage(
      stage_key((upstream ? kUpstream : kMeans) + (Form::kForm == kCentred), row0, k0), row0, rows, T::kChunk,
      [&](int i, int row) {
        if constexpr (Form::kForm == kCentred) {
          const Difference<A> shift = shift_of(b, row);
          b.shift()[i] = shift;
        }
      },
      [&](int i, int row, int k) {
        const int64_t from = b.statistic(row, k0 + k);
        const A g = upstream ? upstream[b.first + row] : A(1);
        const int at = i * T::kChunk + k;
        if constexpr (Form::kForm == kCentred) {
          const A growth = b.saved.growth[from];
          c.level[at] = growth;
          c.weight[at] = g * exp_of(-growth);
          c.loss[at] = -g * expm1_of(-growth);
        } else {
          c.weight[at] = g * (plain_scale(b, k0 + k) / b.saved.sum[from]);
          if constexpr (Form::kForm == kGiven) {
            c.weight[at] = A(1) / b.saved.sum[from];
            c.level[at] = log_positive(b.saved.sum[from]);
          }
        }
      });
}

// Sums of the form's mean terms over the class's rows, for those temperatures of a chunk that are wanted:
// to[k - k0][column of the tile] = finish(k - k0, column, sum). Barrier after.
template <class Form, class T, class Finish>
__device__ inline void sum_over_rows(Block<T>& b, const Tiling& t, int c0, int k0, uint64_t wanted,
                                     const typename T::A* upstream, typename T::A* to, Finish finish) {
  using A = typename T::A;
  const Constants3<T> c(b);
  const int group = threadIdx.x / t.lanes, j = c0 + threadIdx.x % t.lanes * kVector;
  Form form;
  A mean[T::kChunk][kVector] = {};
#pragma unroll 1
  for (int row0 = 0; row0 < b.count; row0 += kBatch) {
    const int rows = b.rows_in_batch(row0, kBatch);
    stage_rows<Form>(b, row0, rows, k0, upstream);
    if (j < b.q.classes) {
#pragma unroll 1
      for (int i = group; i < rows; i += t.groups) {
        form.load(b, i, row0 + i, j, k0);
        A weight[kVector] = {}, loss[kVector] = {};  // of four temperatures
#pragma unroll
        for (int k = 0; k < T::kChunk; ++k) {
          if (k % kVector == 0) {
            load_four(c.weight + i * T::kChunk + k, weight);
            if (Form::kForm == kCentred) load_four(c.loss + i * T::kChunk + k, loss);
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

// The tables of the tile that starts at column c0, see forms.cuh: (padded, columns), for the centred form
// followed by Q if `with_centroid`. Only the temperatures in `wanted`.
template <class Form, class T>
__device__ inline void build_tables(Block<T>& b, const Tiling& t, int c0, uint64_t wanted,
                                    bool with_centroid) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const A n = A(b.count), per_row = A(1) / n;
#pragma unroll 1
  for (int k0 = 0; k0 < q.padded; k0 += T::kChunk) {
    if (!b.in_chunk(wanted, k0)) continue;
    A* const table = b.table() + (k0 << t.shift);
    sum_over_rows<Form>(
        b, t, c0, k0, wanted, static_cast<const A*>(nullptr), table, [&](int k, int column, A sum) {
          // Divided, not multiplied by 1/n: that would be off by the same part everywhere, and so would KL.
          const A mean = divided(sum, n, per_row);
          if constexpr (Form::kForm == kCentred) {
            if (with_centroid) {
              const int j = c0 + column;
              A centroid = 0;
              if (j < q.classes) {
                const int64_t from = b.on_chip ? j : j * q.col_stride;
                const A x = larger(widen(b.row_data(0)[from], q.storage) - b.saved.top[b.first], q.floor);
                centroid = exp_nonpositive(q.a[k0 + k] * x) / b.saved.sum[b.statistic(0, k0 + k)];
              }
              table[((q.padded + k) << t.shift) + column] = centroid * (A(1) + mean);
            }
            return log1p_of(mean);
          }
          return mean > A(0) ? log_positive(mean) : mean;  // keeps a NaN; a class masked throughout has P = 0
        });
  }
}

// The tables of given centroids
template <class T>
__device__ inline void load_tables(Block<T>& b, const Tiling& t, int c0) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const int label = b.label();
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < q.padded << t.shift; i += kThreads) {
    const int k = i >> t.shift, j = c0 + (i & (t.columns - 1));
    A given = 0;
    if (k < q.temperatures && j < q.classes)
      given = q.centroids[(int64_t(q.order[k]) * q.classes + label) * q.classes + j];
    b.table()[i] = given > A(0) ? log_positive(given) : A(-1e4);  // finite: 0 * x is 0
    b.table()[i + q.padded * t.columns] = given;
  }
  __syncthreads();
}

// For the rows of the class, the part of the columns begin .. end - 1 of: sum_j P t' in the plain form, else
// KL; to out[position * padded + k]. Only the temperatures in `wanted`, and others of their chunks, where it
// may be anything. begin is a multiple of the tiles' columns. Barrier after.
template <class Form, class T>
__device__ inline void divergences(Block<T>& b, const Tiling& t, int begin, int end, uint64_t wanted,
                                   typename T::A* out) {
  using A = typename T::A;
  const Problem<A>& q = b.q;
  const Constants3<T> c(b);
#pragma unroll 1
  for (int c0 = begin; c0 < end; c0 += t.columns) {
    if constexpr (Form::kForm == kGiven)
      load_tables(b, t, c0);
    else
      build_tables<Form>(b, t, c0, wanted, true);
    const int columns = end - c0 < t.columns ? end - c0 : t.columns;
#pragma unroll 1
    for (int row0 = 0; row0 < b.count; row0 += kBatch) {
      const int rows = b.rows_in_batch(row0, kBatch), lanes = lanes_for_rows(rows, columns);
#pragma unroll 1
      for (int k0 = 0; k0 < q.padded; k0 += T::kChunk) {
        if (!b.in_chunk(wanted, k0)) continue;
        stage_rows<Form>(b, row0, rows, k0, nullptr);
        b.sum_over_columns(
            rows, lanes, c.sums,
            [&](int i, int lane, A(&sum)[T::kChunk]) {
              Form form;
#pragma unroll 1
              for (int column = lane * kVector; column < columns; column += lanes * kVector) {
                form.load(b, i, row0 + i, c0 + column, k0);
#pragma unroll
                for (int k = 0; k < T::kChunk; ++k) {
                  const A* const table = b.table() + ((k0 + k) << t.shift) + column;
                  A log_ratio[kVector], centroid[kVector] = {};
                  load_four(table, log_ratio);
                  if (Form::kTables == 2) load_four(table + (q.padded << t.shift), centroid);
                  const A weight = c.weight[i * T::kChunk + k], level = c.level[i * T::kChunk + k];
#pragma unroll
                  for (int u = 0; u < kVector; ++u)
                    sum[k] = form.add_divergence_term(q, k0 + k, u, weight, level, log_ratio[u], centroid[u],
                                                      sum[k]);
                  form.next();
                }
              }
            },
            [&](int i, int k, A sum) {
              const int64_t to = b.statistic(row0 + i, k0 + k);
              if (Form::kForm == kPlain) sum /= b.saved.sum[to];
              out[to] = c0 == begin ? sum : out[to] + sum;
            });
      }
    }
  }
}

}  // namespace cmim::cuda
