#include <cuda_runtime.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <utility>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

// Not a power of two: hundreds of stacks that lie alike in their pages share the same few sets of a cache.
constexpr size_t kStack = 65 * 1024 + 64;
constexpr int kWarp = 32;

// Set by the tests
int g_order = 0;        // 0: ascending, 1: descending, else: the seed of a shuffle
int g_processors = 3;   // multiprocessors of the emulated device
int g_shared_kb = 227;  // shared memory a block may have
bool g_capturing = false;
int g_code = 90;  // the architecture for which the kernels were compiled
uint64_t g_launches = 0;

struct Cluster {
  int live = 0, at_barrier = 0;  // threads
  unsigned round = 0;
};
struct Warp {
  uint64_t given[2][kWarp];
  int arrived = 0;
  unsigned round = 0;
};
struct BlockState {
  unsigned index = 0;
  int live = 0, at_barrier = 0;
  int voted[2] = {};
  unsigned round = 0;
  unsigned char* shared = nullptr;
  Cluster* cluster = nullptr;
  std::vector<Warp> warps;
};
struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  unsigned thread = 0;
  BlockState* block = nullptr;
  const unsigned* waits_for = nullptr;  // resumed when this is no longer `round`
  unsigned round = 0;
  bool done = false;
};

Fiber* g_now = nullptr;
void* g_scheduler = nullptr;
void (*g_body)(const void*) = nullptr;
const void* g_argument = nullptr;

// Saves the caller's registers on its stack, and goes on where `to` was left: by a jump, since a processor
// foresees that a return goes to the latest call.
extern "C" void emulator_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size emulator_switch,.-emulator_switch
)");
#else
  #error "the emulator's context switch is written for x86-64"
#endif

void run_fiber() {
  g_body(g_argument);
  g_now->done = true;
  --g_now->block->live;
  --g_now->block->cluster->live;
  emulator_switch(&g_now->stack_pointer, g_scheduler);
  std::abort();
}

void prepare(Fiber& f) {
  // as emulator_switch leaves a stack: six registers, then where to return to, aligned as after a call
  auto top = reinterpret_cast<uintptr_t>(f.stack + kStack) / 16 * 16 - 8;
  auto* p = reinterpret_cast<void**>(top);
  *--p = reinterpret_cast<void*>(&run_fiber);
  for (int i = 0; i < 6; ++i) *--p = nullptr;
  f.stack_pointer = p;
  f.done = false;
  f.waits_for = nullptr;
}

bool can_go_on(const Fiber& f) {
  return !f.done && !(f.waits_for && *f.waits_for == f.round);
}
void become(Fiber& f) {
  g_now = &f;
  threadIdx.x = f.thread;
  blockIdx.x = f.block->index;
}

// In ascending order the warp's next thread goes on at once, without a look at all the others, so that a warp
// goes as far as it can before the next one starts, and its stacks stay in the first-level cache. In the
// other orders all threads go in step.
void wait_until_changed(const unsigned* what, unsigned round) {
  Fiber& me = *g_now;
  me.waits_for = what;
  me.round = round;
  Fiber& next = me.thread % kWarp == kWarp - 1 ? (&me)[1 - kWarp] : (&me)[1];
  if (g_order == 0 && can_go_on(next)) {
    become(next);
    emulator_switch(&me.stack_pointer, next.stack_pointer);
  } else {
    emulator_switch(&me.stack_pointer, g_scheduler);
  }
  me.waits_for = nullptr;
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulator: %s in block %u\n", what, blockIdx.x);
  std::abort();
}

// Resumes a fiber, unless it waits or is done; returns whether it did.
bool resume(Fiber& f) {
  if (!can_go_on(f)) return false;
  become(f);
  emulator_switch(&g_scheduler, f.stack_pointer);
  return true;
}

// Resumes one fiber after the other, in the order asked for, until all are done.
void run_all(std::vector<Fiber>& fibers) {
  std::vector<unsigned> order(fibers.size());
  for (unsigned i = 0; i < order.size(); ++i) order[i] = g_order == 1 ? unsigned(order.size()) - 1 - i : i;
  uint64_t random = uint64_t(g_order) * 0x9e3779b97f4a7c15u + 1;
  for (;;) {
    if (g_order > 1)
      for (size_t i = order.size() - 1; i > 0; --i) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        std::swap(order[i], order[(random >> 33) % (i + 1)]);
      }
    bool any_ran = false;
    for (unsigned i : order) any_ran |= resume(fibers[i]);
    if (any_ran) continue;
    for (const Fiber& f : fibers)
      if (!f.done) fail("threads wait at a barrier or an exchange that the others never reach");
    return;
  }
}

// `bytes` that end beside a page that may not be touched, with another such page before them
unsigned char* guarded(size_t bytes) {
  static const size_t page = 4096;
  const size_t size = (bytes + page - 1) / page * page;
  void* p = mmap(nullptr, size + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) fail("no memory");
  char* const begin = static_cast<char*>(p) + page;
  mprotect(p, page, PROT_NONE);
  mprotect(begin + size, page, PROT_NONE);
  return reinterpret_cast<unsigned char*>(begin + size - bytes);
}

}  // namespace

unsigned char* emulated_shared_memory() {
  return g_now->block->shared;
}

