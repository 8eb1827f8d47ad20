// Vectors of the width this translation unit is compiled for, through the compiler's vector extension: one
// source for every instruction set.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
  #include <immintrin.h>
#endif

// A vector that is passed to a call goes through memory: everything that takes one has to be inlined.
#define CMIM_INLINE __attribute__((always_inline)) inline
#define CMIM_INLINE_LAMBDA __attribute__((always_inline))

namespace cmim::cpu {
namespace {  // a copy for each variant: see problem.h

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd;
template <>
struct Simd<float> {
  static constexpr int width = kVectorBytes / 4;
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<double> {
  static constexpr int width = kVectorBytes / 8;
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t U __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using Int = typename Simd<T>::I;
template <class T>
using Unsigned = typename Simd<T>::U;  // wraps around

// The 16-bit types are only storage: their bits.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// T lanes of float, 32-bit and 16-bit integers: what a conversion from and to a narrower storage needs
template <class T>
struct Lanes {
  typedef float F __attribute__((vector_size(Simd<T>::width * 4)));
  typedef uint32_t U __attribute__((vector_size(Simd<T>::width * 4)));
  typedef uint16_t H __attribute__((vector_size(Simd<T>::width * 2)));
};

// A vector at any address, of elements of its own type: typed, so that what is stored is known not to change
// the pointers and counts beside it.
template <class V>
struct Unaligned {
  typedef V type __attribute__((aligned(1)));
};
template <class V, class S>
CMIM_INLINE V load(const S* p) {
  static_assert(sizeof(S) == sizeof(V{}[0]), "elements of the vector's type");
  return *reinterpret_cast<const typename Unaligned<V>::type*>(p);
}
template <class V, class S>
CMIM_INLINE void store(S* p, V v) {
  static_assert(sizeof(S) == sizeof(V{}[0]), "elements of the vector's type");
  *reinterpret_cast<typename Unaligned<V>::type*>(p) = v;
}
template <class To, class From>
CMIM_INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To r;
  __builtin_memcpy(&r, &v, sizeof(To));
  return r;
}

// Lanes L of a and b, counted through both; a vector of as many as there are L.
template <size_t... L, class V>
CMIM_INLINE auto lanes_of(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, L...);
#else  // gcc 11, which makes shuffles of these as well
  using T = std::decay_t<decltype(a[0])>;
  constexpr size_t W = sizeof(V) / sizeof(T);
  typedef T R __attribute__((vector_size(sizeof...(L) * sizeof(T))));
  return R{(L < W ? a[L % W] : b[L % W])...};
#endif
}

template <class T>
CMIM_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class T>
CMIM_INLINE Vec<T> vmax(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
CMIM_INLINE Vec<float> magnitude(Vec<float> v) {
  return bits<Vec<float>>(bits<Unsigned<float>>(v) & 0x7fffffff);
}
// Half as wide a vector of floats. By its instruction: gcc 12 converts its halves one after the other.
CMIM_INLINE Vec<double> to_double(Lanes<double>::F v) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xff, v);
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(v);
#else
  return __builtin_convertvector(v, Vec<double>);
#endif
}
CMIM_INLINE Vec<double> to_double(Vec<double> v) {
  return v;
}
// All lanes combined by f: the upper half with the lower, until one is left.
template <class V, class F, size_t... I>
CMIM_INLINE auto fold_halves(V v, F&& f, std::index_sequence<I...>) {
  constexpr int half = sizeof...(I);
  const auto folded = f(lanes_of<I...>(v, v), lanes_of<(half + I)...>(v, v));
  if constexpr (half == 1)
    return folded[0];
  else
    return fold_halves(folded, f, std::make_index_sequence<half / 2>{});
}
template <class T, class F>
CMIM_INLINE T fold_lanes(Vec<T> v, F&& f) {
  return fold_halves(v, f, std::make_index_sequence<Simd<T>::width / 2>{});
}
template <class T>
CMIM_INLINE T sum_lanes(Vec<T> v) {
  return fold_lanes<T>(v, [](auto a, auto b) CMIM_INLINE_LAMBDA { return a + b; });
}
template <class T>
CMIM_INLINE T max_lanes(Vec<T> v) {
  return fold_lanes<T>(v, [](auto a, auto b) CMIM_INLINE_LAMBDA { return a > b ? a : b; });
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bits<float>(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  // scaling by 2^112 moves the exponent's bias and normalises the subnormals in one exact step; through
  // double because the kernel runs with subnormal floats flushed
  const double wide = double(bits<float>(0x3f800000u | ((magnitude & 0x3ff) << 13)));
  const int exponent = int(magnitude >> 10);
  const double value =
      exponent == 0 ? double(magnitude) * 0x1p-24 : wide * __builtin_ldexp(1.0, exponent - 15);
  return sign ? -float(value) : float(value);
}
inline uint16_t float_to_half(float f) {
  const uint32_t b = bits<uint32_t>(f), sign = (b >> 16) & 0x8000, magnitude = b & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {                                 // subnormal half: round in units of 2^-24
    const double units = double(bits<float>(magnitude)) * 0x1p24;
    return uint16_t(sign | uint32_t((units + 0x1p52) - 0x1p52));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

template <class T, class S>
struct Convert;  // Vec<T> from and to width lanes of storage S

template <class T>
struct Convert<T, T> {
  CMIM_INLINE static Vec<T> from(const T* p) { return load<Vec<T>>(p); }
  CMIM_INLINE static void to(T* p, Vec<T> v) { store(p, v); }
};
template <>
struct Convert<double, float> {
  using F = Lanes<double>::F;
  CMIM_INLINE static Vec<double> from(const float* p) { return to_double(load<F>(p)); }
  CMIM_INLINE static void to(float* p, Vec<double> v) { store(p, __builtin_convertvector(v, F)); }
};
template <>
struct Convert<float, double> {  // only a float kernel that writes a double gradient would need it
  CMIM_INLINE static Vec<float> from(const double*);
  CMIM_INLINE static void to(double*, Vec<float>);
};
template <class T>
struct Convert<T, Bf16> {
  using F = typename Lanes<T>::F;
  using U = typename Lanes<T>::U;
  using H = typename Lanes<T>::H;
  CMIM_INLINE static Vec<T> from(const Bf16* p) {
    const U wide = __builtin_convertvector(load<H>(p), U) << 16;
    return __builtin_convertvector(bits<F>(wide), Vec<T>);
  }
  CMIM_INLINE static void to(Bf16* p, Vec<T> v) {
    const F f = __builtin_convertvector(v, F);
    const U b = bits<U>(f);
    const U rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    const U nan = (b >> 16) | 0x40;
    store(p, __builtin_convertvector(U(f != f ? nan : rounded), H));
  }
};
template <class T>
struct Convert<T, F16> {
  using F = typename Lanes<T>::F;
  using H = typename Lanes<T>::H;
  static constexpr int width = Simd<T>::width;
  CMIM_INLINE static Vec<T> from(const F16* p) {
    F f;
#if defined(__AVX512F__)
    if constexpr (width == 16)
      f = bits<F>(_mm512_maskz_cvtph_ps(0xffff, bits<__m256i>(load<H>(p))));
    else
      f = bits<F>(_mm256_cvtph_ps(bits<__m128i>(load<H>(p))));
#elif defined(__F16C__)
    if constexpr (width == 8)
      f = bits<F>(_mm256_cvtph_ps(bits<__m128i>(load<H>(p))));
    else
      f = bits<F>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    for (int i = 0; i < width; ++i) f[i] = half_to_float(p[i].bits);
#endif
    return __builtin_convertvector(f, Vec<T>);
  }
  CMIM_INLINE static void to(F16* p, Vec<T> v) {
    const F f = __builtin_convertvector(v, F);
#if defined(__AVX512F__)
    if constexpr (width == 16)
      store(p, bits<H>(_mm512_maskz_cvtps_ph(0xffff, bits<__m512>(f), 0)));
    else
      store(p, bits<H>(_mm256_cvtps_ph(bits<__m256>(f), 0)));
#elif defined(__F16C__)
    if constexpr (width == 8)
      store(p, bits<H>(_mm256_cvtps_ph(bits<__m256>(f), 0)));
    else
      _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(bits<__m128>(f), 0));
#else
    for (int i = 0; i < width; ++i) p[i].bits = float_to_half(f[i]);
#endif
  }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
CMIM_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif
// Lanes beyond `valid` read as -inf (a masked class) and are not written.
template <class T, class S>
CMIM_INLINE Vec<T> load_tail(const S* p, int64_t valid) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4 && sizeof(S) == 4)
    return _mm512_mask_loadu_ps(splat(-__builtin_inff()), __mmask16((1u << valid) - 1), p);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4 && sizeof(S) == 4) {
    const __m256i valid_lanes = first_lanes(valid);
    return _mm256_blendv_ps(splat(-__builtin_inff()), _mm256_maskload_ps(p, valid_lanes),
                            bits<__m256>(valid_lanes));
  }
#endif
  S lane[Simd<T>::width];
  Convert<T, S>::to(lane, splat<T>(-__builtin_inf()));
  __builtin_memcpy(lane, p, size_t(valid) * sizeof(S));
  return Convert<T, S>::from(lane);
}
template <class T, class S>
CMIM_INLINE void store_tail(S* p, Vec<T> v, int64_t valid) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4 && sizeof(S) == 4)
    return _mm512_mask_storeu_ps(p, __mmask16((1u << valid) - 1), v);
