// One instruction-set variant of the CPU kernel: how a cluster is computed, and the table that the driver
// calls it by. Like uncentred_*.cpp, which take most of the compiler's time and are therefore files of their
// own, this one is compiled once per variant, with CMIM_VARIANT naming it and the compiler's flags choosing
// the instructions; everything but the table at the end has internal linkage.
#include "narrow.h"
#include "problem.h"
#include "row.h"
#include "split.h"
#include "uncentred.h"

namespace cmim::cpu {
namespace {

// How many times the smallest inverse temperature the largest may be for float's exponentials to be right
// where those of the smallest have just vanished.
constexpr double kSpan = 1e8;

// All temperatures of a cluster, uncentred in float. False, with no gradient written, where float does not
// resolve them.
bool in_float(const Job& job, const Cluster& cl, const Team& team, Workspace& ws) {
  return job.storage != Storage::f64 && job.a[job.temperatures - 1] <= kSpan * job.a[0] &&
         !has_own_upstreams(job) && CMIM_VARIANT::uncentred_in_float(job, cl, team, ws);
}

// All temperatures of a cluster, uncentred: in float if that resolves them, else in double.
void uncentred(const Job& job, const Cluster& cl, const Team& team, Workspace& ws) {
  if (!in_float(job, cl, team, ws)) CMIM_VARIANT::uncentred_in_double(job, cl, team, ws);
}

// All temperatures of a cluster, centred. Returns 0, or how far |d| reaches where that is too far.
float centred(const Job& job, const Cluster& cl, const Team& team, Workspace& ws) {
  const bool whole = team.run != nullptr;
  const Source source = choose_source<float>(job, cl);
  if (source == Source::chain) return Narrow<Source::chain>(job, cl, whole, ws).run(team);
  if (source == Source::stored) return Narrow<Source::stored>(job, cl, whole, ws).run(team);
  return Narrow<Source::direct>(job, cl, whole, ws).run(team);
}

// A cluster, split as guessed. False, with what is to be found out from it, where that does not work.
bool by_split(const Split& split, const Job& job, const Cluster& cl, const Team& team, Workspace& ws,
              Found& found) {
  const bool all = split.centred == job.temperatures;
  if (all && (!job.has_ce || (job.power0 > 0 && job.ce_index >= 0))) {
    found.reach = centred(job, cl, team, ws);
    return found.reach == 0;
  }
  Job left = job;
  left.close = split.close;
  if (split.centred > 0) {
    const Carry carry(job, cl.count, ws);
    found.reach = centred(first_part(job, split.centred, carry), cl, team, ws);
    if (found.reach != 0) return false;
    left = second_part(left, split.centred, carry);
  }
  if (all) {
    for (int64_t i = 0; i < cl.count; ++i) entropy_row<float>(left, cl, i, ws);
  } else if (split.close > split.centred) {
    found.none_close = !in_float(left, cl, team, ws);
    return !found.none_close;
  } else {
    uncentred(left, cl, team, ws);
  }
  return true;
}

void cluster(const Job& job, const Cluster& cl, const Team& team, Workspace& ws) {
  const FlushSubnormals guard;
  Found found;
  for (int attempt = 0; attempt < 3; ++attempt)
    if (by_split(split_of(job, cl, found, ws), job, cl, team, ws, found)) return;
  uncentred(job, cl, team, ws);
}

void entropy(const Job& job, const Cluster& cl, Workspace& ws) {
  const FlushSubnormals guard;
  for (int64_t i = 0; i < cl.count; ++i) {
    if (job.storage == Storage::f64)
      entropy_row<double>(job, cl, i, ws);
    else
      entropy_row<float>(job, cl, i, ws);
  }
}

template <class T, class From, class To>
void scale_as(const void* saved, double grad, void* out, int64_t count) {
  const From* from = static_cast<const From*>(saved);
  To* to = static_cast<To*>(out);
  constexpr int W = Simd<T>::width;
  const T g = T(grad);
  int64_t i = 0;
  for (; i + W <= count; i += W) Convert<T, To>::to(to + i, Convert<T, From>::from(from + i) * g);
  if (i < count) store_tail<T, To>(to + i, load_tail<T, From>(from + i, count - i) * g, count - i);
}

void scale(const void* saved, Storage saved_storage, double grad, void* out, Storage out_storage,
           int64_t count) {
  if (saved_storage == Storage::f64) return scale_as<double, double, double>(saved, grad, out, count);
  if (saved_storage == Storage::bf16) return scale_as<float, Bf16, Bf16>(saved, grad, out, count);
  with_storage(out_storage, [&](auto tag) {
    using To = decltype(tag);
    if constexpr (sizeof(To) <= 4) scale_as<float, float, To>(saved, grad, out, count);
  });
}

// Q of one class in float or double, in the caller's order of temperatures: out[(order[k] C + label) C + j].
// Sums are double throughout: centroids are kept across batches, and this is not on the training step's path.
void centroid(const Job& job, const Cluster& cl, void* out, Workspace& ws) {
  const FlushSubnormals guard;
  const int64_t C = job.classes;
  constexpr int W = Simd<double>::width;
  const int64_t Cp = round_up(C, W);
  double* x = reinterpret_cast<double*>(reserve(ws.pass, 3 * Cp * int64_t(sizeof(double))));
  double *e = x + Cp, *sum = e + Cp;
  for (int k = 0; k < job.temperatures; ++k) {
    for (int64_t j = 0; j < Cp; ++j) sum[j] = 0;
    for (int64_t i = 0; i < cl.count; ++i) {
      const double* const z = row_values(job, cl.rows[i], x);
      const double top = largest(z, C);
      double total = 0;
      each_vector(z, C, [&](int64_t j, Vec<double> logits) CMIM_INLINE_LAMBDA {
        const Vec<double> v = exp_nonpositive(job.a[k] * (logits - top));
        store(e + j, v);
        total += sum_lanes<double>(v);
      });
      const double scale = 1 / (total * double(cl.count));
      for (int64_t j = 0; j < Cp; j += W)
        store(sum + j, load<Vec<double>>(sum + j) + scale * load<Vec<double>>(e + j));
    }
    const int64_t at = centroid_row(job, k, cl.label);
    for (int64_t j = 0; j < C; ++j) {
      if (job.storage == Storage::f64)
        static_cast<double*>(out)[at + j] = sum[j];
      else
        static_cast<float*>(out)[at + j] = float(sum[j]);
    }
  }
}

bool supported() {
#if !defined(__x86_64__)
  return true;
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512cd");
#elif defined(__AVX2__)
  // and F16C, which older clangs cannot ask for; it came before AVX2
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
#else
  return true;
#endif
}

}  // namespace

#define CMIM_STRING_(x) #x
#define CMIM_STRING(x) CMIM_STRING_(x)
#if defined(__AVX512F__)
extern const Variant kAvx512 = {CMIM_STRING(CMIM_VARIANT), supported, cluster, entropy, scale, centroid};
#elif defined(__AVX2__)
extern const Variant kAvx2 = {CMIM_STRING(CMIM_VARIANT), supported, cluster, entropy, scale, centroid};
#else
extern const Variant kBaseline = {CMIM_STRING(CMIM_VARIANT), supported, cluster, entropy, scale, centroid};
#endif

}  // namespace cmim::cpu
