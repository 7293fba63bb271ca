// Launchers of the CUDA kernels. No torch header: kernels.cu compiles with plain nvcc.
#pragma once

#include <cstdint>
#include <vector>

#include "../operand.h"
#include "../philox.h"

namespace esam::cuda {

// All are asynchronous on the stream (a cudaStream_t) of the current device, and throw std::runtime_error if a launch
// fails.

// How many partial sums squared_norm and norm_and_perturb write.
int64_t count_partial_sums(const std::vector<Operand>& operands);

// result <- sum of (m * |w|^a * g)^2; partial_sums is scratch on the device.
void squared_norm(const std::vector<Operand>& operands, bool adaptive, const ElementMask& mask, double* partial_sums,
                  void* result, bool result_is_double, void* stream);

// backup <- w, if there is one; w <- w + coefficient / (norm + eps) * m * w^2a * g, unless the norm, on the device, is
// not finite.
void perturb(const std::vector<Operand>& operands, const void* norm, bool norm_is_double, bool adaptive,
             const ElementMask& mask, void* stream);

// norm <- the square root of squared_norm's result; then as perturb. One launch where all blocks run at the same time.
void norm_and_perturb(const std::vector<Operand>& operands, bool adaptive, const ElementMask& mask,
                      double* partial_sums, void* norm, bool norm_is_double, void* stream);

// w <- backup
void restore(const std::vector<Operand>& operands, void* stream);

// Ascending indices of the k largest after - before, of count; T is float or double.
template <typename T>
void select_top(const T* before, const T* after, int64_t count, int64_t k, int64_t* indices, void* stream);

}  // namespace esam::cuda
