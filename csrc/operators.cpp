// The operators' schemas; cpu/operators.cpp and cuda/operators.cpp implement them. reference.py defines what they do.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(esam_kernels, m) {
  // The bits come from reference.py's ElementMask: (seed, step, threshold, tensor_ids, offsets); with no mask, the two
  // lists are empty. A gradient has its weight's memory layout, and its dtype or float32 where that is narrower.
  m.def(
      "squared_norm(Tensor[] params, Tensor[] grads, bool adaptive,"
      " int seed, int step, int threshold, int[] tensor_ids, int[] offsets) -> Tensor");
  // No backups save nothing. norm is float32 or float64 and on the weights' device.
  m.def(
      "perturb_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] backups, float[] coefficients, Tensor norm,"
      " bool adaptive, int seed, int step, int threshold, int[] tensor_ids, int[] offsets) -> ()");
  // The norm is that of these tensors, and is returned.
  m.def(
      "norm_and_perturb_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] backups, float[] coefficients,"
      " bool adaptive, int seed, int step, int threshold, int[] tensor_ids, int[] offsets) -> Tensor");
  m.def("restore_(Tensor(a!)[] params, Tensor[] backups) -> ()");
  m.def("select_top(Tensor before, Tensor after, int k) -> Tensor");
}
