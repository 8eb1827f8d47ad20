#include "launch.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "call.h"
#include "host.h"

namespace cmim::cuda {
namespace {

constexpr int64_t kTypicalRows = 4096, kTypicalElements = 8 << 20;
constexpr int kMostFinders = 256;
constexpr int kLargestCluster = 8;    // the most that every device with clusters has
constexpr int64_t kLeastWidth = 128;  // columns of a block in one

// Hands out parts of one allocation, each at a multiple of 16 bytes. Without memory it only counts.
class Parts {
 public:
  explicit Parts(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class V>
  void take(V*& part, int64_t count) {
    part = memory_ ? reinterpret_cast<V*>(memory_ + bytes_) : nullptr;
    bytes_ += (count * int64_t(sizeof(V)) + 15) / 16 * 16;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// `cluster`: neighbouring blocks that may wait for each other
template <class P>
void launch(Kernel<P> kernel, int blocks, int shared_bytes, cudaStream_t stream, const P& p, const Call& call,
            int cluster = 1) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), current_device().index, shared_bytes);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute together;
  together.id = cudaLaunchAttributeClusterDimension;
  together.val.clusterDim.x = unsigned(cluster), together.val.clusterDim.y = together.val.clusterDim.z = 1;
  config.attrs = &together;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p);
  if (error != cudaSuccess)
    fail(error, "launching a kernel for logits (" + std::to_string(call.rows) + ", " +
                    std::to_string(call.classes) + "), " + std::to_string(call.a.size()) + " temperatures");
}

// Bytes of shared memory of a block that has a Block
template <class A>
int block_bytes(const ForwardLaunch<A>& p) {
  return Sizes<A>::fixed + p.forward.table_bytes + p.forward.chip_bytes;
}
constexpr int kSmallShared = 1024;  // and of one that has none: reductions only

std::atomic<Path> g_path{Path::automatic};

// Tiles of the columns of a class that is cut into narrow ones, see share_of()
int64_t narrow_tiles(const Call& call) {
  return (call.classes + kNarrowLanes * kVector - 1) / (kNarrowLanes * kVector);
}

// How the forward kernels share a call out over the device.
struct Plan {
  bool tiled;
  int parts = 1;    // most of a class's columns; of the fused kernel, the blocks of a cluster
  int items = 0;    // that keep the device busy
  int finders = 0;  // blocks that look for classes

  Plan(const Call& call, const Choice& choice, const DeviceLimits& device, bool with_tiles)
      : tiled(with_tiles) {
    if (!tiled) {
      // Where there may be a class for most multiprocessors, each has a block to itself.
      while (device.has_clusters && !choice.chain && 2 * parts <= kLargestCluster &&
             call.classes >= 2 * parts * kLeastWidth && 2 * parts * slots(call) <= device.processors)
        parts *= 2;
      return;
    }
    items = 4 * device.processors;
    finders = int(std::clamp<int64_t>(call.rows / kThreads, 1, kMostFinders));
    parts = most_parts(call, choice, items);
  }

