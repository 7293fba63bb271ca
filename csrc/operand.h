// One tensor of the operators' lists, without torch.
#pragma once

#include <cstdint>

namespace esam {

enum class DType { kFloat, kDouble, kBFloat16, kHalf };

inline int64_t element_size(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

// Elements count in memory order.
struct Operand {
  void* param;
  const void* grad;
  void* backup;  // or null, to save nothing
  int64_t size;
  int64_t offset;  // place of the first element in the whole of which this is a shard
  double coefficient;
  uint32_t id;
  DType dtype;       // of param and backup
  DType grad_dtype;  // the same, or kFloat where dtype is narrower
};

}  // namespace esam
