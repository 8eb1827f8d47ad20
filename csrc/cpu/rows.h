// What every way of computing a cluster shares: its scratch arrays, tiles of columns, exponentials at every
// temperature, the scales of each row, and what is reported of it.
#pragma once

#include <type_traits>

#include "elementary.h"
#include "lanes.h"
#include "problem.h"
#include "row.h"
#include "simd.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

// Columns of a tile, fewer where many rows share the first-level cache. By bytes: what each row of a tile
// takes beside its vectors is the same for narrow ones.
constexpr int kTileVectors = 1024 / kVectorBytes;
constexpr int64_t kTileBytes = 32 << 10;
// Rows that are summed before their sum joins the centroid's: rounding does not build up
constexpr int kSumBlock = 16;
constexpr int kFlushTiles = kFlushVectors / kTileVectors;
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
  if (K & 4) f(Constant<4>{}, k), k += 4;
  if (K & 2) f(Constant<2>{}, k), k += 2;
  if (K & 1) f(Constant<1>{}, k);
}

// f(the smallest power of two up to 16 that is as many as the first temperatures, or all 16, as a constant)
template <class F>
CMIM_INLINE void in_one_chunk(int K, F&& f) {
  if (K > 8) return f(Constant<16>{});
  if (K > 4) return f(Constant<8>{});
  if (K > 2) return f(Constant<4>{});
  if (K > 1) return f(Constant<2>{});
  f(Constant<1>{});
}

// How many chunks there are before the one that begins with temperature k0; of all, with k0 = K
inline int chunks_before(int k0, int K) {
  const int whole = K / 8 * 8;
  return k0 < whole ? k0 / 8 : whole / 8 + __builtin_popcount(unsigned(k0 - whole));
}

template <class T, class V>
CMIM_INLINE V power(V x, int p) {  // p >= 1
  while ((p & 1) == 0) x = x * x, p >>= 1;
  V y = x;
  while (p >>= 1) {
    x = x * x;
    if (p & 1) y = y * x;
  }
  return y;
}

// The sum of a power of two of vectors, by pairs: it rounds less often than one after the other
template <class T, int N>
CMIM_INLINE Vec<T> sum_pairs(const Vec<T> (&v)[N]) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vec<T> half[N / 2];
    for (int n = 0; n < N / 2; ++n) half[n] = v[2 * n] + v[2 * n + 1];
    return sum_pairs<T, N / 2>(half);
  }
}
// sum_k q_k v_k for k = 0, 1, ... in this order, by pairs
template <class T, int N>
struct SumOfProducts {
  Vec<T> part[(N + 1) / 2];
  template <class Q>
  CMIM_INLINE void add(int k, Q q, Vec<T> v) {
    if (k % 2 == 0)
      part[k / 2] = q * v;
    else
      part[k / 2] += q * v;
  }
  CMIM_INLINE Vec<T> total() const { return sum_pairs<T, (N + 1) / 2>(part); }
};
// sum_k q(k) x^k for N of them, in two chains: x2 = x x
template <class T, int N, class F>
CMIM_INLINE Vec<T> polynomial(Vec<T> x, Vec<T> x2, F&& q) {
  if constexpr (N == 1) {
    return q(0);
  } else {
    Vec<T> even = q(N - 2), odd = q(N - 1);
    for (int k = N - 4; k >= 0; k -= 2) even = even * x2 + q(k), odd = odd * x2 + q(k + 1);
    return odd * x + even;
  }
}

// Where a pass has exp(a_k x) from, at every temperature.
enum class Source {
  chain,   // powers of exp(base x), a_k = (power0 + k) base: from E, (n, Cp)
  stored,  // computed once per cluster, as powers where the grid has a base: E is (n, Cp / W, K, W)
  direct,  // computed at each use from X, (n, Cp), where storing them would leave the second-level cache
};
template <class T>
Source choose_source(const Job& job, const Cluster& cluster) {
  if (job.power0 > 0) return Source::chain;
  const int64_t bytes = cluster.count * job.classes * job.temperatures * int64_t(sizeof(T));
  return bytes <= kStoredBytes ? Source::stored : Source::direct;
}
// The base of the exponentials, as the factor that inverse temperatures take: see kLog2.
template <class T, Source kSource>
constexpr double kUnit = kSource == Source::chain ? 1.0 : kLog2<T>;

// How many chains of products, each of which waits for the one before, take turns: see several.h
constexpr int kChains = kTogether > 1 ? 2 : 1;

// Powers p, p + 1, ... of x
template <class T>
struct PowerChain {
  Vec<T> step, next[kChains];
  CMIM_INLINE PowerChain(Vec<T> x, Vec<T> first) : step(x) {
    next[0] = first;
    if constexpr (kChains == 2) step = x * x, next[1] = first * x;
  }
  // k = 0, 1, ... in this order
  CMIM_INLINE Vec<T> at(int k) {
    Vec<T>& chain = next[k % kChains];
    const Vec<T> it = chain;
    chain *= step;
    return it;
  }
};

