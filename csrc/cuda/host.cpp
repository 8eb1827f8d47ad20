#include "host.h"

#include <mutex>
#include <unordered_map>

#include "launch.h"

namespace cmim::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "reading a device attribute");
  return value;
}

std::mutex& mutex() {
  static std::mutex m;
  return m;
}

// What must not be asked for while a stream is capturing: memory, or code that is not loaded yet.
class WhileNotCapturing {
 public:
  WhileNotCapturing() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~WhileNotCapturing() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

int64_t* g_bad_label = nullptr;

}  // namespace

const DeviceLimits& current_device() {
  static std::unordered_map<int, DeviceLimits> known;
  int device = 0;
  check(cudaGetDevice(&device), "finding the current device");
  const std::lock_guard<std::mutex> lock(mutex());
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const WhileNotCapturing guard;
  const DeviceLimits limits{device,
                            attribute(cudaDevAttrMultiProcessorCount, device),
                            attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                            attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                            attribute(cudaDevAttrReservedSharedMemoryPerBlock, device),
                            attribute(cudaDevAttrClusterLaunch, device) != 0 && code_version() >= 90};
  return known.emplace(device, limits).first->second;
}

// Launches on one stream follow each other, and the last block leaves the counter at zero: a stream needs one
// counter. A captured launch may be replayed on any stream, so each capture gets a counter of its own. When
// all are given away, the call's own word is cleared by one more operation on the stream.
unsigned* ticket(const DeviceLimits& device, cudaStream_t stream, unsigned* own) {
  static std::unordered_map<int, unsigned*> tables;
  static std::unordered_map<unsigned long long, int> of_stream;
  static int given = 0;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capturing), "asking whether the stream is capturing");
  int mine = -1;
  unsigned* table = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex());
    unsigned*& known = tables[device.index];
    if (!known) {
      const WhileNotCapturing guard;
      known = ticket_table();
    }
    table = known;
    if (capturing == cudaStreamCaptureStatusNone) {
      unsigned long long id = 0;
      check(cudaStreamGetId(stream, &id), "identifying the stream");
      const auto found = of_stream.find(id);
      if (found != of_stream.end())
        mine = found->second;
      else if (given < kTickets)
        of_stream[id] = mine = given++;
    } else if (given < kTickets) {
      mine = given++;
    }
  }
  if (mine >= 0) return table + mine;
  check(cudaMemsetAsync(own, 0, sizeof(unsigned), stream), "clearing a counter");
  return own;
}

int64_t* bad_label_word() {
  const std::lock_guard<std::mutex> lock(mutex());
  if (g_bad_label) return g_bad_label;
  const WhileNotCapturing guard;
  void* word = nullptr;
  check(cudaHostAlloc(&word, sizeof(int64_t), cudaHostAllocPortable | cudaHostAllocMapped),
        "allocating a word of host memory");
  g_bad_label = static_cast<int64_t*>(word);
  *g_bad_label = 0;
  return g_bad_label;
}

void check_labels() {
  const std::lock_guard<std::mutex> lock(mutex());
  volatile int64_t* const word = g_bad_label;
  if (!word || *word == 0) return;
  const int64_t packed = *word, row = (packed & ((int64_t(1) << kRowBits) - 1)) - 1,
                label = packed >> kRowBits;
  *word = 0;
  throw std::runtime_error("target: expected labels in [0, C) or ignore_index in an earlier call, got " +
                           std::to_string(label) + " at row " + std::to_string(row) +
                           "; the loss of that call is NaN");
}

void allow_shared_memory(const void* kernel, int device, int bytes) {
  static std::unordered_map<const void*, std::unordered_map<int, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex());
  int& before = allowed[kernel][device];
  if (before >= bytes) return;
  const WhileNotCapturing guard;  // the first call for a kernel loads its code
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) fail(error, "asking for " + std::to_string(bytes) + " bytes of shared memory");
  before = bytes;
}

}  // namespace cmim::cuda
