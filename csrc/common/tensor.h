// Small tensor helpers that every kernel's host function needs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/check.h"

namespace fastops {

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return as_contiguous(*t);
}

}  // namespace fastops
