// A block at work on one class: its shared memory, its rows, and the tiles of columns it goes by.
#pragma once

#include "data.cuh"

namespace cmim::cuda {

// How a tile of columns is spread over the block: `groups` groups of `lanes` threads, kVector columns each
// thread; every group takes rows of its own.
struct Tiling {
  int lanes, groups, columns, shift;  // columns = 1 << shift

  // This thread's group, and the first of its columns in the tile
  __device__ int group() const { return opaque(int(threadIdx.x)) * kVector >> shift; }
  __device__ int column() const { return opaque(int(threadIdx.x)) * kVector & (columns - 1); }
  // Warps that have a row between them, and this thread's among these
  __device__ int warps() const { return lanes > kWarp ? lanes / kWarp : 1; }
  __device__ int warp() const { return (opaque(int(threadIdx.x)) & (lanes - 1)) / kWarp; }
};

// Threads that share a row, where every row is gone through by itself: all of them for one row, a warp each
// for many, fewer for short rows.
__device__ inline int lanes_for_rows(int rows, int columns) {
  const int vectors = power_of_two_at_least((columns + kVector - 1) / kVector);
  int lanes = kThreads / power_of_two_at_least(rows < kThreads ? rows : kThreads);
  if (lanes < kWarp) lanes = kWarp;
  return lanes < vectors ? lanes : vectors;
}

// What constants are staged for; the first four have places of their own in a small class, see Constants3.
enum StagedFor { kMeans, kCentredMeans, kUpstream, kCentredUpstream, kGradient, kShifts, kTops, kStagedFors };
constexpr int kSmallClass = kBatch / kGradient;  // rows

// Whether a row counts that is the only one of its class. Beside a cross entropy, which shows if it has no
// softmax, its divergence from itself does not.
template <class A>
__device__ inline bool counts_alone(const Problem<A>& q) {
  return q.centroids || !q.has_ce;
}

template <class T>
struct Block {
  using S = typename T::S;
  using A = typename T::A;

  const Problem<A>& q;
  const Saved<A>& saved;
  int table_bytes, chip_bytes;
  bool places;
  int first, count;  // the class: positions first .. first + count - 1
  int begin, end;    // the columns that this block looks at; `begin` is a multiple of 16 bytes
  uint64_t centred;  // mask of the temperatures that are computed in the centred form
  unsigned staged;   // which constants are there, or, of a small class, a bit for each kind that is not
  bool on_chip;      // the class's rows have been copied into shared memory
  bool powers_kept;  // and there is room for one exponential of each logit, see sum_rows()

  // `with_places`: see is_small(); false where registers are scarcest, as true costs some.
  __device__ Block(const Problem<A>& problem, const Saved<A>& s, int bytes_of_table, int bytes_of_chip,
                   bool with_places)
      : q(problem), saved(s), table_bytes(bytes_of_table), chip_bytes(bytes_of_chip), places(with_places) {
    set_class(0, 0, 0);
  }

  // The parts of shared memory. Functions, not members, so that the compiler sees what memory they are in.
  template <class V>
  __device__ static V* shared(int offset) {
    return reinterpret_cast<V*>(dynamic_shared_memory() + offset);
  }
  // Partial sums of the groups of a tile
  __device__ static A* combine() { return shared<A>(0); }
  // Numbers for each row of the batch and temperature
  __device__ static A* constants() { return shared<A>(Sizes<A>::combine); }
  // Where the rows of the batch are; their largest logits; the shifts of a centred class: (kBatch) each
  __device__ static const S** data() { return shared<const S*>(Sizes<A>::combine + Sizes<A>::constants); }
  __device__ static A* top() { return reinterpret_cast<A*>(data() + kBatch); }
  __device__ static Difference<A>* shift() { return reinterpret_cast<Difference<A>*>(top() + kBatch); }
  // kWarps * 8 numbers for reductions, what the gradient's terms are divided by, and 5 * kWarps integers
  __device__ static A* scratch() { return reinterpret_cast<A*>(shift() + kBatch); }
  __device__ static Divisors<A>* divisors() { return reinterpret_cast<Divisors<A>*>(scratch() + kWarps * 8); }
  __device__ static int* flags() { return reinterpret_cast<int*>(scratch() + kWarps * 8 + 4); }
  // Numbers for each temperature and column of the tile
  __device__ static A* table() { return shared<A>(Sizes<A>::fixed); }
  // The class's rows, -inf up to the next multiple of 16 bytes; then the exponentials of powers_kept.
  __device__ S* chip() const { return shared<S>(Sizes<A>::fixed + table_bytes); }
  __device__ int chip_stride() const {
    return ((end - begin) * int(sizeof(S)) + 15) / 16 * (16 / int(sizeof(S)));
  }
  // At a column j of begin .. end - 1, as row_data() is
  __device__ A* kept_powers(int row) const {
    return reinterpret_cast<A*>(chip() + count * chip_stride()) + row * chip_stride() - begin;
  }