// What inverse temperatures multiply, in the base of the exponentials, and the x where exp(a x) vanishes
template <class T>
struct Scales {
  const T *a, *least;
};

// exp(a_k x) of one vector of columns or several, each temperature by itself
template <class T, class V>
struct OfColumns {
  V x;
  Scales<T> scales;
  CMIM_INLINE V at(int k) { return exp_scaled(x, scales.a[k], scales.least[k]); }
};

// exp(a_k x) for the temperatures of one chunk: few registers are in use at a time. from: their row in E;
// first: in a chain the row of the first of them, else that of x.
template <Source kSource, class T>
struct Exponentials {
  const T *from, *first;
  Scales<T> scales;

  struct Stored {
    const T* from;
    CMIM_INLINE Vec<T> at(int k) { return load<Vec<T>>(from + k * Simd<T>::width); }
  };
  // those at columns j .., which are `place` numbers into `from`
  CMIM_INLINE auto at(int64_t place, int64_t j) const {
    if constexpr (kSource == Source::stored)
      return Stored{from + place};
    else if constexpr (kSource == Source::direct)
      return OfColumns<T, Vec<T>>{load<Vec<T>>(first + j), scales};
    else
      return PowerChain<T>(load<Vec<T>>(from + place), load<Vec<T>>(first + j));
  }
};

// OfColumns where the a_k are multiples of a base that leave some out: low powers of exp(base x), and high
// ones, which carry its rounding many times over, by themselves
constexpr int kHighestPower = 4;
template <class T, class V>
struct PowersOfColumns {
  OfColumns<T, V> others;
  V one;
  const int* multiple;
  CMIM_INLINE V at(int k) { return multiple[k] <= kHighestPower ? power<T>(one, multiple[k]) : others.at(k); }
};

// Flushes subnormal numbers on this thread while a kernel runs: powers of an exponential pass through them on
// their way to zero, and some processors take a hundred cycles for each.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}
#endif
};

// Runs f(0 .. count - 1), on all threads of the team if it has any. The caller's thread flushes already.
template <class F>
void each(const Team& team, int64_t count, F&& f) {
  using G = std::remove_reference_t<F>;
  const auto flushing = [](void* arg, int64_t i) {
    const FlushSubnormals guard;
    (*static_cast<G*>(arg))(i);
  };
  if (team.run)
    team.run(count, flushing, &f);
  else
    for (int64_t i = 0; i < count; ++i) f(i);
}

// Rows [begin, end) of a cluster. Passes take several at a time: what is the same for all of them, many
// pointers and the coefficients of the temperatures, costs as much as a row of ten classes.
struct Span {
  int64_t begin, end;
};

// Whether the softmax at temperature 1 is a term of its own
inline bool has_own_ce(const Job& job) {
  return job.has_ce && job.ce_index < 0;
}
// Whether anything depends on the divergences at temperature k
inline bool counts(const Job& job, int k) {
  return job.w[k] != 0 || (job.kl && job.order[k] >= 0);
}
// Whether every row has an upstream gradient of its own, and the path through the centroid does not cancel
inline bool has_own_upstreams(const Job& job) {
  return job.upstream && !job.centroids;
}
// Of z - max z: exp(a (z - max z)) is 0 there at every temperature
template <class T>
T floor_of(const Job& job) {
  return kVanishes<T> / T(has_own_ce(job) && job.a[0] > 1 ? 1.0 : job.a[0]);
}

template <class T>
struct Rows {
  using V = Vec<T>;
  static constexpr int W = Simd<T>::width;
  // Between the temperatures in a table of a tile: known to the compiler, and not a multiple of a page.
  static constexpr int kStride = W * (kTileVectors + 1);

  const Job& job;
  const Cluster& cluster;
  int64_t n, C, Cp;  // rows, classes, classes in whole vectors
  int K;
  int64_t cols;   // columns of a tile, a power of two of vectors
  int64_t tiles;  // column tiles
  int64_t slots;  // how many of them a table holds at a time
  Source source;  // where the exponentials come from
  T *X, *E;       // (n, Cp) what the temperatures multiply; exp(base X) up to a factor of the row
  T *r, *c, *q;   // (n, K) P_k = r_k E^(p + k); coeff r; c sum_j P log(P/Q)
  T *a, *least;   // (K) inverse temperatures, in the base of the exponentials; see Scales
  T* r_ce;        // (n) the softmax at temperature 1 is r_ce exp(X)

