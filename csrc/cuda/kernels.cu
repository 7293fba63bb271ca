// The operators on the GPU. A list of tensors is a table of rows in the kernel's argument; a block works on one chunk
// of one row. Whatever is summed is summed in one order, with no float atomics.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../numerics.h"
#include "kernels.h"

namespace esam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWideThreads = 1024;      // of kernels that run as one block
constexpr int kLanes = 1024;            // partial sums are added up in so many lanes, whatever the block's size
constexpr int64_t kChunk = 8192;        // elements of a block
constexpr int64_t kMaxRow = 1LL << 30;  // elements; longer tensors take several rows
constexpr int kArgumentBytes = 32764;   // what a kernel takes since CUDA 12.1
constexpr int kOtherArguments = 64;     // of these, left for what stands beside the rows

template <typename T>
using Compute = typename ComputeType<T>::type;

// Elements that a thread works on at a time: whole groups of four, for their words, and whole accesses of 16 bytes.
template <typename P>
constexpr int kPack = sizeof(P) == 2 ? 8 : 4;

// C is the compute type.
template <typename C>
struct Row {
  void* param;
  const void* grad;
  void* backup;
  int64_t offset;
  C coefficient;
  uint32_t id;
  uint32_t size;
  uint32_t end_chunk;  // number of chunks up to and with this row
};

template <typename C>
constexpr int kMaxRows = (kArgumentBytes - kOtherArguments) / sizeof(Row<C>);

template <typename C>
struct Table {
  Row<C> rows[kMaxRows<C>];
  int count;
};

// Aligned, so that N elements are loaded and stored in as few accesses as they fit in.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

template <typename C, typename T>
__device__ C widened(T x) {
  if constexpr (std::is_same_v<T, C>) {
    return x;
  } else {
    return widen(x);
  }
}

template <int N, typename T>
__device__ Pack<T, N> load(const void* source, int64_t j) {
  return *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(source) + j);
}

template <int N, typename T>
__device__ void store(void* target, int64_t j, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(target) + j) = pack;
}

// The words of elements j, ..., j + N - 1; several only where the first opens a group of four.
template <int N, typename C>
__device__ void draw(const ElementMask& mask, Stream stream, const Row<C>& row, int64_t j, uint32_t (&words)[N]) {
  const uint64_t first = static_cast<uint64_t>(row.offset + j);
  uint32_t group[4];
  if constexpr (N == 1) {
    element_words(mask, stream, row.id, first / 4, group);
    const uint32_t k = first % 4;
    words[0] = k == 0 ? group[0] : k == 1 ? group[1] : k == 2 ? group[2] : group[3];
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      element_words(mask, stream, row.id, first / 4 + i / 4, group);
#pragma unroll
      for (int k = 0; k < 4; ++k) words[i + k] = group[k];
    }
  }
}

// m * w^(power * a) * g for N elements of one row.
template <int N, int power, typename P, typename G, typename C>
__device__ void weighted_gradient(const Row<C>& row, int64_t j, const Pack<P, N>& w, bool adaptive,
                                  const ElementMask& mask, C (&x)[N]) {
  const Pack<G, N> g = load<N, G>(row.grad, j);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = widened<C>(g.values[i]);
    if (adaptive) {
      const C weight = widened<C>(w.values[i]);
      x[i] *= power == 2 ? weight * weight : weight;
    }
  }
  if (mask.masked()) {
    uint32_t words[N];
    draw(mask, Stream::kElement, row, j, words);
    // A product, as in the reference: a gradient that is not finite makes the norm so even where it is masked.
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= words[i] < static_cast<uint32_t>(mask.threshold) ? 1 : 0;
  }
}

// What this block works on.
template <typename C>
struct Chunk {
  const Row<C>& row;
  int64_t begin, end;
};