  __device__ void set_class(int first_position, int rows, uint64_t mask) {
    first = first_position, count = rows, centred = mask;
    begin = 0, end = q.classes;
    on_chip = powers_kept = false;
    staged = ~0u;
  }
  __device__ int width() const { return end - begin; }  // in columns
  // What was computed from the class and its columns is computed again: registers are scarcer than additions.
  __device__ void forget() {
    first = opaque(first), count = opaque(count), begin = opaque(begin), end = opaque(end);
  }
  __device__ uint64_t every_temperature() const { return ~uint64_t(0) >> (64 - q.temperatures); }
  __device__ bool in_chunk(uint64_t mask, int k0) const {
    return (mask >> k0 & ((uint64_t(1) << T::kChunk) - 1)) != 0;
  }

  // Read again rather than kept: registers are scarcer than memory.
  __device__ int label() const { return int(q.target[saved.row[first] * q.target_stride]); }
  __device__ int64_t statistic(int row, int k) const { return int64_t(first + row) * q.padded + k; }

  // Where column 0 of a row is, or would be if it were on chip
  __device__ const S* row_data(int row) const {
    if (on_chip) return chip() + row * chip_stride() - begin;
    return static_cast<const S*>(q.logits) + saved.row[first + row] * q.row_stride;
  }
  __device__ Row<S> row_at(const S* at) const {
    if (on_chip) return {at, 1, begin + chip_stride(), true};
    return {at, q.col_stride, q.classes, q.vector4};
  }
  // Any column of a row, which may be another block's
  __device__ A logit(int row, int64_t column) const {
    const S* const data = static_cast<const S*>(q.logits) + saved.row[first + row] * q.row_stride;
    return widen(data[column * q.col_stride], q.storage);
  }

  // Copies the block's columns of the class's rows into shared memory if there is room; then a barrier.
  __device__ void bring_rows() {
    const int64_t numbers = int64_t(count) * chip_stride();
    if (numbers * int(sizeof(S)) > chip_bytes) return;
    powers_kept = T::kChain && numbers * int(sizeof(S) + sizeof(A)) <= chip_bytes;
    constexpr int per_word = 16 / int(sizeof(S));
    const int words = q.vector16 ? (end - begin) / per_word : 0, done = words * per_word;
#pragma unroll 1
    for (int row = threadIdx.x / kWarp; row < count; row += kWarps) {
      const S* const from = row_data(row);
      S* const to = chip() + row * chip_stride();
#pragma unroll 1
      for (int i = threadIdx.x % kWarp; i < words; i += kWarp)
        copy16(to + i * per_word, from + begin + i * per_word);
#pragma unroll 1
      for (int j = done + int(threadIdx.x) % kWarp; j < chip_stride(); j += kWarp) {
        if (begin + j < end)
          to[j] = from[(begin + j) * q.col_stride];
        else
          narrow(-infinity<A>(), q.storage, to[j]);
      }
    }
    wait_for_copies();
    __syncthreads();
    on_chip = true;
  }

  // Tiles with room for `numbers` of each column, of no more than `widest` lanes.
  __device__ Tiling tiling(int numbers, int widest = kThreads) const {
    const int room = table_bytes / int(sizeof(A)) / (numbers * kVector);
    const int wanted = power_of_two_at_least((width() + kVector - 1) / kVector);
    int lanes = widest;
    while (lanes > 1 && (lanes > room || lanes > wanted)) lanes /= 2;
    if (lanes < kThreads / kBatch) lanes = kThreads / kBatch;
    int shift = 0;
    while (1 << shift < lanes * kVector) ++shift;
    return {lanes, kThreads / lanes, lanes * kVector, shift};
  }

