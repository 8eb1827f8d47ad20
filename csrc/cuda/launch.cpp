#include "launch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "host.h"

namespace cmim::cuda {
namespace {

constexpr int kLongestChain = 64;  // a power's error grows with its exponent

// The temperatures in ascending order, and whether they are consecutive multiples of one number.
struct Grid {
  std::vector<double> a;
  std::vector<int> order;
  double base = 0;
  int first_multiple = 0;  // 0: they are not
};

Grid make_grid(const std::vector<double>& a) {
  Grid g;
  g.order.resize(a.size());
  std::iota(g.order.begin(), g.order.end(), 0);
  std::stable_sort(g.order.begin(), g.order.end(), [&](int x, int y) { return a[size_t(x)] < a[size_t(y)]; });
  for (int k : g.order) g.a.push_back(a[size_t(k)]);
  const double step = g.a.size() > 1 ? (g.a.back() - g.a[0]) / double(g.a.size() - 1) : g.a[0];
  const double first = std::round(g.a[0] / step);
  if (!(first >= 1 && first + double(g.a.size()) <= kLongestChain)) return g;
  g.base = g.a.back() / (first + double(g.a.size()) - 1);
  for (size_t k = 0; k < g.a.size(); ++k)
    if (std::abs((first + double(k)) * g.base - g.a[k]) > 4 * std::numeric_limits<double>::epsilon() * g.a[k])
      return g;
  g.first_multiple = int(first);
  return g;
}

size_t element_size(Storage s) {
  return s == Storage::f64 ? 8 : s == Storage::f32 ? 4 : 2;
}

bool aligned(const void* p, int64_t stride_bytes, size_t to) {
  return reinterpret_cast<uintptr_t>(p) % to == 0 && stride_bytes % int64_t(to) == 0;
}

std::string shape(const Call& call) {
  return "logits (" + std::to_string(call.rows) + ", " + std::to_string(call.classes) + "), " +
         std::to_string(call.a.size()) + " temperatures";
}

int slots(const Call& call) {
  return int(std::min(call.rows, call.classes));
}

int64_t padded_temperatures(size_t k, int chunk) {
  return (int64_t(k) + chunk - 1) / chunk * chunk;
}

struct Choice {
  Grid grid;
  bool chain;
  int padded;
  explicit Choice(const Call& call)
      : grid(make_grid(call.a)),
        chain(grid.first_multiple > 0 && call.storage != Storage::f64),
        padded(int(padded_temperatures(call.a.size(), chain ? kChainChunk : kDirectChunk))) {}
};

template <class A>
Problem<A> make_problem(const Call& call, const Choice& choice) {
  Problem<A> q{};
  const int64_t element = int64_t(element_size(call.storage));
  q.logits = call.logits;
  q.row_stride = call.row_stride, q.col_stride = call.col_stride;
  q.target = call.target, q.target_stride = call.target_stride, q.ignore_index = call.ignore_index;
  q.rows = int(call.rows), q.classes = int(call.classes);
  q.storage = call.storage;
  const bool dense = call.col_stride == 1 || call.classes == 1;
  q.vector4 =
      dense && aligned(call.logits, call.row_stride * element, std::min<size_t>(16, 4 * size_t(element)));
  q.vector16 = dense && aligned(call.logits, call.row_stride * element, 16);
  q.target_pairs = call.target_stride == 1 && aligned(call.target, 0, 16);
  q.by_class = call.classes <= call.rows;
  q.temperatures = int(call.a.size()), q.padded = choice.padded;
  const Grid& grid = choice.grid;
  q.unit = A(choice.chain ? grid.base : 1);
  for (int k = 0; k < q.padded; ++k) {
    const bool real = k < q.temperatures;
    const double a = choice.chain ? grid.base * (grid.first_multiple + k)
                     : real       ? grid.a[size_t(k)]
                                  : grid.a.back();
    q.a[k] = A(real ? grid.a[size_t(k)] : a);
    q.multiple[k] = A(choice.chain ? grid.first_multiple + k : a);
    q.order[k] = real ? grid.order[size_t(k)] : 0;
    q.weight[k] = A(real ? call.weight[size_t(grid.order[size_t(k)])] : 0);
  }
  q.floor = A((sizeof(A) == 4 ? -100.0 : -1000.0) / (double(q.unit) * double(q.multiple[0])));
  q.class_weight = static_cast<const A*>(call.class_weight);
  q.centroids = static_cast<const A*>(call.centroids);
  q.ce_weight = A(call.ce_weight), q.cmi_weight = A(call.cmi_weight), q.smoothing = A(call.smoothing);
  q.reduction = call.reduction;
  q.has_ce = call.reduction != kSpectrum && call.ce_weight != 0;
  q.has_cmi = call.reduction == kSpectrum || call.cmi_weight != 0;
  q.slots = slots(call);
  return q;
}

// Calls f(Kind) for the call's storage and temperatures.
template <class F>
void with_kind(const Call& call, const Choice& choice, F f) {
  if (call.storage == Storage::f64) return f(Kind<double, double, kDirectChunk, false>());
  if (call.storage == Storage::f32)
    return choice.chain ? f(Kind<float, float, kChainChunk, true>())
                        : f(Kind<float, float, kDirectChunk, false>());
  return choice.chain ? f(Kind<Narrow, float, kChainChunk, true>())
                      : f(Kind<Narrow, float, kDirectChunk, false>());
}

int64_t forward_scratch_elements(const Call& call, int padded) {
  const int64_t k = padded;
  return call.rows + call.rows * k + (k + kClassSums) * slots(call) + 4;
}

}  // namespace

int64_t forward_scratch(const Call& call) {
  return forward_scratch_elements(call, Choice(call).padded);
}

int64_t backward_scratch(const Call& call) {
  return call.reduction == kNone ? call.rows * (1 + Choice(call).padded) : 0;
}

void forward(const Call& call, void* value, void* saved, void* scratch, cudaStream_t stream) {
  const Choice choice(call);
  const DeviceLimits& device = current_device();
  with_kind(call, choice, [&](auto kind) {
    using T = decltype(kind);
    using A = typename T::A;
    ForwardLaunch<A> p;
    p.problem = make_problem<A>(call, choice);
    p.saved = saved_in(static_cast<A*>(saved), call.rows, slots(call), choice.padded);
    Forward<A>& f = p.forward;
    f.value = static_cast<A*>(value);
    f.ce = static_cast<A*>(scratch);
    f.partial = f.ce + call.rows;
    f.sums = f.partial + call.rows * choice.padded;
    f.invalid = reinterpret_cast<int*>(f.sums + (choice.padded + kClassSums) * int64_t(slots(call)));
    f.ticket = ticket(device, stream, reinterpret_cast<unsigned*>(f.invalid) + 1);
    f.bad_label = bad_label_word();
    const int blocks = slots(call);
    f.table_bytes = device.table_bytes();
    f.chip_bytes = device.room_for_rows(Sizes<A>::fixed + f.table_bytes, blocks);
    launch(fused_kernel<T>(), blocks, Sizes<A>::fixed + f.table_bytes + f.chip_bytes, stream, p, shape(call));
  });
}

void backward(const Call& call, const void* grad, int64_t grad_stride, void* saved, void* out, void* scratch,
              cudaStream_t stream) {
  const Choice choice(call);
  const DeviceLimits& device = current_device();
  with_kind(call, choice, [&](auto kind) {
    using T = decltype(kind);
    using A = typename T::A;
    BackwardLaunch<A> p;
    p.problem = make_problem<A>(call, choice);
    p.saved = saved_in(static_cast<A*>(saved), call.rows, slots(call), choice.padded);
    Backward<A>& w = p.backward;
    w.grad = static_cast<const A*>(grad), w.grad_stride = grad_stride;
    w.out = out;
    w.out_vector = call.classes % kVector == 0;
    w.upstream = static_cast<A*>(scratch);
    w.dots = w.upstream + call.rows;
    w.table_bytes = device.table_bytes();
    const int bytes = Sizes<A>::fixed + w.table_bytes;
    const int64_t most = int64_t(device.processors) * 16;  // blocks: more than that go by in a loop
    if (call.reduction == kNone && p.problem.has_cmi && !call.centroids)
      launch(row_dots_kernel<T>(), int(std::min<int64_t>(slots(call), most)), bytes, stream, p, shape(call));
    // Columns are shared out where there are fewer classes than the device can hold blocks.
    const int64_t tiles = (call.classes + kThreads * kVector / 2 - 1) / (kThreads * kVector / 2);
    w.splits = int(std::clamp<int64_t>(4 * device.processors / slots(call), 1, tiles));
    launch(gradient_kernel<T>(), int(std::min<int64_t>(int64_t(slots(call)) * w.splits, most)), bytes, stream,
           p, shape(call));
  });
}

}  // namespace cmim::cuda
