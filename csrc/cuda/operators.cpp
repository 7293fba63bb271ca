// The operators on the GPU, for torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "../arguments.h"
#include "kernels.h"

namespace esam::cuda {
namespace {

// Makes a tensor's device the current one, and knows its current stream.
class Device {
 public:
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }

  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

Tensor squared_norm(const Tensors& params, const Tensors& grads, bool adaptive, int64_t seed, int64_t step,
                    int64_t threshold, const Ints& tensor_ids, const Ints& offsets) {
  std::vector<Operand> table = operands(params);
  add_grads(params, grads, table);
  const ElementMask mask = add_mask(seed, step, threshold, tensor_ids, offsets, table);
  const Device device(params[0]);
  const Tensor partial_sums = torch::stable::new_empty(params[0], {count_partial_sums(table)}, ScalarType::Double);
  Tensor result = torch::stable::new_empty(params[0], {}, norm_dtype(params));
  cuda::squared_norm(table, adaptive, mask, partial_sums.mutable_data_ptr<double>(), result.mutable_data_ptr(),
                     result.scalar_type() == ScalarType::Double, device.stream());
  return result;
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
  const Device device(params[0]);
  perturb(table, norm.const_data_ptr(), norm.scalar_type() == ScalarType::Double, adaptive, mask, device.stream());
}

Tensor norm_and_perturb_(const Tensors& params, const Tensors& grads, const Tensors& backups,
                         const std::vector<double>& coefficients, bool adaptive, int64_t seed, int64_t step,
                         int64_t threshold, const Ints& tensor_ids, const Ints& offsets) {
  std::vector<Operand> table = operands(params);
  add_grads(params, grads, table);
  add_backups(params, backups, table);
  add_coefficients(coefficients, table);
  const ElementMask mask = add_mask(seed, step, threshold, tensor_ids, offsets, table);
  const Device device(params[0]);
  const Tensor partial_sums = torch::stable::new_empty(params[0], {count_partial_sums(table)}, ScalarType::Double);
  Tensor norm = torch::stable::new_empty(params[0], {}, norm_dtype(params));
  norm_and_perturb(table, adaptive, mask, partial_sums.mutable_data_ptr<double>(), norm.mutable_data_ptr(),
                   norm.scalar_type() == ScalarType::Double, device.stream());
  return norm;
}

void restore_(const Tensors& params, const Tensors& backups) {
  std::vector<Operand> table = operands(params);
  STD_TORCH_CHECK(!backups.empty(), "got no backups");
  add_backups(params, backups, table);
  const Device device(params[0]);
  restore(table, device.stream());
}

Tensor select_top(const Tensor& any_before, const Tensor& any_after, int64_t k) {
  const auto [before, after] = losses(any_before, any_after, k);
  const Device device(before);
  Tensor indices = torch::stable::new_empty(before, {k}, ScalarType::Long);
  int64_t* const result = indices.mutable_data_ptr<int64_t>();
  if (before.scalar_type() == ScalarType::Double) {
    cuda::select_top(before.const_data_ptr<double>(), after.const_data_ptr<double>(), before.numel(), k, result,
                     device.stream());
  } else {
    cuda::select_top(before.const_data_ptr<float>(), after.const_data_ptr<float>(), before.numel(), k, result,
                     device.stream());
  }
  return indices;
}

STABLE_TORCH_LIBRARY_IMPL(esam_kernels, CUDA, m) {
  m.impl("squared_norm", TORCH_BOX(&squared_norm));
  m.impl("perturb_", TORCH_BOX(&perturb_));
  m.impl("norm_and_perturb_", TORCH_BOX(&norm_and_perturb_));
  m.impl("restore_", TORCH_BOX(&restore_));
  m.impl("select_top", TORCH_BOX(&select_top));
}

}  // namespace
}  // namespace esam::cuda