  __device__ int rows_in_batch(int row0, int rows) const { return count - row0 < rows ? count - row0 : rows; }

  // Whether every kind of constants has a place of its own, so that they are all there at the same time
  __device__ bool is_small() const { return places && count <= kSmallClass && q.padded == T::kChunk; }

  // Puts the constants of the rows row0 .. row0 + rows - 1 into shared memory: fill(position in the batch,
  // row) for each row, and each(position, row, k - k0) for each of `temperatures`. Does nothing if `what` and
  // `key`, which says of which rows and temperatures, are there. Barriers before and after.
  template <class Fill, class Each>
  __device__ void stage(StagedFor what, unsigned key, int row0, int rows, int temperatures, Fill fill,
                        Each each) {
    key = key * kStagedFors + what;
    if (is_small() ? !(staged >> what & 1) : staged == key) return;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < rows; i += kThreads) {
      data()[i] = row_data(row0 + i);
      top()[i] = saved.top[first + row0 + i];
      fill(i, row0 + i);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * temperatures; i += kThreads) {
      const int row = i / temperatures;
      each(row, row0 + row, i - row * temperatures);
    }
    staged = is_small() ? staged & ~(1u << what) : key;
    __syncthreads();
  }

  // Adds up what the groups of a tile found, mean[k][u] in each thread, for the temperatures in `wanted`:
  // to[k][column of the tile] in shared memory = finish(k, column, sum). A thread may read its own columns
  // then, the others' after a barrier.
  template <int N, class Finish>
  __device__ void combine_groups(const Tiling& t, const A (&mean)[N][kVector], unsigned wanted, A* to,
                                 Finish finish) {
    constexpr int half = N / 2;
    const int columns = opaque(t.columns);
    const int column = t.column(), group = t.group();
    if (t.groups == 1) {
      // a thread's own columns, which it puts down in between, since it cannot count through its registers
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (wanted >> k & 1) store_four(to + k * columns + column, mean[k]);
#pragma unroll 1
      for (int k = 0; k < N; ++k) {
        if (!(wanted >> k & 1)) continue;
        A four[kVector];
        load_four(to + k * columns + column, four);
#pragma unroll
        for (int u = 0; u < kVector; ++u) four[u] = finish(k, column + u, four[u]);
        store_four(to + k * columns + column, four);
      }
      return;
    }
#pragma unroll
    for (int k0 = 0; k0 < N; k0 += half) {
#pragma unroll
      for (int k = 0; k < half; ++k)
        store_four(combine() + (group * half + k) * columns + column, mean[k0 + k]);
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < half * columns; i += kThreads) {
        const int k = k0 + (i >> t.shift);
        if (!(wanted >> k & 1)) continue;
        A sum = 0;
#pragma unroll 1
        for (int g = 0; g < t.groups; ++g) sum += combine()[g * half * columns + i];
        to[k0 * columns + i] = finish(k, i & (columns - 1), sum);
      }
      __syncthreads();
    }
  }

  // Sums over columns of N numbers of each row of a batch. Every thread of a row's group comes with its part
  // of them, for row i of the batch if it is `there`; each warp leaves its part in a place of its own, or
  // adds it to what it left there. combine() holds them until collect().
  template <int N>
  __device__ void deposit(const Tiling& t, int i, bool there, A (&sum)[N], bool add) const {
    deposit_sums(sum, t.lanes, there, add, combine() + (i * t.warps() + t.warp()) * N);
  }
  // The same for the rows of a batch: visit(i, sum) adds a thread's part of row i.
  template <int N, class Visit>
  __device__ void deposit_rows(const Tiling& t, int rows, bool add, Visit visit) const {
#pragma unroll 1
    for (int i0 = 0; i0 < rows; i0 += t.groups) {
      const int i = i0 + t.group();
      A sum[N] = {};
      if (i < rows) visit(i, sum);
      deposit(t, i, i < rows, sum, add);
    }
  }
  // Sum k of row i, of what its warps have left in `parts`
  template <int N>
  __device__ static A total(const Tiling& t, const A* parts, int i, int k) {
    A sum = 0;
#pragma unroll 1
    for (int warp = 0; warp < t.warps(); ++warp) sum += parts[(i * t.warps() + warp) * N + k];
    return sum;
  }
  // finish(i, k, sum) in one thread for each. Barriers before and after.
  template <int N, class Finish>
  __device__ void collect(const Tiling& t, int rows, Finish finish) const {
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x; at < rows * N; at += kThreads) {
      const int i = at / N, k = at - i * N;
      finish(i, k, total<N>(t, combine(), i, k));
    }
    __syncthreads();
  }

  // N sums over the columns from .. to - 1 of each of the class's rows, one row after the other: visit(i, j,
  // sum) adds what row i of the batch has in the thread's columns from j on, finish(row, k, sum) comes in one
  // thread for each. Barrier after.
  template <int N, class Stage, class Visit, class Finish>
  __device__ void sum_by_rows(const Tiling& t, int from, int to, Stage stage, Visit visit, Finish finish) {
#pragma unroll 1
    for (int row0 = 0; row0 < count; row0 += kBatch) {
      const int rows = rows_in_batch(row0, kBatch);
      stage(row0, rows);
      deposit_rows<N>(t, rows, false, [&](int i, A(&sum)[N]) {
#pragma unroll 1
        for (int j = from + t.column(); j < to; j += t.columns) visit(i, row0 + i, j, sum);
      });
      collect<N>(t, rows, [&](int i, int k, A total) { finish(row0 + i, k, total); });
    }
  }

  // Goes over the columns from .. to - 1 by tiles, and in each over the class's rows, for N sums of every
  // row: tile(c0) in every thread, stage(row0, rows) for a batch of rows, visit(i, row, j, sum) adds what a
  // row has in the thread's columns from j on, finish(row, k, sum, whether it is the row's first) in one
  // thread. Barrier after.
  template <int N, class Tile, class Stage, class Visit, class Finish>
  __device__ void sum_by_tiles(const Tiling& t, int from, int to, Tile tile, Stage stage, Visit visit,
                               Finish finish) {
    const bool at_once = count <= kBatch && (t.groups == 1 || to - from <= t.columns);
#pragma unroll 1
    for (int c0 = from; c0 < to; c0 += t.columns) {
      tile(c0);
      const int j = c0 + t.column();
#pragma unroll 1
      for (int row0 = 0; row0 < count; row0 += kBatch) {
        const int rows = rows_in_batch(row0, kBatch);
        stage(row0, rows);
        deposit_rows<N>(t, rows, at_once && c0 > from, [&](int i, A(&sum)[N]) {
          if (j < to) visit(i, row0 + i, j, sum);
        });
        if (at_once && c0 + t.columns < to) continue;
        collect<N>(t, rows,
                   [&](int i, int k, A total) { finish(row0 + i, k, total, at_once || c0 == from); });
      }
    }
  }

  // Sums over columns for each of the rows 0 .. rows - 1, a group of `lanes` threads to a row: visit(row,
  // lane, sum) adds a thread's part, finish(row, k, total) comes once for each. `sums` has room for kThreads
  // * kChunk numbers of shared memory. Barrier after.
  template <class Visit, class Finish>
  __device__ void sum_over_columns(int rows, int lanes, A* sums, Visit visit, Finish finish) const {
    const int groups = kThreads / lanes, lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
    const int parts = lanes > kWarp ? lanes / kWarp : 1;  // a row's sums come from that many warps
#pragma unroll 1
    for (int i0 = 0; i0 < rows; i0 += groups) {
      A sum[T::kChunk] = {};
      if (i0 + group < rows) visit(i0 + group, lane, sum);
      deposit_sums(sum, lanes, true, false, sums + (group * parts + lane / kWarp) * T::kChunk);
      __syncthreads();
#pragma unroll 1
      for (int at = threadIdx.x; at < groups * T::kChunk; at += kThreads) {
        const int g = at / T::kChunk, k = at - g * T::kChunk;
        if (i0 + g >= rows) continue;
        A total = 0;
#pragma unroll 1
        for (int part = 0; part < parts; ++part) total += sums[(g * parts + part) * T::kChunk + k];
        finish(i0 + g, k, total);
      }
      __syncthreads();
    }
  }
};

}  // namespace cmim::cuda
