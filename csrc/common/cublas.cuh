// Matrix products of torch, called below its dispatcher: no autocast, no autograd, the caller's stream.
#pragma once

#include "common/check.h"

// In libtorch_cuda: weak, so that the extension also loads where torch has no CUDA.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle,
                                                                                              AtenTensorHandle,
                                                                                              AtenTensorHandle);
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_cuda_addmm_out(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double);

namespace fastops {

// out = a b (+ bias, broadcast over rows).
inline void matrix_product(const char* op, Tensor& out, const Tensor& a, const Tensor& b,
                           const Tensor* bias = nullptr) {
  FO_CHECK(aoti_torch_cuda_mm_out && aoti_torch_cuda_addmm_out, op, "this torch was built without CUDA");
  const auto error = bias ? aoti_torch_cuda_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0)
                          : aoti_torch_cuda_mm_out(out.get(), a.get(), b.get());
  FO_CHECK(error == 0, op, "the matrix product of torch failed: see the error above");
}

}  // namespace fastops