template <typename C>
__device__ Chunk<C> find_chunk(const Table<C>& table) {
  int low = 0, high = table.count - 1;  // the first row to end after this chunk
  while (low < high) {
    const int middle = (low + high) / 2;
    if (table.rows[middle].end_chunk > blockIdx.x) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const Row<C>& row = table.rows[low];
  const int64_t begin = (blockIdx.x - (low == 0 ? 0 : table.rows[low - 1].end_chunk)) * kChunk;
  return {row, begin, min(begin + kChunk, static_cast<int64_t>(row.size))};
}

// Calls function(width, j) for all of a chunk's elements, each thread its own: kPack<P> at a time where addresses and
// words allow it, one at a time in the rest. function takes the width as a std::integral_constant.
template <typename P, typename C, typename F>
__device__ void for_each_pack(const Chunk<C>& chunk, F function) {
  const uint64_t addresses = reinterpret_cast<uint64_t>(chunk.row.param) | reinterpret_cast<uint64_t>(chunk.row.grad) |
                             reinterpret_cast<uint64_t>(chunk.row.backup);
  const bool packs = addresses % 16 == 0 && chunk.row.offset % 4 == 0;
  const int64_t packed_end = packs ? chunk.begin + (chunk.end - chunk.begin) / kPack<P> * kPack<P> : chunk.begin;
  // Not unrolled: many resident threads keep the memory busy, and an unrolled body spills registers.
#pragma unroll 1
  for (int64_t j = chunk.begin + threadIdx.x * kPack<P>; j < packed_end; j += kThreads * kPack<P>) {
    function(std::integral_constant<int, kPack<P>>(), j);
  }
#pragma unroll 1
  for (int64_t j = packed_end + threadIdx.x; j < chunk.end; j += kThreads) {
    function(std::integral_constant<int, 1>(), j);
  }
}

// The sum over a warp, in one order; only lane 0 has it.
template <typename T>
__device__ T warp_sum(T x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(0xFFFFFFFFu, x, distance);
  return x;
}

// The sum of squares of m * w^a * g over a chunk, in one order; only thread 0 has it.
template <typename P, typename G, typename C>
__device__ C squared_norm_of(const Chunk<C>& chunk, bool adaptive, const ElementMask& mask) {
  C sum = 0;
  for_each_pack<P>(chunk, [&](auto width, int64_t j) {
    constexpr int N = decltype(width)::value;
    const Pack<P, N> w = adaptive ? load<N, P>(chunk.row.param, j) : Pack<P, N>{};
    C x[N];
    weighted_gradient<N, 1, P, G>(chunk.row, j, w, adaptive, mask, x);
#pragma unroll
    for (int i = 0; i < N; ++i) sum = fma(x[i], x[i], sum);
  });
  __shared__ C warps[kThreads / 32];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  C total = 0;
  if (threadIdx.x == 0) {
    for (C warp : warps) total += warp;
  }
  return total;
}

// The sum of the partial sums, in one order for blocks of all sizes; all threads have it.
template <int kBlockThreads>
__device__ double add_up(const double* partial_sums, int64_t count) {
  __shared__ double warps[kLanes / 32];
#pragma unroll 1
  for (int lane = threadIdx.x; lane < kLanes; lane += kBlockThreads) {
    double sum = 0;
    for (int64_t i = lane; i < count; i += kLanes) sum += partial_sums[i];
    sum = warp_sum(sum);
    if (lane % 32 == 0) warps[lane / 32] = sum;
  }
  __syncthreads();
  double total = 0;
  for (double warp : warps) total += warp;
  return total;
}

template <typename P, typename G, typename C>
__device__ void perturb_chunk(const Chunk<C>& chunk, C norm, bool adaptive, const ElementMask& mask) {
  const Row<C>& row = chunk.row;
  const C scale = row.coefficient / (norm + static_cast<C>(kEps));
  const bool moves = isfinite(norm);
  for_each_pack<P>(chunk, [&](auto width, int64_t j) {
    constexpr int N = decltype(width)::value;
    Pack<P, N> w = load<N, P>(row.param, j);
    if (row.backup != nullptr) store(row.backup, j, w);
    if (!moves) return;
    C x[N];
    weighted_gradient<N, 2, P, G>(row, j, w, adaptive, mask, x);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = fma(scale, x[i], widened<C>(w.values[i]));
    if constexpr (std::is_same_v<P, C>) {
#pragma unroll
      for (int i = 0; i < N; ++i) w.values[i] = x[i];
    } else {
      if (mask.present) {
        uint32_t words[N];
        draw(mask, Stream::kRounding, row, j, words);
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = round_stochastically<P>(x[i], words[i]);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) narrow(x[i], w.values[i]);
    }
    store(row.param, j, w);
  });
}

template <typename P, typename G>
__global__ void __launch_bounds__(kThreads)
    squared_norm_kernel(const __grid_constant__ Table<Compute<P>> table, const __grid_constant__ ElementMask mask,
                        bool adaptive, double* partial_sums) {
  const Compute<P> sum = squared_norm_of<P, G>(find_chunk(table), adaptive, mask);
  if (threadIdx.x == 0) partial_sums[blockIdx.x] = sum;
}

// The sum, or its square root.
template <typename T>
__global__ void __launch_bounds__(kWideThreads)
    add_up_kernel(const double* partial_sums, int64_t count, bool root, T* result) {
  const T total = static_cast<T>(add_up<kWideThreads>(partial_sums, count));
  if (threadIdx.x == 0) *result = root ? sqrt(total) : total;
}

template <typename P, typename G>
__global__ void __launch_bounds__(kThreads)
    perturb_kernel(const __grid_constant__ Table<Compute<P>> table, const __grid_constant__ ElementMask mask,
                   bool adaptive, const void* norm, bool norm_is_double) {
  using C = Compute<P>;
  const C total = norm_is_double ? static_cast<C>(*static_cast<const double*>(norm))
                                 : static_cast<C>(*static_cast<const float*>(norm));
  perturb_chunk<P, G>(find_chunk(table), total, adaptive, mask);
}

// Both in one launch, whose blocks run at the same time and wait for each other's partial sums.
template <typename P, typename G>
__global__ void __launch_bounds__(kThreads)
    norm_and_perturb_kernel(const __grid_constant__ Table<Compute<P>> table, const __grid_constant__ ElementMask mask,
                            bool adaptive, double* partial_sums, Compute<P>* norm) {
  using C = Compute<P>;
  const Chunk<C> chunk = find_chunk(table);
  const C sum = squared_norm_of<P, G>(chunk, adaptive, mask);
  if (threadIdx.x == 0) partial_sums[blockIdx.x] = sum;
  cooperative_groups::this_grid().sync();
  const C total = sqrt(static_cast<C>(add_up<kThreads>(partial_sums, gridDim.x)));
  if (blockIdx.x == 0 && threadIdx.x == 0) *norm = total;
  perturb_chunk<P, G>(chunk, total, adaptive, mask);
}

template <typename P>
__global__ void __launch_bounds__(kThreads) restore_kernel(const __grid_constant__ Table<Compute<P>> table) {
  const Chunk<Compute<P>> chunk = find_chunk(table);
  for_each_pack<P>(chunk, [&](auto width, int64_t j) {
    store(chunk.row.param, j, load<decltype(width)::value, P>(chunk.row.backup, j));
  });
}

// Sums over the threads up to and with this one, in a block of kWideThreads; total gets that over all.
__device__ uint32_t inclusive_scan(uint32_t x, uint32_t& total) {
  __shared__ uint32_t warps[kWideThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, x, distance);
    if (lane >= distance) x += other;
  }
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  uint32_t before = 0, sum = 0;
  for (int i = 0; i < kWideThreads / 32; ++i) {
    if (i == warp) before = sum;
    sum += warps[i];
  }
  __syncthreads();
  total = sum;
  return before + x;
}

