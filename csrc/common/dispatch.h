// Compile-time dispatch over run-time dtypes: dispatch_float(type, op, [&](auto zero) { using T = decltype(zero); ...
// }). T is the framework's header-only type: float, Half or BFloat16.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/check.h"

namespace fastops {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// The caller has checked the type (check_float_type).
template <class F>
void dispatch_float(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Half:
      f(Half{});
      break;
    case ScalarType::BFloat16:
      f(BFloat16{});
      break;
    default:
      f(float{});
      break;
  }
}

template <class F>
void dispatch_bool(bool value, F&& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace fastops
