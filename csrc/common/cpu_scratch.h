// Scratch memory of CPU kernels.
#pragma once

#include <new>
#include <optional>

#include "common/cpu_output.h"

namespace fastops {

// Uninitialised floats on a cache line of their own; large ones from the pool of outputs.
class Buffer {
 public:
  explicit Buffer(int64_t floats) {
    const size_t bytes = static_cast<size_t>(floats) * sizeof(float) + kLine;
    if (bytes >= HostPool::kMinBytes) data_ = HostPool::get().take(bytes, &capacity_);
    pooled_ = data_ != nullptr;
    if (!pooled_) data_ = ::operator new(bytes, std::align_val_t(kLine));
  }
  ~Buffer() {
    pooled_ ? HostPool::get().give_back(data_, capacity_) : ::operator delete(data_, std::align_val_t(kLine));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return static_cast<float*>(data_); }

 private:
  static constexpr size_t kLine = 64;
  void* data_ = nullptr;
  size_t capacity_ = 0;
  bool pooled_ = false;
};

// The same, but small ones are this thread's, kept from call to call. One at a time in a thread.
class ThreadBuffer {
 public:
  explicit ThreadBuffer(int64_t floats) {
    if (floats > kKept) {
      own_.emplace(floats);
      data_ = own_->get();
      return;
    }
    thread_local const Buffer kept(kKept);
    data_ = kept.get();
  }
  float* get() const { return data_; }

 private:
  static constexpr int64_t kKept = HostPool::kMinBytes / sizeof(float) - 64;
  std::optional<Buffer> own_;
  float* data_;
};

}  // namespace fastops
