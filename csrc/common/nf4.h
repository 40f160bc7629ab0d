// What the NF4 kernels share: the code table, the double-quantisation arguments and their checks.
// Layout (bitsandbytes'): packed is flat and row-major, two codes a byte, the high nibble first; block b of `blocksize`
// consecutive weights has the scale absmax[b], or absmax_code[absmax[b]] * absmax_scale[b / absmax_blocksize] +
// absmax_offset when double-quantised. A weight is code[nibble] * scale, multiplied in fp32 and rounded once.
#pragma once

#include <optional>

#include "common/check.h"
#include "common/tensor.h"

namespace fastops::nf4 {

// Quantiles of a standard normal scaled to [-1, 1]: QLoRA, arXiv:2305.14314, appendix E. A macro, because device code
// needs a copy in its own memory (nf4.cuh) and the values stand once.
#define FO_NF4_CODE       \
  {-1.0f,                 \
   -0.6961928009986877f,  \
   -0.5250730514526367f,  \
   -0.39491748809814453f, \
   -0.28444138169288635f, \
   -0.18477343022823334f, \
   -0.09105003625154495f, \
   0.0f,                  \
   0.07958029955625534f,  \
   0.16093020141124725f,  \
   0.24611230194568634f,  \
   0.33791524171829224f,  \
   0.44070982933044434f,  \
   0.5626170039176941f,   \
   0.7229568362236023f,   \
   1.0f}

inline constexpr float kCode[16] = FO_NF4_CODE;

inline constexpr int64_t kMinBlocksize = 32, kMaxBlocksize = 4096;

// Scales smaller than this count as this: a zero block divides by it and becomes all zeros.
inline constexpr float kMinAbsmax = 1e-38f;

// The {DQ} arguments of the schemas, contiguous. Optional tensors are empty when absent.
struct Scales {
  Tensor absmax;
  std::optional<Tensor> code, absmax_code, absmax_scale, absmax_offset;
  int64_t blocksize, absmax_blocksize;
  bool double_quant() const { return absmax_code.has_value(); }
};

// POD view of Scales for kernels.
struct ScalesView {
  const void* absmax;          // float [n_blocks], or uint8 when double-quantised
  const float* code;           // [16] or null for NF4
  const float* absmax_code;    // [256]
  const float* absmax_scale;   // [ceil(n_blocks / absmax_blocksize)]
  const float* absmax_offset;  // [1] or null for 0
  int block_shift, absmax_shift;
};

inline void check_blocksize(const char* op, const char* name, int64_t value) {
  FO_CHECK(value >= kMinBlocksize && value <= kMaxBlocksize && (value & (value - 1)) == 0, op, name,
           " must be a power of two from ", kMinBlocksize, " to ", kMaxBlocksize, ", got ", value);
}

inline void check_code(const char* op, const std::optional<Tensor>& code, const char* first_name, const Tensor& first) {
  if (!code) return;
  check_same_device(op, "code", *code, first_name, first);
  check_dtype(op, "code", *code, ScalarType::Float);
  FO_CHECK(code->numel() == 16, op, "code must have 16 elements, got ", code->numel());
}

// Checks packed and every scale against `n` weights; reads no values. `first` of the messages is packed.
inline void check_packed(const char* op, const Tensor& packed, const Scales& s, int64_t n) {
  check_dtype(op, "packed", packed, ScalarType::Byte);
  check_same_device(op, "absmax", s.absmax, "packed", packed);
  check_code(op, s.code, "packed", packed);
  check_blocksize(op, "blocksize", s.blocksize);
  FO_CHECK(packed.numel() == ceil_div(n, 2), op, "packed must have ceil(n / 2) = ", ceil_div(n, 2),
           " elements for n = ", n, " weights, got ", packed.numel());
  const int64_t n_blocks = ceil_div(n, s.blocksize);
  FO_CHECK(s.absmax.numel() == n_blocks, op, "absmax must have ceil(n / blocksize) = ", n_blocks,
           " elements for n = ", n, " weights, got ", s.absmax.numel());
  if (!s.absmax_code && !s.absmax_scale && !s.absmax_offset) {
    FO_CHECK(s.absmax.scalar_type() == ScalarType::Float, op,
             "absmax must be float32, or uint8 together with absmax_code and absmax_scale, got ",
             dtype_name(s.absmax.scalar_type()));
    return;
  }
  check_dtype(op, "absmax", s.absmax, ScalarType::Byte);
  FO_CHECK(s.absmax_code && s.absmax_scale, op, "absmax_code and absmax_scale must be given together, got only ",
           s.absmax_code    ? "absmax_code"
           : s.absmax_scale ? "absmax_scale"
                            : "absmax_offset");
  check_same_device(op, "absmax_code", *s.absmax_code, "packed", packed);
  check_dtype(op, "absmax_code", *s.absmax_code, ScalarType::Float);
  FO_CHECK(s.absmax_code->numel() == 256, op, "absmax_code must have 256 elements, got ", s.absmax_code->numel());
  check_blocksize(op, "absmax_blocksize", s.absmax_blocksize);
  const int64_t n_scales = ceil_div(n_blocks, s.absmax_blocksize);
  check_same_device(op, "absmax_scale", *s.absmax_scale, "packed", packed);
  check_dtype(op, "absmax_scale", *s.absmax_scale, ScalarType::Float);
  FO_CHECK(s.absmax_scale->numel() == n_scales, op,
           "absmax_scale must have ceil(n_blocks / absmax_blocksize) = ", n_scales, " elements, got ",
           s.absmax_scale->numel());
  if (!s.absmax_offset) return;
  check_same_device(op, "absmax_offset", *s.absmax_offset, "packed", packed);
  check_dtype(op, "absmax_offset", *s.absmax_offset, ScalarType::Float);
  FO_CHECK(s.absmax_offset->numel() == 1, op, "absmax_offset must have 1 element, got ", s.absmax_offset->numel());
}

// `kept` must outlive the view: it owns the contiguous copies, where any were needed.
inline ScalesView view(Scales& kept) {
  kept.absmax = as_contiguous(kept.absmax);
  kept.code = as_contiguous(kept.code);
  kept.absmax_code = as_contiguous(kept.absmax_code);
  kept.absmax_scale = as_contiguous(kept.absmax_scale);
  const auto pointer = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  return {kept.absmax.const_data_ptr(),     pointer(kept.code),          pointer(kept.absmax_code),
          pointer(kept.absmax_scale),       pointer(kept.absmax_offset), log2_exact(kept.blocksize),
          log2_exact(kept.absmax_blocksize)};
}

// Product of the sizes; refuses a negative one, and a product that no tensor can have.
inline int64_t count_weights(const char* op, const std::vector<int64_t>& shape) {
  int64_t n = 1;
  bool empty = false, overflow = false;
  for (const int64_t size : shape) {
    FO_CHECK(size >= 0, op, "shape must have no negative size, got ", shape_string(shape));
    empty |= size == 0;
    overflow |= __builtin_mul_overflow(n, size, &n);
  }
  FO_CHECK(empty || !overflow, op, "shape must have fewer than 2^63 weights, got ", shape_string(shape));
  return empty ? 0 : n;
}

// Sizes of a product: x [..., K] or dy [..., N] against a weight [N, K], flattened to `rows` rows.
struct ProductSizes {
  int64_t rows, out_features, in_features;
};

inline void check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x, int64_t out_features) {
  if (!bias) return;
  check_same_device(op, "bias", *bias, "x", x);
  check_dtype(op, "bias", *bias, x.scalar_type());
  FO_CHECK(bias->numel() == out_features, op, "bias must have out_features = ", out_features, " elements, got ",
           bias->numel());
}

