// Several vectors at a time: the sums of their lanes, and their transposition.
#pragma once

#include "simd.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

// Which lane of two vectors of W, that hold sums in groups of kGroup lanes, lane l takes in one half of each
// group. Groups larger than the blocks of 128 bits that instructions shuffle alternate between the vectors, a
// block's groups are those of the first vector before those of the second; kAlone: of one vector, its groups
// one after the other, twice.
template <int W, int kGroup, int kBlock, bool kAlone>
constexpr int lane_of_halves(int l, bool upper) {
  constexpr int half = kGroup / 2;
  const int within = l % half + (upper ? half : 0);
  if (kAlone) return l % (W / 2) / half * kGroup + within;
  if (kGroup > kBlock) return l / half % 2 * W + l / kGroup * kGroup + within;
  const int second = l % kBlock / (kBlock / 2), group = l % (kBlock / 2) / half;
  return second * W + l / kBlock * kBlock + group * kGroup + within;
}
template <int kGroup, bool kAlone, class V, size_t... I>
CMIM_INLINE V halve_groups(V a, V b, std::index_sequence<I...>) {
  constexpr int W = sizeof...(I), kBlock = 16 / sizeof(a[0]);
  return lanes_of<lane_of_halves<W, kGroup, kBlock, kAlone>(I, false)...>(a, b) +
         lanes_of<lane_of_halves<W, kGroup, kBlock, kAlone>(I, true)...>(a, b);
}
// total[l] += lane l of v, for l in [kFrom, kEnd)
template <class T, int kFrom, int kEnd, size_t... I>
CMIM_INLINE void add_each_lane(Vec<T> v, double* total, std::index_sequence<I...> together) {
  if constexpr (kFrom + int(sizeof...(I)) <= kEnd) {
    using D = Vec<double>;
    store(total + kFrom, load<D>(total + kFrom) + to_double(lanes_of<(kFrom + I)...>(v, v)));
    add_each_lane<T, kFrom + int(sizeof...(I)), kEnd>(v, total, together);
  } else {
    for (int l = kFrom; l < kEnd; ++l) total[l] += double(v[l]);
  }
}
// total[n] += sum of the lanes of v[n], with fewer shuffles than one vector after the other would take
template <class T, int N, int kGroup = Simd<T>::width, int kSums = N>
CMIM_INLINE void add_lanes(const Vec<T> (&v)[N], double* total) {
  constexpr int W = Simd<T>::width;
  if constexpr (kGroup == 1) {
    constexpr int kEach = kSums < W ? kSums : W;
    for (int n = 0; n < N; ++n)
      add_each_lane<T, 0, kEach>(v[n], total + n * kEach, std::make_index_sequence<Simd<double>::width>{});
  } else {
    // which two are folded together follows from where halve_groups puts their sums: in order at the end
    constexpr bool kAlone = N == 1;
    constexpr int kFolded = kAlone ? 1 : N / 2;
    constexpr int kApart = kGroup * sizeof(T) <= 16 || kAlone ? 1 : (N < kGroup ? N : kGroup) / 2;
    Vec<T> folded[kFolded];
    for (int n = 0; n < kFolded; ++n) {
      const int first = n / kApart * (2 * kApart) + n % kApart;
      folded[n] = halve_groups<kGroup, kAlone>(v[first], v[kAlone ? 0 : first + kApart],
                                               std::make_index_sequence<W>{});
    }
    add_lanes<T, kFolded, kGroup / 2, kSums>(folded, total);
  }
}

template <int kHalf, class V, int W, size_t... I>
CMIM_INLINE void exchange(V (&m)[W], std::index_sequence<I...>) {
  for (int r = 0; r < W; ++r) {
    if (r & kHalf) continue;
    const V a = m[r], b = m[r + kHalf];
    m[r] = lanes_of<(I & kHalf ? W + I - kHalf : I)...>(a, b);
    m[r + kHalf] = lanes_of<(I & kHalf ? W + I : I + kHalf)...>(a, b);
  }
}
// Lane l of vector r becomes lane r of vector l: first of every two by two lanes, then of two by two of
// those.
template <int kHalf = 1, class V, int W>
CMIM_INLINE void transpose(V (&m)[W]) {
  if constexpr (kHalf < W) {
    exchange<kHalf>(m, std::make_index_sequence<W>{});
    transpose<2 * kHalf>(m);
  }
}

}  // namespace
}  // namespace cmim::cpu
