// Argument checks with one wording for every backend: "fastops::<op>: <argument> must be <wanted>, got <given>".
// pyops/_checks.py says the same in Python, and tests/ compares the two, message by message.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace fastops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream message;
  message << "fastops::" << op << ": ";
  (message << ... << args);
  throw std::runtime_error(message.str());
}

#define FO_CHECK(condition, op, ...)      \
  do {                                    \
    if (!(condition)) [[unlikely]]        \
      ::fastops::fail((op), __VA_ARGS__); \
  } while (false)

// "float32", as Python prints it.
inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another dtype";
  }
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device:") + std::to_string(t.get_device_index());
}

// "[2, 3]", as Python prints a list.
template <class Sizes>
std::string shape_string(const Sizes& sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const char* first_name,
                              const Tensor& first) {
  FO_CHECK(t.is_cpu() == first.is_cpu() && t.get_device_index() == first.get_device_index(), op, name, " must be on ",
           device_name(first), " like ", first_name, ", got ", device_name(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType wanted) {
  FO_CHECK(t.scalar_type() == wanted, op, name, " must be ", dtype_name(wanted), ", got ", dtype_name(t.scalar_type()));
}

inline bool is_float_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline void check_float_type(const char* op, const char* name, ScalarType type) {
  FO_CHECK(is_float_type(type), op, name, " must be float32, float16 or bfloat16, got ", dtype_name(type));
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

inline int log2_exact(int64_t power_of_two) { return __builtin_ctzll(static_cast<uint64_t>(power_of_two)); }

}  // namespace fastops