// What nf4_gemv, nf4_linear (left = "x", other = "out_features") and nf4_linear_dx ("dy", "in_features") have in
// common: the activations, the size that they do not tell, and the weight.
inline ProductSizes check_product(const char* op, const char* left, const Tensor& activations, const char* other,
                                  int64_t other_features, const Tensor& packed, const Scales& scales,
                                  bool one_row = false) {
  check_float_type(op, left, activations.scalar_type());
  FO_CHECK(activations.dim() >= 1, op, left, " must have at least 1 dimension, got 0");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < activations.dim(); ++i) rows *= activations.size(i);
  FO_CHECK(!one_row || rows == 1, op, left, " must hold one row, got ", shape_string(activations.sizes()));
  FO_CHECK(other_features >= 0, op, other, " must not be negative, got ", other_features);
  check_same_device(op, "packed", packed, left, activations);
  const int64_t features = activations.size(activations.dim() - 1);
  int64_t n;
  FO_CHECK(!__builtin_mul_overflow(features, other_features, &n), op, other,
           " must give a weight of fewer than 2^63 elements, got ", other_features);
  check_packed(op, packed, scales, n);
  const bool forward = left[0] == 'x';
  return {rows, forward ? other_features : features, forward ? features : other_features};
}

}  // namespace fastops::nf4
