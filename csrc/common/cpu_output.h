// Where large CPU outputs live. A fresh 32 MB tensor costs about 10 ms of page faults, ten times what it takes to fill
// it, so outputs of at least kMinBytes come from a pool: huge pages where the system grants them, and up to kKeepBytes
// of freed blocks kept for the next call, for the life of the process. Smaller ones, and all of them on torch 2.10
// (which cannot call back when a tensor dies), are ordinary tensors. A pooled tensor is like any other, except that its
// storage cannot be resized in place.
#pragma once

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <iterator>
#include <map>
#include <mutex>

#include "common/tensor.h"

namespace fastops {

class HostPool {
 public:
  static constexpr size_t kMinBytes = 1 << 20, kKeepBytes = 256 << 20, kGrain = 1 << 16;

  // Never destroyed: tensors may outlive every static object. A fork takes the lock, so that no child inherits it held.
  static HostPool& get() {
    static HostPool* pool = [] {
      pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
      return new HostPool;
    }();
    return *pool;
  }

  // Off: results are ordinary tensors, which torch can fill with NaN where nothing was written. Tests do that.
  std::atomic<bool> enabled = true;

  // A block of at least `bytes`, or null when the system has none. `*capacity` is what give_back wants.
  void* take(size_t bytes, size_t* capacity) {
    bytes = (bytes + kGrain - 1) / kGrain * kGrain;
    {
      const std::lock_guard lock(mutex_);
      const auto fit = free_.lower_bound(bytes);
      if (fit != free_.end() && fit->first <= bytes + bytes / 4) {
        *capacity = fit->first;
        void* block = fit->second;
        kept_ -= fit->first;
        free_.erase(fit);
        return block;
      }
    }
    *capacity = bytes;
    void* block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
    madvise(block, bytes, MADV_HUGEPAGE);
#endif
    return block;
  }

  // The last block freed is the likeliest to be wanted again: the largest others make room for it.
  void give_back(void* block, size_t capacity) {
    if (capacity > kKeepBytes) {
      munmap(block, capacity);
      return;
    }
    const std::lock_guard lock(mutex_);
    while (kept_ + capacity > kKeepBytes) {
      const auto largest = std::prev(free_.end());
      munmap(largest->second, largest->first);
      kept_ -= largest->first;
      free_.erase(largest);
    }
    free_.emplace(capacity, block);
    kept_ += capacity;
  }

 private:
  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  size_t kept_ = 0;
};

// torch_from_blob of torch >= 2.11, looked up by name so that the binary asks for nothing newer than 2.10; or null.
using FromBlob = AOTITorchError (*)(void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
                                    int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                                    AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
                                    int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx), void* ctx);

inline FromBlob from_blob_with_deleter() {
  static const auto function = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return function;
}

// An uninitialised contiguous tensor on the CPU.
inline Tensor cpu_output(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  int64_t n = 1;
  std::vector<int64_t> strides(sizes.size());
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = n;
    n *= sizes[i];
  }
  const auto aten_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const size_t bytes = static_cast<size_t>(n) * aoti_torch_dtype_element_size(aten_dtype);
  size_t capacity = 0;
  const FromBlob from_blob = HostPool::get().enabled ? from_blob_with_deleter() : nullptr;
  void* block = bytes >= HostPool::kMinBytes && from_blob ? HostPool::get().take(bytes, &capacity) : nullptr;
  if (!block) return torch::stable::new_empty(like, sizes, dtype);
  AtenTensorHandle handle;
  const auto deleter = [](void* data, void* ctx) { HostPool::get().give_back(data, reinterpret_cast<size_t>(ctx)); };
  const auto failed = from_blob(block, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, aten_dtype,
                                aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
                                deleter, reinterpret_cast<void*>(capacity));
  if (failed) {
    HostPool::get().give_back(block, capacity);
    return torch::stable::new_empty(like, sizes, dtype);
  }
  return Tensor(handle);
}

}  // namespace fastops