#elif defined(__AVX2__)
  // In up to three parts: masked stores are some forty steps of microcode on AMD's processors.
  if constexpr (sizeof(T) == 4 && sizeof(S) == 4) {
    __m128 part = _mm256_castps256_ps128(v);
    if (valid & 4) _mm_storeu_ps(p, part), part = _mm256_extractf128_ps(v, 1), p += 4;
    if (valid & 2) _mm_storel_pi(reinterpret_cast<__m64*>(p), part), part = _mm_movehl_ps(part, part), p += 2;
    if (valid & 1) _mm_store_ss(p, part);
    return;
  }
#endif
  S lane[Simd<T>::width];
  Convert<T, S>::to(lane, v);
  __builtin_memcpy(p, lane, size_t(valid) * sizeof(S));
}

// N numbers at p as doubles: a vector of them, or one where N is 1
template <int N, class S>
CMIM_INLINE auto doubles(const S* p) {
  if constexpr (N == 1)
    return double(*p);
  else
    return Convert<double, S>::from(p);
}
template <int N, class S, class V>
CMIM_INLINE void store_doubles(S* p, V v) {
  if constexpr (N == 1)
    *p = S(v);
  else
    Convert<double, S>::to(p, v);
}
// f(how many at a time as a constant, the first of them), for [0, count)
template <class F>
CMIM_INLINE void by_doubles(int count, F&& f) {
  constexpr int D = Simd<double>::width;
  int k = 0;
  for (; k + D <= count; k += D) f(std::integral_constant<int, D>{}, k);
  for (; k < count; ++k) f(std::integral_constant<int, 1>{}, k);
}