  // Sums of parts take less memory than a quarter of the logits' elements.
  static int most_parts(const Call& call, const Choice& choice, int items) {
    const int64_t most = std::min(narrow_tiles(call), call.classes / (4 * choice.padded));
    return int(std::clamp<int64_t>(most, 1, items));
  }
};

// What class_centroids() needs of Saved, and forward() if nothing is saved, up to the next multiple of 16
// bytes
int64_t saved_in_scratch(const Call& call) {
  return (saved_elements(call.rows, int64_t(call.a.size())) + 3) / 4 * 4;
}

template <class A>
void take_forward_parts(Parts& memory, Forward<A>& f, const Call& call, const Choice& choice,
                        const Plan& plan) {
  const int64_t slots_ = slots(call);
  memory.take(f.own_saved, saved_in_scratch(call));
  memory.take(f.value, 1);  // where there is no one to read it
  memory.take(f.ce, call.rows);
  memory.take(f.partial, (plan.tiled ? 1 : 2) * plan.parts * call.rows * choice.padded);
  memory.take(f.kl, plan.tiled ? 0 : call.rows * choice.padded);
  memory.take(f.scanned, plan.tiled ? 0 : plan.parts * call.rows * kScanned);
  memory.take(f.sums, (choice.padded + kClassSums) * slots_);
  memory.take(f.found, kFounds);
  memory.take(f.ticket, 1);
  memory.take(f.leaders, 2 * plan.finders);
  memory.take(f.widest, slots_ * plan.parts);
}

// Typical: every block can read all targets, and one block to a class keeps the device busy.
bool is_typical(const Call& call) {
  return call.rows <= kTypicalRows && call.rows * call.classes <= kTypicalElements;
}

template <class A>
int64_t forward_bytes(const Call& call, const Choice& choice, const Plan& plan) {
  Forward<A> f{};
  Parts memory(nullptr);
  take_forward_parts(memory, f, call, choice, plan);
  return memory.bytes();
}

int64_t forward_elements(const Call& call, bool tiled) {
  const Choice choice(call);
  const Plan plan(call, choice, current_device(), tiled);
  if (call.storage == Storage::f64)
    return forward_bytes<double>(call, choice, plan) / int64_t(sizeof(double));
  return forward_bytes<float>(call, choice, plan) / int64_t(sizeof(float));
}

template <class A>
ForwardLaunch<A> forward_launch(const Call& call, const SortedTargets& sorted, const Choice& choice,
                                const Plan& plan, void* saved, Parts& memory) {
  ForwardLaunch<A> p{};
  p.problem = make_problem<A>(call, choice);
  take_forward_parts(memory, p.forward, call, choice, plan);
  p.saved =
      saved_in(saved ? static_cast<A*>(saved) : p.forward.own_saved, call.rows, slots(call), choice.padded);
  p.forward.saves = saved != nullptr;
  p.forward.sorted = sorted.label, p.forward.order = sorted.row;
  p.forward.parts = plan.parts, p.forward.items = plan.items;
  p.forward.table_bytes = current_device().table_bytes();
  p.forward.bad_label = bad_label_word();
  return p;
}

// Blocks of a kernel that goes over `items` of them in a loop
int grid(int64_t items) {
  const int64_t most = int64_t(current_device().processors) * 8;
  return int(std::clamp<int64_t>(items, 1, most));
}

// The launches that tell the rows of each class and their statistics
template <class A>
void launch_statistics(const TiledKernels<A>& kernels, const ForwardLaunch<A>& p, const Plan& plan,
                       cudaStream_t stream, const Call& call) {
  launch(kernels.count_classes, plan.finders, kSmallShared, stream, p, call);
  launch(kernels.list_classes, plan.finders, kSmallShared, stream, p, call);
  launch(kernels.statistics, grid(p.problem.rows), block_bytes<A>(p), stream, p, call);
}

template <class T, class A = typename T::A>
void forward_tiled(const ForwardLaunch<A>& p, const Plan& plan, cudaStream_t stream, const Call& call) {
  const TiledKernels<A> kernels = tiled_kernels<T>();
  const int items = grid(int64_t(p.problem.slots) * plan.parts), classes = grid(p.problem.slots);
  const int bytes = block_bytes<A>(p);
  launch_statistics(kernels, p, plan, stream, call);
  if (p.problem.has_cmi) launch(kernels.divergences, items, bytes, stream, p, call);
  launch(kernels.sum_classes, classes, bytes, stream, p, call);
  if (p.problem.has_cmi && !p.problem.centroids) {
    launch(kernels.centred_parts, items, bytes, stream, p, call);
    launch(kernels.growths, classes, bytes, stream, p, call);
    launch(kernels.centred_divergences, items, bytes, stream, p, call);
    launch(kernels.sum_again, classes, bytes, stream, p, call);
  }
  launch(kernels.value, plan.finders, kSmallShared, stream, p, call);
}

// The gradient that is wanted in `out`; null: none
template <class A>
Backward<A> gradient_in(void* out, const Call& call) {
  Backward<A> w{};
  w.out = out;
  w.out_vector = call.classes % kVector == 0;
  w.table_bytes = current_device().table_bytes();
  return w;
}

// Calls f(Kind, launch, plan) for a call of the forward kernels. `saved` null: it is in the scratch.
template <class F>
void with_forward(const Call& call, const SortedTargets& sorted, bool tiled, void* saved, void* scratch,
                  F f) {
  const Choice choice(call);
  const Plan plan(call, choice, current_device(), tiled);
  with_kind(call, choice, [&](auto kind) {
    Parts memory(scratch);
    auto p = forward_launch<typename decltype(kind)::A>(call, sorted, choice, plan, saved, memory);
    f(kind, p, plan);
  });
}

// The gradient from what forward saved; `scratch` for reduction "none" alone
template <class T, class A = typename T::A>
void launch_gradient(const Problem<A>& problem, const Saved<A>& saved, Backward<A> w, A* scratch,
                     cudaStream_t stream, const Call& call) {
  w.upstream = scratch;
  w.dots = scratch ? scratch + call.rows : nullptr;
  w.items = 4 * current_device().processors;
  w.parts = int(std::clamp<int64_t>(narrow_tiles(call), 1, w.items));
  const BackwardLaunch<A> p{problem, saved, w};
  const int bytes = Sizes<A>::fixed + w.table_bytes;
  if (call.reduction == kNone && problem.has_cmi && !call.centroids)
    launch(row_dots_kernel<T>(), grid(slots(call)), bytes, stream, p, call);
  launch(gradient_kernel<T>(), grid(int64_t(slots(call)) * w.parts), bytes, stream, p, call);
}

// The fused kernel: the value, and with `out` the gradient
template <class T, class A = typename T::A>
void launch_fused(ForwardLaunch<A>& p, const Backward<A>& w, const Plan& plan, cudaStream_t stream,
                  const Call& call) {
  // A part begins where 16 bytes do, and ends where a vector does: what is beyond is another's.
  constexpr int64_t unit = std::max<int64_t>(16 / sizeof(typename T::S), kVector);
  if (call.rows > kMostGrouped)
    throw std::runtime_error("cmim_kernels: one kernel groups up to " + std::to_string(kMostGrouped) +
                             " rows, got " + std::to_string(call.rows));
  const DeviceLimits& device = current_device();
  const int blocks = slots(call) * plan.parts;
  Forward<A>& f = p.forward;
  p.backward = w;
  while (1 << f.log2_parts < plan.parts) ++f.log2_parts;
  f.width = int(((call.classes + plan.parts - 1) / plan.parts + unit - 1) / unit * unit);
  f.ticket = ticket(device, stream, f.ticket);
  f.chip_bytes = device.room_for_rows(block_bytes<A>(p), blocks);
  launch(fused_kernel<T>(), blocks, block_bytes<A>(p), stream, p, call, plan.parts);
}

}  // namespace