// One block. The k-th largest key is found digit by digit from the top, then the indices are written in order: those of
// larger keys, and of equal ones the first.
template <typename T>
__global__ void __launch_bounds__(kWideThreads)
    select_top_kernel(const T* before, const T* after, int64_t count, int64_t k, int64_t* indices) {
  using Key = decltype(order_key(T{}));
  constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
  __shared__ uint32_t histogram[kDigits];
  __shared__ uint32_t bar_digit, larger_digits;
  Key bar = 0;
  int64_t rest = k;  // how many are still to be taken among the keys that begin as the bar does
  for (int shift = 8 * sizeof(Key) - kDigitBits; shift >= 0; shift -= kDigitBits) {
    if (threadIdx.x < kDigits) histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += kWideThreads) {
      const Key difference = order_key(after[i] - before[i]) ^ bar;
      // Twice, since a shift by all of a key's bits is undefined.
      if (difference >> shift >> kDigitBits == 0) atomicAdd(&histogram[(difference >> shift) % kDigits], 1u);
    }
    __syncthreads();
    // Thread t has the t-th largest digit.
    const uint32_t digit = kDigits - 1 - threadIdx.x % kDigits;
    const uint32_t here = threadIdx.x < kDigits ? histogram[digit] : 0;
    uint32_t total;
    const uint32_t upto = inclusive_scan(here, total);
    if (upto >= rest && upto - here < rest) {
      bar_digit = digit;
      larger_digits = upto - here;
    }
    __syncthreads();
    bar |= static_cast<Key>(bar_digit) << shift;
    rest -= larger_digits;
  }
  int64_t larger_before = 0, equal_before = 0;
  for (int64_t start = 0; start < count; start += kWideThreads) {
    const int64_t i = start + threadIdx.x;
    const Key key = i < count ? order_key(after[i] - before[i]) : 0;
    const bool larger = i < count && key > bar, equal = i < count && key == bar;
    uint32_t total;
    const uint32_t both = inclusive_scan(static_cast<uint32_t>(larger) << 16 | static_cast<uint32_t>(equal), total);
    const int64_t larger_upto = larger_before + (both >> 16), equal_upto = equal_before + (both & 0xFFFFu);
    if (larger || (equal && equal_upto <= rest)) indices[larger_upto + min(equal_upto, rest) - 1] = i;
    larger_before += total >> 16;
    equal_before += total & 0xFFFFu;
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Asynchronous; blocks that wait for each other are launched cooperatively.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), uint32_t blocks, int threads, void* stream, bool cooperatively,
                   const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cooperatively ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// How many blocks of a kernel the current device runs at the same time, if it can launch cooperatively.