// sum_k a[k] b[k]
CMIM_INLINE double dot(const double* a, const double* b, int count) {
  Vec<double> lanes{};
  double rest = 0;
  by_doubles(count, [&](auto width, int k) CMIM_INLINE_LAMBDA {
    constexpr int N = decltype(width)::value;
    const auto product = doubles<N>(a + k) * doubles<N>(b + k);
    if constexpr (N == 1)
      rest += product;
    else
      lanes += product;
  });
  return rest + sum_lanes<double>(lanes);
}

// f(j, a whole vector of the C numbers at z, padded with -inf)
template <class T, class F>
CMIM_INLINE void each_vector(const T* z, int64_t C, F&& f) {
  constexpr int W = Simd<T>::width;
  int64_t j = 0;
  for (; j + W <= C; j += W) f(j, load<Vec<T>>(z + j));
  if (j < C) f(j, load_tail<T, T>(z + j, C - j));
}

// v with `value` in lane l; v itself where it has no such lane
CMIM_INLINE Vec<float> with_entry(Vec<float> v, int64_t l, float value) {
  Int<float> lane;
  for (int i = 0; i < Simd<float>::width; ++i) lane[i] = i;
  return lane == int32_t(l) ? splat(value) : v;
}
// p[j] = value, by a store of the whole vector: a later load of that need not wait for the store to be over
CMIM_INLINE void set_entry(float* p, int64_t j, float value) {
  constexpr int W = Simd<float>::width;
  float* const from = p + j / W * W;
  store(from, with_entry(load<Vec<float>>(from), j % W, value));
}

// The largest of C numbers, of those that are not NaN; -inf if there is none
template <class T>
CMIM_INLINE T largest(const T* z, int64_t C) {
  constexpr int W = Simd<T>::width;
  Vec<T> best[4];  // several, so that no comparison waits for the one before
  for (Vec<T>& b : best) b = splat<T>(-__builtin_inf());
  int64_t j = 0;
  for (; j + 4 * W <= C; j += 4 * W)
    for (int u = 0; u < 4; ++u) best[u] = vmax<T>(load<Vec<T>>(z + j + u * W), best[u]);
  each_vector(z + j, C - j, [&](int64_t, Vec<T> v) CMIM_INLINE_LAMBDA { best[0] = vmax<T>(v, best[0]); });
  return max_lanes<T>(vmax<T>(vmax<T>(best[0], best[1]), vmax<T>(best[2], best[3])));
}
// The same without number `l`
inline float largest_but(const float* z, int64_t C, int64_t l) {
  constexpr int W = Simd<float>::width;
  const bool few = C <= 4 * W;
  const int64_t begin = few ? 0 : l / W * W, end = few || begin + W > C ? C : begin + W;
  Vec<float> best = splat(-__builtin_inff());
  each_vector(z + begin, end - begin, [&](int64_t j, Vec<float> v) CMIM_INLINE_LAMBDA {
    best = vmax<float>(with_entry(v, l - begin - j, -__builtin_inff()), best);
  });
  const float near = max_lanes<float>(best);
  if (few) return near;
  const float before = largest(z, begin), after = largest(z + end, C - end);
  const float apart = before > after ? before : after;
  return near > apart ? near : apart;
}

}  // namespace
}  // namespace cmim::cpu
