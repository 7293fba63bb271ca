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

#include "operand.h"
#include "philox.h"

namespace esam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

inline DType to_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    default:
      STD_TORCH_CHECK(false, "dtypes must be float32, float64, bfloat16 or float16");
  }
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
  if (!sizes.equals(b.sizes())) return false;
  if (a.numel() == 0) return true;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && strides[d] != other_strides[d]) return false;
  }
  return true;
}

// The weights as the kernels take them.
inline std::vector<Operand> operands(const Tensors& params) {
  STD_TORCH_CHECK(!params.empty(), "got no params: give at least one tensor");
  std::vector<Operand> result(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    STD_TORCH_CHECK(is_dense(param), "params[", i, "] must lie in memory without gaps or overlaps");
    STD_TORCH_CHECK(param.device() == params[0].device(), "params must be on one device");
    result[i].param = param.mutable_data_ptr();
    result[i].size = param.numel();
    result[i].dtype = result[i].grad_dtype = to_dtype(param.scalar_type());
  }
  return result;
}

inline void check_like_params(const Tensors& params, const Tensors& others, const char* name) {
  STD_TORCH_CHECK(others.size() == params.size(), "got ", params.size(), " params but ", others.size(), " ", name);
  for (size_t i = 0; i < params.size(); ++i) {
    STD_TORCH_CHECK(have_same_layout(params[i], others[i]) && params[i].device() == others[i].device(), name, "[", i,
                    "] must have the shape, memory layout and device of params[", i, "]");
  }
}

inline void add_grads(const Tensors& params, const Tensors& grads, std::vector<Operand>& result) {
  check_like_params(params, grads, "grads");
  for (size_t i = 0; i < grads.size(); ++i) {
    result[i].grad = grads[i].const_data_ptr();
    result[i].grad_dtype = to_dtype(grads[i].scalar_type());
    const bool wider = result[i].grad_dtype == DType::kFloat && result[i].dtype != DType::kDouble;
    STD_TORCH_CHECK(result[i].grad_dtype == result[i].dtype || wider, "grads[", i, "] must have the dtype of params[",
                    i, "], or float32 where that is narrower");
  }
}

// No backups leave the operands without one.
inline void add_backups(const Tensors& params, const Tensors& backups, std::vector<Operand>& result) {
  if (backups.empty()) return;
  check_like_params(params, backups, "backups");
  for (size_t i = 0; i < backups.size(); ++i) {
    result[i].backup = backups[i].mutable_data_ptr();
    STD_TORCH_CHECK(backups[i].scalar_type() == params[i].scalar_type(), "backups[", i,
                    "] must have the dtype of params[", i, "]");
  }
}

inline void add_coefficients(const std::vector<double>& coefficients, std::vector<Operand>& result) {
  STD_TORCH_CHECK(coefficients.size() == result.size(), "got ", result.size(), " params but ", coefficients.size(),
                  " coefficients: give one for each tensor");
  for (size_t i = 0; i < coefficients.size(); ++i) result[i].coefficient = coefficients[i];
}

inline ElementMask add_mask(int64_t seed, int64_t step, int64_t threshold, const Ints& tensor_ids,
                            const Ints& offsets, std::vector<Operand>& result) {
  const bool present = !tensor_ids.empty();
  STD_TORCH_CHECK(tensor_ids.size() == (present ? result.size() : 0), "give one id for each tensor, or none");
  STD_TORCH_CHECK(offsets.size() == tensor_ids.size(), "give one offset for each id");
  for (size_t i = 0; i < tensor_ids.size(); ++i) {
    result[i].id = static_cast<uint32_t>(tensor_ids[i]);
    result[i].offset = offsets[i];
  }
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(step), present, static_cast<uint64_t>(threshold)};
}

// The losses as the kernels take them: contiguous, and both float64 if one of them is, else float32.
inline std::pair<Tensor, Tensor> losses(const Tensor& before, const Tensor& after, int64_t k) {
  STD_TORCH_CHECK(before.device() == after.device(), "both losses must be on one device");
  STD_TORCH_CHECK(before.dim() == 1 && before.sizes().equals(after.sizes()), "both losses must be of one shape [b]");
  STD_TORCH_CHECK(1 <= k && k <= before.numel(), "k = ", k, " samples of ", before.numel(), " cannot be selected");
  const bool wide = before.scalar_type() == ScalarType::Double || after.scalar_type() == ScalarType::Double;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const auto taken = [dtype](const Tensor& x) {
    const Tensor converted = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
    return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
  };
  return {taken(before), taken(after)};
}

// float64 if a weight is float64, else float32.
inline ScalarType norm_dtype(const Tensors& params) {
  const bool wide = std::any_of(params.begin(), params.end(),
                                [](const Tensor& param) { return param.scalar_type() == ScalarType::Double; });
  return wide ? ScalarType::Double : ScalarType::Float;
}

inline void check_norm(const Tensors& params, const Tensor& norm) {
  STD_TORCH_CHECK(norm.dim() == 0 && norm.device() == params[0].device(),
                  "norm must be one number on the weights' device");
  STD_TORCH_CHECK(norm.scalar_type() == ScalarType::Float || norm.scalar_type() == ScalarType::Double,
                  "norm must be float32 or float64");
}

}  // namespace esam
