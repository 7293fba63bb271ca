// What the CPU's and the GPU's operators ask of their arguments; everything is checked before anything is written.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "philox.h"

namespace esam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

// Whether the elements fill one stretch of memory without gaps or overlaps, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether two tensors count their elements alike in memory; strides of dimensions of size 1 are moot.
inline bool have_same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), strides = a.strides(), other_strides = b.strides();
  if (sizes != b.sizes()) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && strides[d] != other_strides[d]) return false;
  }
  return true;
}

inline void check_params(const Tensors& params) {
  STD_TORCH_CHECK(!params.empty(), "got no params: give at least one tensor");
  for (const Tensor& param : params) {
    STD_TORCH_CHECK(is_supported(param.scalar_type()),
                    "a weight's dtype must be float32, float64, bfloat16 or float16");
    STD_TORCH_CHECK(is_dense(param), "a weight's elements must lie in memory without gaps or overlaps");
    STD_TORCH_CHECK(param.device() == params[0].device(), "the weights must be on one device");
  }
}

inline void check_like_params(const Tensors& params, const Tensors& others, const char* name) {
  STD_TORCH_CHECK(others.size() == params.size(), "got ", params.size(), " params but ", others.size(), " ", name);
  for (size_t i = 0; i < params.size(); ++i) {
    STD_TORCH_CHECK(have_same_layout(params[i], others[i]) && params[i].device() == others[i].device(), name, "[", i,
                    "] must have the shape, memory layout and device of params[", i, "]");
  }
}

inline void check_grads(const Tensors& params, const Tensors& grads) {
  check_like_params(params, grads, "grads");
  for (size_t i = 0; i < params.size(); ++i) {
    const ScalarType dtype = params[i].scalar_type();
    const bool fits =
        grads[i].scalar_type() == dtype || (grads[i].scalar_type() == ScalarType::Float && dtype != ScalarType::Double);
    STD_TORCH_CHECK(fits, "grads[", i, "] must have the dtype of params[", i, "], or float32 where that is narrower");
  }
}

inline void check_backups(const Tensors& params, const Tensors& backups) {
  check_like_params(params, backups, "backups");
  for (size_t i = 0; i < params.size(); ++i) {
    STD_TORCH_CHECK(backups[i].scalar_type() == params[i].scalar_type(), "backups[", i,
                    "] must have the dtype of params[", i, "]");
  }
}

inline void check_losses(const Tensor& before, const Tensor& after, int64_t k) {
  const ScalarType dtype = before.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "losses must be float32 or float64");
  STD_TORCH_CHECK(after.scalar_type() == dtype && after.device() == before.device(),
                  "both losses must have one dtype and device");
  STD_TORCH_CHECK(before.dim() == 1 && have_same_layout(before, after) && before.is_contiguous(),
                  "both losses must be contiguous and of one shape [b]");
  STD_TORCH_CHECK(1 <= k && k <= before.numel(), "k = ", k, " samples of ", before.numel(), " cannot be selected");
}

inline Randomness randomness(const Tensors& params, int64_t seed, int64_t step, int64_t threshold,
                             const Ints& tensor_ids, const Ints& offsets) {
  const bool present = !tensor_ids.empty();
  STD_TORCH_CHECK(tensor_ids.size() == (present ? params.size() : 0), "give one id for each tensor, or none");
  STD_TORCH_CHECK(offsets.size() == tensor_ids.size(), "give one offset for each id");
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(step), present, static_cast<uint64_t>(threshold)};
}

// float64 if a weight is float64, else float32.
inline ScalarType norm_dtype(const Tensors& params) {
  const bool wide = std::any_of(params.begin(), params.end(),
                                [](const Tensor& param) { return param.scalar_type() == ScalarType::Double; });
  return wide ? ScalarType::Double : ScalarType::Float;
}

inline void check_coefficients(const Tensors& params, const std::vector<double>& coefficients) {
  STD_TORCH_CHECK(coefficients.size() == params.size(), "got ", params.size(), " params but ", coefficients.size(),
                  " coefficients: give one for each tensor");
}

inline void check_norm(const Tensors& params, const Tensor& norm) {
  STD_TORCH_CHECK(norm.dim() == 0 && norm.device() == params[0].device(),
                  "norm must be one number on the weights' device");
  STD_TORCH_CHECK(norm.scalar_type() == ScalarType::Float || norm.scalar_type() == ScalarType::Double,
                  "norm must be float32 or float64");
}

}  // namespace esam
