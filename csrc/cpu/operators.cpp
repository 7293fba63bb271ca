// The operators on the CPU: how lists are cut into chunks, and which instruction set's kernels run over them.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "../numerics.h"
#include "kernels.h"

namespace esam::cpu {
namespace {

constexpr int64_t kChunk = 16384;  // elements; a multiple of kAlignment
constexpr int64_t kAlignment = 64;
constexpr int64_t kCacheBytes = 1 << 24;

// As ATen does it: the widest instruction set that the machine has, or ATEN_CPU_CAPABILITY (default, avx2, avx512).
const Kernels& choose_kernels() {
#ifdef ESAM_X86_64
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string limit = variable == nullptr ? "avx512" : variable;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && limit == "avx512") return kernels_avx512;
  if (avx2 && limit != "default") return kernels_avx2;
#endif
  return kernels_baseline;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

// A list laid end to end and cut every kChunk elements, whatever the tensors' sizes, so that work spreads evenly over
// threads and what a chunk holds does not depend on their number.
class Chunks {
 public:
  explicit Chunks(const std::vector<Operand>& table) {
    starts_.push_back(0);
    for (const Operand& operand : table) {
      sizes_.push_back(operand.size);
      // Tensors start at multiples of kAlignment, so that cuts fall between cache lines.
      starts_.push_back(starts_.back() + (sizes_.back() + kAlignment - 1) / kAlignment * kAlignment);
    }
  }

  int64_t count() const { return (starts_.back() + kChunk - 1) / kChunk; }

  // Calls function(chunk, i, begin, end) for every stretch of every tensor i; those of one chunk run in order on one
  // thread.
  template <typename F>
  void for_each(const F& function) const {
    torch::stable::parallel_for(0, count(), 2, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t low = chunk * kChunk, high = low + kChunk;
        // The tensor that holds the chunk's first position is the last one to start at or before it.
        size_t i = std::upper_bound(starts_.begin(), starts_.end(), low) - starts_.begin() - 1;
        for (; i < sizes_.size() && starts_[i] < high; ++i) {
          const int64_t begin = std::max<int64_t>(low - starts_[i], 0);
          const int64_t end = std::min(high - starts_[i], sizes_[i]);
          if (begin < end) function(chunk, i, begin, end);
        }
      }
    });
  }

 private:
  std::vector<int64_t> starts_, sizes_;
};

