// Several vectors as one value: what is computed of it is computed step by step for all of them. A function
// such as exp is a chain of steps that wait for each other, and a processor looks only so far ahead of the
// one that waits: of functions one after the other it has two or three under way, too few to fill its units.
#pragma once

#include <algorithm>

#include "simd.h"

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

// How many vectors functions are computed of at a time: docs/performance.md has what it gains with AVX2.
// Units for 512 bits are fed by half as many chains, and vectors of 128 bits are there for completeness.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kTogether = 4;
#else
constexpr int kTogether = 1;
#endif
// and of N of them
template <int N>
constexpr int kAtOnce = N < kTogether ? N : kTogether;

template <class T, int U>
struct SeveralVectors {
  Vec<T> part[U];
};
template <class T, int U>
using Several = std::conditional_t<U == 1, Vec<T>, SeveralVectors<T, U>>;

// Their number, 1 for a vector or a number, which stand beside every part of others; the type of their lanes
template <class V>
constexpr int kParts = 1;
template <class T, int U>
constexpr int kParts<SeveralVectors<T, U>> = U;
template <class V>
struct LaneOf {
  using type = std::decay_t<decltype(V{}[0])>;
};
template <class T, int U>
struct LaneOf<SeveralVectors<T, U>> {
  using type = T;
};
// of a template that takes one vector of T or several
template <class V, class T>
using OnlyOf = std::enable_if_t<std::is_same_v<typename LaneOf<V>::type, T>, int>;

template <class V>
CMIM_INLINE auto part(const V& v, int u) {
  if constexpr (kParts<V> > 1)
    return v.part[u];
  else
    return v;
}
// Of f(0 .. U - 1)
template <class T, class F, size_t... u>
CMIM_INLINE SeveralVectors<T, int(sizeof...(u))> make_parts(F&& f, std::index_sequence<u...>) {
  return {{f(int(u))...}};
}
template <class T, int U, class F>
CMIM_INLINE Several<T, U> make_several(F&& f) {
  if constexpr (U == 1)
    return f(0);
  else
    return make_parts<T>(f, std::make_index_sequence<U>{});
}
// f(v ...), part by part where any is several vectors
template <class T, class F, class... V>
CMIM_INLINE auto map(F&& f, const V&... v) {
  return make_several<T, std::max({kParts<V>...})>([&](int u)
                                                       CMIM_INLINE_LAMBDA { return f(part(v, u)...); });
}

#define CMIM_OPERATOR(op)                                                          \
  template <class T, int U, class B>                                               \
  CMIM_INLINE auto operator op(const SeveralVectors<T, U>& a, const B& b) {        \
    return map<T>([](auto x, auto y) CMIM_INLINE_LAMBDA { return x op y; }, a, b); \
  }                                                                                \
  template <class T, int U, class A, std::enable_if_t<kParts<A> == 1, int> = 0>    \
  CMIM_INLINE auto operator op(const A& a, const SeveralVectors<T, U>& b) {        \
    return map<T>([](auto x, auto y) CMIM_INLINE_LAMBDA { return x op y; }, a, b); \
  }
CMIM_OPERATOR(+)
CMIM_OPERATOR(-)
CMIM_OPERATOR(*)
CMIM_OPERATOR(/)
#undef CMIM_OPERATOR

// Loads and stores, one part every `stride` numbers
template <int U, class T>
CMIM_INLINE Several<T, U> load_several(const T* p, int64_t stride = Simd<T>::width) {
  return make_several<T, U>([=](int u) CMIM_INLINE_LAMBDA { return load<Vec<T>>(p + u * stride); });
}
template <class T, class V>
CMIM_INLINE void store_several(T* p, const V& v, int64_t stride = Simd<T>::width) {
  for (int u = 0; u < kParts<V>; ++u) store(p + u * stride, part(v, u));
}
// Every part U times the same number, of those at p one after the other; the number itself where U is 1
template <int U, class T>
CMIM_INLINE auto splat_each(const T* p) {
  if constexpr (U == 1)
    return *p;
  else
    return make_several<T, U>([=](int u) CMIM_INLINE_LAMBDA { return splat<T>(p[u]); });
}

// Those in an array of vectors, from and to it
template <class T, int U>
CMIM_INLINE Several<T, U> take_parts(const Vec<T>* from) {
  return make_several<T, U>([=](int u) CMIM_INLINE_LAMBDA { return from[u]; });
}
template <class T, class V>
CMIM_INLINE void put_parts(Vec<T>* to, const V& v) {
  for (int u = 0; u < kParts<V>; ++u) to[u] = part(v, u);
}

// v where it is larger or NaN, else the limit
template <class V, class L>
CMIM_INLINE auto at_least(const V& v, const L& limit) {
  using T = typename LaneOf<V>::type;
  return map<T>([](auto x, auto least) CMIM_INLINE_LAMBDA { return x < least ? least - decltype(x){} : x; },
                v, limit);
}
// The sum of the parts, by pairs
template <class T>
CMIM_INLINE T sum_parts(const T& v) {
  return v;
}
template <class T, int U>
CMIM_INLINE Vec<T> sum_parts(const SeveralVectors<T, U>& v) {
  SeveralVectors<T, U / 2> half;
  for (int u = 0; u < U / 2; ++u) half.part[u] = v.part[2 * u] + v.part[2 * u + 1];
  if constexpr (U == 2)
    return half.part[0];
  else
    return sum_parts(half);
}
// v with `value` in lane l, counted from the first part's; v itself where it has no such lane
template <int U>
CMIM_INLINE auto with_entry(SeveralVectors<float, U> v, int64_t l, float value) {
  for (int u = 0; u < U; ++u) v.part[u] = with_entry(v.part[u], l - u * Simd<float>::width, value);
  return v;
}

// f(how many vectors as a constant, the first number's place), for the whole vectors that hold `count`
// numbers
template <class T, int U = kTogether, class F>
CMIM_INLINE void by_several(int64_t count, F&& f) {
  constexpr int W = Simd<T>::width;
  int64_t at = 0;
  if constexpr (U > 1)
    for (; at + U * W <= count; at += U * W) f(std::integral_constant<int, U>{}, at);
  for (; at < count; at += W) f(std::integral_constant<int, 1>{}, at);
}
// f(j, columns j .. of the C numbers at z, padded with -inf): several vectors where there are as many
template <class T, class F>
CMIM_INLINE void each_several(const T* z, int64_t C, F&& f) {
  constexpr int W = Simd<T>::width, U = kTogether;
  int64_t j = 0;
  if constexpr (U > 1)
    for (; j + U * W <= C; j += U * W) f(j, load_several<U>(z + j));
  each_vector(z + j, C - j, [&](int64_t at, Vec<T> v) CMIM_INLINE_LAMBDA { f(j + at, v); });
}

}  // namespace
}  // namespace cmim::cpu
