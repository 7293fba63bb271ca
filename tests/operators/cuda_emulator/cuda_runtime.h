// Enough of CUDA to run csrc/cuda/kernels.cu on a CPU, compiled as C++. A block is an operating system's thread, which
// gives it its own shared memory; its CUDA threads are coroutines, which take turns at barriers and shuffles only. Each
// warp runs as far as it gets, from the first to the last or the other way round: a barrier that is missing shows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __grid_constant__
#define __launch_bounds__(threads)

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorCooperativeLaunchTooLarge };
enum cudaDeviceAttr { cudaDevAttrCooperativeLaunch, cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeCooperative };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  uint32_t gridDim, blockDim;
  cudaStream_t stream;
  const cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct Index {
  uint32_t x;
};
inline thread_local Index threadIdx, blockIdx, gridDim;

namespace emulator {

// Runs `kernel` in each thread of each block; all blocks at the same time if they are to wait for each other.
void run(uint32_t blocks, uint32_t threads, bool together, const std::function<void()>& kernel);

constexpr uint32_t kBlocksAtATime = 4;  // that fit on the emulated device
constexpr size_t kMaxArguments = 32764;

void wait_for_warp();
void wait_for_block();
void wait_for_grid();

// What lane `source` of this thread's warp gives; its own if there is no such lane.
template <typename T>
T shuffle(T x, int source) {
  static thread_local T lanes[1024];
  lanes[threadIdx.x] = x;
  wait_for_warp();
  const T result = 0 <= source && source < 32 ? lanes[threadIdx.x / 32 * 32 + source] : x;
  wait_for_warp();
  return result;
}

}  // namespace emulator

using std::fma;
using std::isfinite;
using std::min;
using std::sqrt;

inline void __syncthreads() {
  emulator::wait_for_block();
}

template <typename T>
T __shfl_down_sync(uint32_t, T x, int distance) {
  return emulator::shuffle(x, static_cast<int>(threadIdx.x % 32) + distance);
}

template <typename T>
T __shfl_up_sync(uint32_t, T x, int distance) {
  return emulator::shuffle(x, static_cast<int>(threadIdx.x % 32) - distance);
}

inline uint32_t atomicAdd(uint32_t* address, uint32_t x) {
  const uint32_t before = *address;
  *address += x;
  return before;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrCooperativeLaunch ? 1 : emulator::kBlocksAtATime;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "the launch is not possible";
}

// Synchronous.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const bool together = config->numAttrs == 1 && config->attrs->val.cooperative == 1;
  const bool small_enough = (0 + ... + sizeof(Parameters)) <= emulator::kMaxArguments;
  if (config->gridDim == 0 || config->blockDim > 1024 || !small_enough) return cudaErrorInvalidConfiguration;
  if (together && config->gridDim > emulator::kBlocksAtATime) return cudaErrorCooperativeLaunchTooLarge;
  emulator::run(config->gridDim, config->blockDim, together, [&] { kernel(arguments...); });
  return cudaSuccess;
}
