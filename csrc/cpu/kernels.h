// The CPU's inner loops, over a stretch of one tensor. No torch header: kernels.cpp is compiled once per instruction
// set.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace esam::cpu {

enum class DType { kFloat, kDouble, kBFloat16, kHalf };

// One tensor of an operator's lists; its elements count in memory order.
struct Operand {
  void* param;
  const void* grad;
  void* backup;
  DType dtype;       // of param and backup
  DType grad_dtype;  // the same, or kFloat where dtype is narrower
  double coefficient;
  uint32_t id;
  int64_t offset;  // place of the first element in the whole of which this is a shard
};

struct Kernels {
  // Sum of (m * |w|^a * g)^2 over elements begin, ..., end - 1.
  double (*squared_norm)(const Operand& operand, int64_t begin, int64_t end, bool adaptive, const Randomness& random);
  // backup <- w; w <- w + coefficient / (norm + eps) * m * w^2a * g, unless the norm is not finite.
  void (*perturb)(const Operand& operand, int64_t begin, int64_t end, double norm, bool adaptive,
                  const Randomness& random);
};

extern const Kernels kernels_baseline;
#ifdef ESAM_X86_64
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace esam::cpu