double sum_of_squares(const std::vector<Operand>& table, bool adaptive, const ElementMask& mask) {
  const Chunks chunks(table);
  std::vector<double> sums(chunks.count());
  chunks.for_each([&](int64_t chunk, size_t i, int64_t begin, int64_t end) {
    sums[chunk] += kernels().squared_norm(table[i], begin, end, adaptive, mask);
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// Whether a copy of all these would have left the caches before it is read.
bool exceed_caches(const std::vector<Operand>& table) {
  int64_t bytes = 0;
  for (const Operand& operand : table) bytes += operand.size * element_size(operand.dtype);
  return bytes > kCacheBytes;
}

void perturb(const std::vector<Operand>& table, double norm, bool adaptive, const ElementMask& mask) {
  const bool streaming = exceed_caches(table);
  Chunks(table).for_each([&](int64_t, size_t i, int64_t begin, int64_t end) {
    kernels().perturb(table[i], begin, end, norm, adaptive, mask, streaming);
  });
}

double read(const Tensor& number) {
  return number.scalar_type() == ScalarType::Double ? *number.const_data_ptr<double>()
                                                    : *number.const_data_ptr<float>();
}

// The sum of squares of these weights' gradients, or its square root, in the dtype that norms of them have.
Tensor write(const Tensors& params, double sum, bool root) {
  const ScalarType dtype = norm_dtype(params);
  Tensor result = torch::stable::new_empty(params[0], {}, dtype);
  if (dtype == ScalarType::Double) {
    *result.mutable_data_ptr<double>() = root ? std::sqrt(sum) : sum;
  } else {
    const float narrowed = static_cast<float>(sum);
    *result.mutable_data_ptr<float>() = root ? std::sqrt(narrowed) : narrowed;
  }
  return result;
}

Tensor squared_norm(const Tensors& params, const Tensors& grads, bool adaptive, int64_t seed, int64_t step,
                    int64_t threshold, const Ints& tensor_ids, const Ints& offsets) {
  std::vector<Operand> table = operands(params);
  add_grads(params, grads, table);
  const ElementMask mask = add_mask(seed, step, threshold, tensor_ids, offsets, table);
  return write(params, sum_of_squares(table, adaptive, mask), false);
}

void perturb_(const Tensors& params, const Tensors& grads, const Tensors& backups,
              const std::vector<double>& coefficients, const Tensor& norm, bool adaptive, int64_t seed, int64_t step,
              int64_t threshold, const Ints& tensor_ids, const Ints& offsets) {
  std::vector<Operand> table = operands(params);
  add_grads(params, grads, table);
  add_backups(params, backups, table);
  add_coefficients(coefficients, table);
  const ElementMask mask = add_mask(seed, step, threshold, tensor_ids, offsets, table);
  check_norm(params, norm);
  perturb(table, read(norm), adaptive, mask);
}

Tensor norm_and_perturb_(const Tensors& params, const Tensors& grads, const Tensors& backups,
                         const std::vector<double>& coefficients, bool adaptive, int64_t seed, int64_t step,
                         int64_t threshold, const Ints& tensor_ids, const Ints& offsets) {
  std::vector<Operand> table = operands(params);
  add_grads(params, grads, table);
  add_backups(params, backups, table);
  add_coefficients(coefficients, table);
  const ElementMask mask = add_mask(seed, step, threshold, tensor_ids, offsets, table);
  const Tensor norm = write(params, sum_of_squares(table, adaptive, mask), true);
  perturb(table, read(norm), adaptive, mask);
  return norm;
}

void restore_(const Tensors& params, const Tensors& backups) {
  std::vector<Operand> table = operands(params);
  STD_TORCH_CHECK(!backups.empty(), "got no backups");
  add_backups(params, backups, table);
  const bool streaming = exceed_caches(table);
  Chunks(table).for_each([&](int64_t, size_t i, int64_t begin, int64_t end) {
    const int64_t width = element_size(table[i].dtype);
    void* const target = static_cast<char*>(table[i].param) + begin * width;
    const void* const source = static_cast<const char*>(table[i].backup) + begin * width;
    if (streaming) {
      kernels().stream(target, source, (end - begin) * width);
    } else {
      std::memcpy(target, source, (end - begin) * width);
    }
  });
}

// The k largest differences by their keys: the (k)th largest key is the bar, and ties at it go to the lower index.
template <typename T>
void select_top(const T* before, const T* after, int64_t count, int64_t k, int64_t* indices) {
  using Key = decltype(order_key(T{}));
  std::vector<Key> keys(count);
  for (int64_t i = 0; i < count; ++i) keys[i] = order_key(after[i] - before[i]);
  std::vector<Key> sorted = keys;
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<Key>());
  const Key bar = sorted[k - 1];
  int64_t ties = k - std::count_if(sorted.begin(), sorted.begin() + k, [&](Key key) { return key > bar; });
  for (int64_t i = 0; i < count; ++i) {
    if (keys[i] > bar || (keys[i] == bar && ties-- > 0)) *indices++ = i;
  }
}

Tensor select_top_any(const Tensor& any_before, const Tensor& any_after, int64_t k) {
  const auto [before, after] = losses(any_before, any_after, k);
  Tensor indices = torch::stable::new_empty(before, {k}, ScalarType::Long);
  int64_t* const result = indices.mutable_data_ptr<int64_t>();
  if (before.scalar_type() == ScalarType::Double) {
    select_top(before.const_data_ptr<double>(), after.const_data_ptr<double>(), before.numel(), k, result);
  } else {
    select_top(before.const_data_ptr<float>(), after.const_data_ptr<float>(), before.numel(), k, result);
  }
  return indices;
}

STABLE_TORCH_LIBRARY_IMPL(esam_kernels, CPU, m) {
  m.impl("squared_norm", TORCH_BOX(&squared_norm));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("norm_and_perturb_", TORCH_BOX(&norm_and_perturb_));
  m.impl("restore_", TORCH_BOX(&restore_));
  m.impl("select_top", TORCH_BOX(&select_top_any));
}

}  // namespace
}  // namespace esam::cpu
