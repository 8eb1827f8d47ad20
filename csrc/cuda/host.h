// The host's side of a launch: what the device can hold, counters that outlive a call, and the word through
// which a kernel tells of a bad label.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace cmim::cuda {

[[noreturn]] inline void fail(cudaError_t error, const std::string& what) {
  throw std::runtime_error("cmim_kernels: " + what + ": " + cudaGetErrorString(error));
}
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(error, what);
}

struct DeviceLimits {
  int index, processors;
  int shared_per_block, shared_per_processor, shared_reserved;  // bytes
  bool has_clusters;  // and its code waits for their blocks, see cluster_barrier()

  // Consumer cards have 100 KB a multiprocessor: with the smaller table two blocks fit.
  int table_bytes() const { return shared_per_processor >= 160 * 1024 ? 32 * 1024 : 16 * 1024; }

  // What is left for a class's rows beside `used` bytes: all of it where there are no more blocks than
  // multiprocessors, else what lets two blocks share one.
  int room_for_rows(int used, int64_t blocks) const {
    const int each = blocks <= processors ? shared_per_block : shared_per_processor / 2 - shared_reserved;
    return std::max(0, std::min(each, shared_per_block) - used) / 16 * 16;
  }
};

const DeviceLimits& current_device();

// A counter of finished blocks that is zero when a launch on `stream` begins. `own` is a word of the call's
// memory, for the case that there is no other.
unsigned* ticket(const DeviceLimits& device, cudaStream_t stream, unsigned* own);

// Host memory that kernels can write, where they tell of a label out of range; see kRowBits.
int64_t* bad_label_word();

// Allows a kernel the shared memory it asks for; once for each kernel and device.
void allow_shared_memory(const void* kernel, int device, int bytes);

}  // namespace cmim::cuda
