// The least a LibTorch stable-ABI op can be: nf4_dequant's ten arguments, no check, no work, an empty tensor of the
// right shape. bench_overhead.py defines its schema (our op's own string) and times our op against it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor bare(Tensor packed, Tensor, std::vector<int64_t> shape, ScalarType dtype, int64_t, std::optional<Tensor>,
            std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, int64_t) {
  return torch::stable::new_empty(packed, shape, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastops_bench, CPU, m) { m.impl("nf4_dequant", TORCH_BOX(&bare)); }