template <typename... Parameters>
uint32_t count_resident_blocks(void (*kernel)(Parameters...)) {
  int device = 0, can_cooperate = 0, processors = 0, blocks = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&can_cooperate, cudaDevAttrCooperativeLaunch, device));
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
  return can_cooperate * processors * blocks;
}

int64_t count_chunks(int64_t size) {
  return (size + kChunk - 1) / kChunk;
}

// Calls function(P{}, G{}, table, blocks) for as many tables as the operands of these types fill.
template <typename P, typename G, typename F>
void for_each_table_of(const std::vector<Operand>& operands, DType dtype, DType grad_dtype, F function) {
  using C = Compute<P>;
  Table<C> table;
  table.count = 0;
  uint32_t blocks = 0;
  const auto flush = [&] {
    if (table.count == 0) return;
    function(P{}, G{}, table, blocks);
    table.count = 0;
    blocks = 0;
  };
  for (const Operand& operand : operands) {
    if (operand.dtype != dtype || operand.grad_dtype != grad_dtype) continue;
    for (int64_t start = 0; start < operand.size; start += kMaxRow) {
      const int64_t size = std::min(operand.size - start, kMaxRow);
      if (table.count == kMaxRows<C> || blocks + count_chunks(size) > INT32_MAX) flush();
      blocks += static_cast<uint32_t>(count_chunks(size));
      Row<C>& row = table.rows[table.count++];
      row.param = static_cast<P*>(operand.param) + start;
      row.grad = operand.grad == nullptr ? nullptr : static_cast<const G*>(operand.grad) + start;
      row.backup = operand.backup == nullptr ? nullptr : static_cast<P*>(operand.backup) + start;
      row.offset = operand.offset + start;
      row.coefficient = static_cast<C>(operand.coefficient);
      row.id = operand.id;
      row.size = static_cast<uint32_t>(size);
      row.end_chunk = blocks;
    }
  }
  flush();
}

template <typename F>
void for_each_table(const std::vector<Operand>& operands, F function) {
  for_each_table_of<float, float>(operands, DType::kFloat, DType::kFloat, function);
  for_each_table_of<double, double>(operands, DType::kDouble, DType::kDouble, function);
  for_each_table_of<BFloat16, BFloat16>(operands, DType::kBFloat16, DType::kBFloat16, function);
  for_each_table_of<BFloat16, float>(operands, DType::kBFloat16, DType::kFloat, function);
  for_each_table_of<Half, Half>(operands, DType::kHalf, DType::kHalf, function);
  for_each_table_of<Half, float>(operands, DType::kHalf, DType::kFloat, function);
}

