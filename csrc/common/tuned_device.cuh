// The tuned configuration for the current CUDA device.
#pragma once

#include <cuda_runtime.h>

#include "common/tuned.h"

namespace fastops {

// The slug of a device, read once: properties are slow to query.
inline const std::string& cuda_device_slug(int device) {
  static std::mutex mutex;
  static std::map<int, std::string> slugs;
  const std::lock_guard lock(mutex);
  auto it = slugs.find(device);
  if (it == slugs.end()) {
    cudaDeviceProp properties;
    const bool known = cudaGetDeviceProperties(&properties, device) == cudaSuccess;
    it = slugs.emplace(device, known ? device_slug(properties.name) : "unknown").first;
  }
  return it->second;
}

// `count` configurations exist; a stale table can never select one that does not.
inline int tuned_config(const char* op, int device, int64_t key, int64_t size, int fallback, int count) {
  const int config = TunedTable::get().find(op, cuda_device_slug(device), key, size, fallback);
  return config >= 0 && config < count ? config : fallback;
}

}  // namespace fastops