void __syncthreads() {
  BlockState& b = *g_now->block;
  const unsigned round = b.round;
  if (++b.at_barrier == b.live) {
    if (b.live != int(blockDim.x)) fail("a barrier after some threads have ended");
    b.at_barrier = 0;
    ++b.round;
    return;
  }
  wait_until_changed(&b.round, round);
}

int __syncthreads_or(int vote) {
  BlockState& b = *g_now->block;
  const unsigned round = b.round;
  if (b.at_barrier == 0) b.voted[round % 2] = 0;
  b.voted[round % 2] |= vote;
  __syncthreads();
  return b.voted[round % 2];
}

int emulated_code_version() {
  return g_code;
}
void emulated_cluster_barrier() {
  if (g_code < 90) return;
  Cluster& c = *g_now->block->cluster;
  const unsigned round = c.round;
  if (++c.at_barrier == c.live) {
    c.at_barrier = 0;
    ++c.round;
    return;
  }
  wait_until_changed(&c.round, round);
}

void emulated_copy16(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("a copy of 16 bytes that is not aligned");
  std::memcpy(to, from, 16);
}

uint64_t emulated_exchange(uint64_t mine, int from) {
  Warp& w = g_now->block->warps[g_now->thread / kWarp];
  const unsigned round = w.round;
  uint64_t* given = w.given[round % 2];
  given[g_now->thread % kWarp] = mine;
  if (++w.arrived == kWarp) {
    w.arrived = 0;
    ++w.round;
  } else {
    wait_until_changed(&w.round, round);
  }
  return given[from];
}

unsigned __ballot_sync(unsigned, bool vote) {
  Warp& w = g_now->block->warps[g_now->thread / kWarp];
  const unsigned round = w.round;
  emulated_exchange(vote, 0);
  unsigned votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) votes |= unsigned(w.given[round % 2][lane] != 0) << lane;
  return votes;
}

cudaError_t emulated_launch(const cudaLaunchConfig_t& config, void (*body)(const void*),
                            const void* argument) {
  ++g_launches;
  const unsigned blocks = config.gridDim.x, threads = config.blockDim.x;
  const unsigned together = config.numAttrs > 0 ? config.attrs->val.clusterDim.x : 1;
  const size_t bytes = config.dynamicSmemBytes;
  if (bytes > size_t(g_shared_kb) * 1024 || blocks == 0) return cudaErrorInvalidValue;
  if (together == 0 || together > 8 || blocks % together != 0) return cudaErrorInvalidValue;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  g_body = body;
  g_argument = argument;

  static std::vector<char*> stacks;
  while (stacks.size() < threads * together) stacks.push_back(static_cast<char*>(std::malloc(kStack)));
  static std::map<size_t, std::vector<unsigned char*>> memory;  // by size, since its end is guarded
  auto& shared = memory[bytes];
  while (shared.size() < together) shared.push_back(guarded(bytes));
  Cluster cluster;
  std::vector<BlockState> block(together);
  std::vector<Fiber> fibers(threads * together);
  for (unsigned i = 0; i < blocks; i += together) {
    cluster.live = int(threads * together);
    for (unsigned member = 0; member < together; ++member) {
      BlockState& b = block[member];
      b.index = (g_order == 1 ? blocks - together - i : i) + member;
      b.live = int(threads);
      b.cluster = &cluster;
      b.shared = shared[member];
      b.warps.resize(threads / kWarp);
      std::memset(b.shared, 0xff, bytes);  // NaN
      for (unsigned t = 0; t < threads; ++t) {
        Fiber& f = fibers[member * threads + t];
        f.stack = stacks[member * threads + t];
        f.thread = t, f.block = &b;
        prepare(f);
      }
    }
    run_all(fibers);
    if (cluster.at_barrier != 0) fail("threads that wait for blocks which have ended");
  }
  return cudaSuccess;
}

float emulated_half_to_float(uint16_t bits) {
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return float(h);
}
uint16_t emulated_float_to_half(float x) {
  const _Float16 h = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "invalid value";
}
cudaError_t cudaGetDevice(int* device) {
  // What is known of one device does not hold for the next.
  *device = (g_processors * 1024 + g_shared_kb) * 256 + g_code;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount                ? g_processors
           : which == cudaDevAttrClusterLaunch                    ? 1
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin     ? g_shared_kb * 1024
           : which == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? (g_shared_kb + 1) * 1024
                                                                  : 1024;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return value <= g_shared_kb * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = g_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  *p = std::calloc(1, bytes);
  return cudaSuccess;
}
// What the binding takes from a CUDA build of PyTorch
extern "C" {
int32_t aoti_torch_create_cuda_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_cuda_guard(void*) {
  return 0;
}
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// For the tests
__attribute__((visibility("default"))) void emulator_set(int order, int processors, int shared_kb,
                                                         int capturing, int code) {
  g_order = order, g_processors = processors, g_shared_kb = shared_kb, g_capturing = capturing != 0;
  g_code = code;
}
__attribute__((visibility("default"))) uint64_t emulator_launches() {
  return g_launches;
}
__attribute__((visibility("default"))) void* emulator_guarded(uint64_t bytes) {
  return guarded(bytes);
}
}