void set_path(Path path) {
  g_path = path;
}

bool wants_sorted_targets(const Call& call) {
  const Path path = g_path;
  return path == Path::automatic ? !is_typical(call) : path == Path::tiled;
}

int64_t forward_scratch(const Call& call) {
  return forward_elements(call, wants_sorted_targets(call));
}

int64_t centroids_scratch(const Call& call) {
  return forward_elements(call, true);
}

int64_t kept_scratch(const Call& call) {
  return forward_elements(call, false);
}

int64_t backward_scratch(const Call& call) {
  return call.reduction == kNone ? call.rows * (1 + Choice(call).padded) : 0;
}

bool can_keep_gradient(const Call& call) {
  return (call.reduction == kMean || call.reduction == kSum) && call.storage != Storage::f16 &&
         is_typical(call);
}

void forward(const Call& call, const SortedTargets& sorted, void* value, void* saved, void* gradient,
             void* scratch, cudaStream_t stream) {
  with_forward(call, sorted, wants_sorted_targets(call), saved, scratch, [&](auto kind, auto& p, auto& plan) {
    using T = decltype(kind);
    using A = typename T::A;
    p.forward.value = static_cast<A*>(value);
    const Backward<A> w = gradient_in<A>(gradient, call);
    if (!plan.tiled) return launch_fused<T>(p, w, plan, stream, call);
    forward_tiled<T>(p, plan, stream, call);
    if (gradient) launch_gradient<T>(p.problem, p.saved, w, static_cast<A*>(nullptr), stream, call);
  });
}

void backward_of_kept(const Call& call, const void* grad, const void* kept, void* out, void* scratch,
                      cudaStream_t stream) {
  with_forward(call, {}, false, nullptr, scratch, [&](auto kind, auto& p, auto& plan) {
    using T = decltype(kind);
    using A = typename T::A;
    Backward<A> w = gradient_in<A>(out, call);
    w.grad = static_cast<const A*>(grad);
    w.kept = kept;
    p.forward.bad_label = nullptr;  // forward has told
    launch_fused<T>(p, w, plan, stream, call);
  });
}

void class_centroids(const Call& call, const SortedTargets& sorted, void* centroids, int64_t* counts,
                     void* scratch, cudaStream_t stream) {
  with_forward(call, sorted, true, nullptr, scratch, [&](auto kind, auto& p, auto& plan) {
    using T = decltype(kind);
    using A = typename T::A;
    p.forward.value = nullptr;
    p.forward.centroids = static_cast<A*>(centroids), p.forward.counts = counts;
    const TiledKernels<A> kernels = tiled_kernels<T>();
    launch_statistics(kernels, p, plan, stream, call);
    launch(kernels.centroids, grid(int64_t(slots(call)) * plan.parts), block_bytes<A>(p), stream, p, call);
    launch(kernels.value, plan.finders, kSmallShared, stream, p, call);
  });
}

void backward(const Call& call, const void* grad, int64_t grad_stride, void* saved, void* out, void* scratch,
              cudaStream_t stream) {
  const Choice choice(call);
  with_kind(call, choice, [&](auto kind) {
    using T = decltype(kind);
    using A = typename T::A;
    Backward<A> w = gradient_in<A>(out, call);
    w.grad = static_cast<const A*>(grad), w.grad_stride = grad_stride;
    launch_gradient<T>(make_problem<A>(call, choice),
                       saved_in(static_cast<A*>(saved), call.rows, slots(call), choice.padded), w,
                       static_cast<A*>(scratch), stream, call);
  });
}

}  // namespace cmim::cuda
