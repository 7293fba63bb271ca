// The CPU's inner loops, over a stretch of one tensor. No torch header: kernels.cpp is compiled once per instruction
// set.
#pragma once

#include <cstdint>

#include "../operand.h"
#include "../philox.h"

namespace esam::cpu {

struct Kernels {
  // Sum of (m * |w|^a * g)^2 over elements begin, ..., end - 1.
  double (*squared_norm)(const Operand& operand, int64_t begin, int64_t end, bool adaptive, const ElementMask& mask);
  // backup <- w, if there is one, past the caches if streaming; w <- w + coefficient / (norm + eps) * m * w^2a * g,
  // unless the norm is not finite.
  void (*perturb)(const Operand& operand, int64_t begin, int64_t end, double norm, bool adaptive,
                  const ElementMask& mask, bool streaming);
  // A copy past the caches.
  void (*stream)(void* target, const void* source, int64_t bytes);
};

extern const Kernels kernels_baseline;
#ifdef ESAM_X86_64
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace esam::cpu