// result <- the sum of squares, or its square root.
void sum_squares(const std::vector<Operand>& operands, bool adaptive, const ElementMask& mask, double* partial_sums,
                 bool root, void* result, bool result_is_double, void* stream) {
  int64_t count = 0;
  for_each_table(operands, [&](auto p, auto g, const auto& table, uint32_t blocks) {
    const auto kernel = squared_norm_kernel<decltype(p), decltype(g)>;
    check(launch(kernel, blocks, kThreads, stream, false, table, mask, adaptive, partial_sums + count));
    count += blocks;
  });
  const double* const sums = partial_sums;
  if (result_is_double) {
    check(launch(add_up_kernel<double>, 1, kWideThreads, stream, false, sums, count, root, static_cast<double*>(result)));
  } else {
    check(launch(add_up_kernel<float>, 1, kWideThreads, stream, false, sums, count, root, static_cast<float*>(result)));
  }
}

// Whether the operands were few and small enough to be perturbed by one launch, and have been.
bool perturb_in_one_launch(const std::vector<Operand>& operands, bool adaptive, const ElementMask& mask,
                           double* partial_sums, void* norm, bool norm_is_double, void* stream) {
  bool done = false;
  for_each_table(operands, [&](auto p, auto g, const auto& table, uint32_t blocks) {
    using C = Compute<decltype(p)>;
    const auto kernel = norm_and_perturb_kernel<decltype(p), decltype(g)>;
    // Empty tensors may make the norm wider than all that is moved.
    if (norm_is_double != std::is_same_v<C, double> || blocks != count_partial_sums(operands)) return;
    if (blocks > count_resident_blocks(kernel)) return;
    const cudaError_t error = launch(kernel, blocks, kThreads, stream, true, table, mask, adaptive, partial_sums,
                                     static_cast<C*>(norm));
    done = error == cudaSuccess;
    // Where a process is given a part of the device, less fits than the device says.
    if (error == cudaErrorCooperativeLaunchTooLarge) {
      cudaGetLastError();
    } else {
      check(error);
    }
  });
  return done;
}

}  // namespace

int64_t count_partial_sums(const std::vector<Operand>& operands) {
  int64_t count = 0;
  for (const Operand& operand : operands) count += count_chunks(operand.size);
  return count;
}

void squared_norm(const std::vector<Operand>& operands, bool adaptive, const ElementMask& mask, double* partial_sums,
                  void* result, bool result_is_double, void* stream) {
  sum_squares(operands, adaptive, mask, partial_sums, false, result, result_is_double, stream);
}

void perturb(const std::vector<Operand>& operands, const void* norm, bool norm_is_double, bool adaptive,
             const ElementMask& mask, void* stream) {
  for_each_table(operands, [&](auto p, auto g, const auto& table, uint32_t blocks) {
    const auto kernel = perturb_kernel<decltype(p), decltype(g)>;
    check(launch(kernel, blocks, kThreads, stream, false, table, mask, adaptive, norm, norm_is_double));
  });
}

void norm_and_perturb(const std::vector<Operand>& operands, bool adaptive, const ElementMask& mask,
                      double* partial_sums, void* norm, bool norm_is_double, void* stream) {
  if (perturb_in_one_launch(operands, adaptive, mask, partial_sums, norm, norm_is_double, stream)) return;
  sum_squares(operands, adaptive, mask, partial_sums, true, norm, norm_is_double, stream);
  perturb(operands, norm, norm_is_double, adaptive, mask, stream);
}

void restore(const std::vector<Operand>& operands, void* stream) {
  for_each_table(operands, [&](auto p, auto, const auto& table, uint32_t blocks) {
    check(launch(restore_kernel<decltype(p)>, blocks, kThreads, stream, false, table));
  });
}

template <typename T>
void select_top(const T* before, const T* after, int64_t count, int64_t k, int64_t* indices, void* stream) {
  check(launch(select_top_kernel<T>, 1, kWideThreads, stream, false, before, after, count, k, indices));
}

template void select_top(const float*, const float*, int64_t, int64_t, int64_t*, void*);
template void select_top(const double*, const double*, int64_t, int64_t, int64_t*, void*);

}  // namespace esam::cuda