  // whole: tables hold all tiles at a time, for a team
  Rows(const Job& j, const Cluster& cl, Source from, bool whole)
      : job(j), cluster(cl), n(cl.count), C(j.classes), Cp(round_up(C, W)), K(j.temperatures), source(from) {
    const int64_t vectors = kTileBytes / (n * kVectorBytes * (source == Source::stored ? K : 2));
    cols = W * kTileVectors;
    while (cols > W * kTileVectors / 4 && cols > W * vectors) cols /= 2;
    tiles = (Cp + cols - 1) / cols;
    slots = whole ? tiles : 1;
  }

  // where exponentials are read from: row i, temperature k0, to which column() is added
  template <Source kSource>
  CMIM_INLINE T* place_of(int64_t i, int k0) const {
    if constexpr (kSource == Source::stored) return E + i * Cp * K + k0 * W;
    return (kSource == Source::chain ? E : X) + i * Cp;
  }
  template <Source kSource>
  CMIM_INLINE int64_t column(int64_t j) const {
    return kSource == Source::stored ? j * K : j;
  }

  // of a table (slots, K, kStride), with columns counted from 0
  T* table(T* of, int k0, int64_t tile) const {
    return of + ((slots == 1 ? 0 : tile) * K + k0) * kStride - tile * cols;
  }

  void place(Layout& layout) {
    layout.take(X, n * Cp);
    layout.take(E, source == Source::chain ? n * Cp : source == Source::stored ? n * K * Cp : 0);
    layout.take(r, n * K), layout.take(c, n * K), layout.take(q, n * K);
    layout.take(a, K), layout.take(least, K), layout.take(r_ce, n);
  }

  // f(tile) prepares what g(span of rows, tile) uses. Alone, a thread has one tile at a time in its
  // first-level cache; a team prepares all of them first.
  template <class F, class H>
  void by_tile(const Team& team, F&& f, H&& g) {
    if (team.run) {
      each(team, tiles, [&](int64_t t) { f(t); });
      each(team, n, [&](int64_t i) {
        for (int64_t t = 0; t < tiles; ++t) g(Span{i, i + 1}, t);
      });
    } else {
      for (int64_t t = 0; t < tiles; ++t) {
        f(t);
        g(Span{0, n}, t);
      }
    }
  }
  // f(span of rows), of as many as the first-level cache keeps two arrays (n, Cp) of
  template <class F>
  void by_block(const Team& team, F&& f) {
    constexpr int64_t kBytes = 16 << 10;
    const int64_t rows = kBytes / (2 * Cp * int64_t(sizeof(T))), block = rows < 1 ? 1 : rows < n ? rows : n;
    each(team, (n + block - 1) / block,
         [&](int64_t b) { f(Span{b * block, (b + 1) * block < n ? (b + 1) * block : n}); });
  }
  int64_t end_of(int64_t tile) const { return (tile + 1) * cols < Cp ? (tile + 1) * cols : Cp; }

  // s: sums over a tile of N temperatures of a row. In lanes from tile to tile, in double at the last, and
  // where it has become many.
  template <int N>
  CMIM_INLINE void add_tile(int64_t tile, V (&s)[N], V* lanes, double* sums) const {
    if (tile % kFlushTiles > 0)
      for (int k = 0; k < N; ++k) s[k] += lanes[k];
    if (tile % kFlushTiles == kFlushTiles - 1 || tile == tiles - 1)
      add_lanes<T, N>(s, sums);
    else
      for (int k = 0; k < N; ++k) lanes[k] = s[k];
  }

  bool own_ce() const { return has_own_ce(job); }

  // N temperatures of a row. inverse: of S_k = sum_j E^(p + k); scale: of the coefficients
  template <int N, class D>
  CMIM_INLINE void set_scales(int64_t i, int k0, D inverse, double scale) {
    store_doubles<N>(r + i * K + k0, inverse);
    store_doubles<N>(c + i * K + k0, doubles<N>(job.coeff + k0) * scale * inverse);
  }
  // log_sum: log sum_j exp(z - top)
  void set_entropy(int64_t i, double log_sum, double top) {
    if (!job.row_ce) return;
    job.row_ce[cluster.position + i] =
        job.has_ce ? row_entropy_value(job, cluster.rows[i], cluster.label, log_sum, top) : 0;
  }

  // divergences (n, K)
  void report(Span rows, const double* divergences) const {
    if (job.row_cmi) {
      double* const to = job.row_cmi + cluster.position;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const double total = dot(job.w, divergences + i * K, K);
        to[i] = job.carried ? to[i] + total : total;
      }
    }
    for (int64_t i = rows.begin; job.kl && i < rows.end; ++i)
      for (int k = 0; k < K; ++k)
        if (job.order[k] >= 0)
          job.kl[(cluster.position + i) * job.kl_stride + job.order[k]] = divergences[i * K + k];
  }
};

}  // namespace
}  // namespace cmim::cpu
