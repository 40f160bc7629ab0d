// Launching on the caller's device and stream, and reporting what went wrong.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "common/check.h"

// In libtorch_cuda: weak, so that the extension also loads where torch has no CUDA, and visible, so that it resolves.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t,
                                                                                                          void**);

namespace fastops {

// Makes the tensor's device current for a scope and names its current stream.
class LaunchScope {
 public:
  LaunchScope(const char* op, const Tensor& t) : op_(op), guard_(t.get_device_index()) {
    void* stream = nullptr;
    FO_CHECK(aoti_torch_get_current_cuda_stream, op, "this torch was built without CUDA");
    FO_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, op, "no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  // After a launch: a bad configuration, or a device this build has no code for.
  void check() const {
    const cudaError_t error = cudaGetLastError();
    FO_CHECK(error == cudaSuccess, op_, "CUDA: ", cudaGetErrorString(error));
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fastops
