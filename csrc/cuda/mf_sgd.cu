// mf_sgd: one pass of SGD over pairs and their sampled negatives, in place; sigmoid(u . v + biases), cross-entropy.
// Floor at 6040 x 3706 tables, F = 64, 10^6 pairs, 4 negatives: the tables (2.5 MB) stay in L2, through which a pair
// moves 8 (F + 1) (2 + negatives) = 3.1 kB, 3.1 GB in all, 0.6 ms at some 5 TB/s; from memory it would be 1 ms at 3.02
// TB/s. 10 F flops an example, 3.2 Gflop: nothing. Lock-free, a warp takes a pair with its negatives and no warp waits.
// In blocks of 2048 pairs a launch computes the gradients and another takes the steps, a warp for each row, which finds
// its occurrences side by side because they were sorted beforehand, many blocks at a time (the negatives depend on no
// value): two launches a block, so launches bound it, 5 us or so a block, not bytes.
// Reached: bench/results/h100/mf_sgd.json.
#include <algorithm>
#include <array>

#include "common/launch.cuh"
#include "common/mf_sgd.h"
#include "common/register.h"
#include "common/tensor.h"

namespace fastops::mf_sgd {
namespace {

constexpr int kWarp = 32, kWarps = 4;                 // of a thread block
constexpr int64_t kGroupExamples = int64_t{1} << 20;  // that are sorted together
constexpr uint32_t kNowhere = 0xffffffffu;            // the row of a pair whose ids are out of range
constexpr int kBiasEvery = 8;                         // pairs of a warp between its steps of the global bias

// Of one block; `keys` hold (block << 32 | row), sorted, `order` where each stood before, both of the whole group.
struct Block {
  const int64_t* item_keys;   // [size * examples] from this block's first
  const int64_t* item_order;  // indices into the group's examples
  const int64_t* user_keys;   // [size]
  const int64_t* user_order;
  int64_t first;        // its first pair within the call
  int64_t group_first;  // its group's
  int size;
};

// Written by the gradients, read by the steps.
struct Scratch {
  float* gradient;       // [kBlock, examples]
  float* user_gradient;  // [kBlock, factors]
  float* user_row;       // [kBlock, factors]
  float* loss;           // [kBlock]
  float* sum;            // [kBlock]
  double* total_loss;    // [1]
};

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// kVec floats of a row from f on, through L2: other warps may have changed them.
template <int kVec>
struct Floats {
  float v[kVec];

  __device__ static Floats load(const float* p) {
    Floats out;
    if constexpr (kVec == 4) {
      const float4 four = __ldcg(reinterpret_cast<const float4*>(p));
      out.v[0] = four.x, out.v[1] = four.y, out.v[2] = four.z, out.v[3] = four.w;
    } else {
      out.v[0] = __ldcg(p);
    }
    return out;
  }

  __device__ void store(float* p) const {
    if constexpr (kVec == 4) {
      __stcg(reinterpret_cast<float4*>(p), make_float4(v[0], v[1], v[2], v[3]));
    } else {
      __stcg(p, v[0]);
    }
  }
};

__device__ inline bool inside(const Params& p, int64_t user, int64_t item) {
  return static_cast<uint64_t>(user) < static_cast<uint64_t>(p.users) &&
         static_cast<uint64_t>(item) < static_cast<uint64_t>(p.items);
}

// Example j of pair i: the pair's item, or a sampled one.
__device__ inline int32_t example_item(const Params& p, int64_t i, int j) {
  if (j == 0) return static_cast<int32_t>(p.pairs[2 * i + 1]);
  const uint64_t counter = static_cast<uint64_t>(p.offset + i);
  uint32_t words[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
                       static_cast<uint32_t>((j - 1) / 4), 0};
  philox(p.seed, words);
  const int w = (j - 1) % 4;
  return item_of(w == 0 ? words[0] : w == 1 ? words[1] : w == 2 ? words[2] : words[3], p.items);
}

template <int kVec>
__device__ inline float dot(const float* a, const float* b, int factors, int lane) {
  float sum = 0.0f;
  for (int f = lane * kVec; f < factors; f += kWarp * kVec) {
    const auto x = Floats<kVec>::load(a + f), y = Floats<kVec>::load(b + f);
#pragma unroll
    for (int k = 0; k < kVec; ++k) sum = fmaf(x.v[k], y.v[k], sum);
  }
  return warp_sum(sum);
}

// (d loss / d z, loss) of an example.
__device__ inline float2 logistic_loss(float z, bool positive) {
  const float e = expf(-fabsf(z));
  const float high = 1.0f / (1.0f + e);
  const float probability = z < 0.0f ? e * high : high;
  const float loss = fmaxf(z, 0.0f) + log1pf(e);
  return positive ? make_float2(probability - 1.0f, loss - z) : make_float2(probability, loss);
}

// The keys of a group of `size` pairs, a thread for each example.
__global__ void keys_kernel(const Params p, int64_t group_first, int64_t size, int64_t* item_keys, int64_t* user_keys) {
  const int examples = 1 + p.negatives;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, i = group_first + e / examples;
  if (e >= size * examples) return;
  const int j = static_cast<int>(e % examples);
  const int64_t block = (p.offset + i) / kBlock - (p.offset + group_first) / kBlock;
  const int64_t user = p.pairs[2 * i];
  const bool good = inside(p, user, p.pairs[2 * i + 1]);
  const auto key = [&](uint32_t row) { return block << 32 | static_cast<int64_t>(row); };
  item_keys[e] = key(good ? static_cast<uint32_t>(example_item(p, i, j)) : kNowhere);
  if (j == 0) user_keys[e / examples] = key(good ? static_cast<uint32_t>(user) : kNowhere);
}

// A warp for each pair of a block.
template <int kVec>
__global__ void __launch_bounds__(kWarp* kWarps) gradients_kernel(const Params p, const Block b, const Scratch s) {
  const int lane = threadIdx.x % kWarp, i = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (i >= b.size) return;
  const int examples = 1 + p.negatives;
  const int64_t user = p.pairs[2 * (b.first + i)];
  float* gradient = s.gradient + static_cast<int64_t>(i) * examples;
  if (!inside(p, user, p.pairs[2 * (b.first + i) + 1])) {  // nothing reads its gradients, only these two
    if (lane == 0) s.loss[i] = s.sum[i] = 0.0f;
    return;
  }
  const float* row = p.user + user * p.factors;
  const float bias = p.user_bias[user] + *p.global_bias;
  float loss = 0.0f, sum = 0.0f;
  for (int j = 0; j < examples; ++j) {
    const int64_t item = example_item(p, b.first + i, j);
    const float z = dot<kVec>(row, p.item + item * p.factors, p.factors, lane) + (bias + p.item_bias[item]);
    const float2 g = logistic_loss(z, j == 0);
    sum += g.x;
    loss += g.y;
    if (lane == 0) gradient[j] = g.x;
  }
  if (lane == 0) s.loss[i] = loss, s.sum[i] = sum;
  __syncwarp();
  const int64_t place = static_cast<int64_t>(i) * p.factors;
  for (int f = lane * kVec; f < p.factors; f += kWarp * kVec) {
    Floats<kVec> total{};
    for (int j = 0; j < examples; ++j) {
      const float g = gradient[j];
      const auto v = Floats<kVec>::load(p.item + int64_t{example_item(p, b.first + i, j)} * p.factors + f);
#pragma unroll
      for (int k = 0; k < kVec; ++k) total.v[k] = fmaf(g, v.v[k], total.v[k]);
    }
    total.store(s.user_gradient + place + f);
    Floats<kVec>::load(row + f).store(s.user_row + place + f);
  }
}

// How many keys from `begin` on equal the one there.
__device__ inline int run_length(const int64_t* keys, int64_t begin, int64_t end, int lane) {
  for (int64_t at = begin; at < end; at += kWarp) {
    const unsigned other = __ballot_sync(0xffffffffu, at + lane >= end || keys[at + lane] != keys[begin]);
    if (other) return static_cast<int>(at - begin) + __ffs(static_cast<int>(other)) - 1;
  }
  return static_cast<int>(end - begin);
}

// One row's step: `weight(t)` and `values(t)` are those of its occurrence t, `examples` how many examples one is.
template <int kVec, class Weight, class Values, class Bias>
__device__ inline void move_row(const Params& p, float* w, float* bias, int count, int examples, int lane,
                                const Weight& weight, const Values& values, const Bias& bias_gradient) {
  const int64_t all = static_cast<int64_t>(count) * examples;
  const float step = step_of(p.lr, all), decay = static_cast<float>(all) * p.reg;
  for (int f = lane * kVec; f < p.factors; f += kWarp * kVec) {
    Floats<kVec> total{};
    for (int t = 0; t < count; ++t) {
      const float g = weight(t);
      const auto v = Floats<kVec>::load(values(t) + f);
#pragma unroll
      for (int k = 0; k < kVec; ++k) total.v[k] = fmaf(g, v.v[k], total.v[k]);
    }
    auto before = Floats<kVec>::load(w + f);
#pragma unroll
    for (int k = 0; k < kVec; ++k) before.v[k] -= step * fmaf(decay, before.v[k], total.v[k]);
    before.store(w + f);
  }
  if (lane == 0) {
    float total = 0.0f;
    for (int t = 0; t < count; ++t) total += bias_gradient(t);
    *bias -= step * fmaf(decay, *bias, total);
  }
}

// The sums of a block's gradients and losses by one thread block, in an order that is always the same.
__device__ inline void step_global_bias(const Params& p, const Block& b, const Scratch& s) {
  __shared__ double sums[kWarp * kWarps], losses[kWarp * kWarps];
  double sum = 0.0, loss = 0.0;
  int good = 0;
  for (int i = threadIdx.x; i < b.size; i += blockDim.x) {
    sum += s.sum[i];
    loss += s.loss[i];
  }
  sums[threadIdx.x] = sum;
  losses[threadIdx.x] = loss;
  for (int base = 0; base < b.size; base += blockDim.x) {
    const int i = base + threadIdx.x;
    good += __syncthreads_count(i < b.size && static_cast<uint32_t>(b.user_keys[i]) != kNowhere);
  }
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      sums[threadIdx.x] += sums[threadIdx.x + half];
      losses[threadIdx.x] += losses[threadIdx.x + half];
    }
  }
  if (threadIdx.x == 0) {
    const int64_t examples = static_cast<int64_t>(good) * (1 + p.negatives);
    *p.global_bias -= step_of(p.lr, examples) * static_cast<float>(sums[0]);
    *s.total_loss += losses[0];
  }
}

// The first thread block takes the global bias's step; a warp for each sorted example and each sorted pair follows,
// and those at the beginning of a run take its row's.
template <int kVec>
__global__ void __launch_bounds__(kWarp* kWarps) steps_kernel(const Params p, const Block b, const Scratch s) {
  if (blockIdx.x == 0) return step_global_bias(p, b, s);
  const int lane = threadIdx.x % kWarp, examples = 1 + p.negatives;
  const int64_t all = static_cast<int64_t>(b.size) * examples;
  int64_t at = (static_cast<int64_t>(blockIdx.x) - 1) * kWarps + threadIdx.x / kWarp;
  const bool of_item = at < all;
  if (!of_item) at -= all;
  const int64_t* keys = of_item ? b.item_keys : b.user_keys;
  const int64_t end = of_item ? all : b.size;
  if (at >= end || (at > 0 && keys[at - 1] == keys[at])) return;
  const auto row = static_cast<uint32_t>(keys[at]);
  if (row == kNowhere) return;
  const int count = run_length(keys, at, end, lane);
  const int64_t before = b.first - b.group_first;  // pairs of the group
  if (of_item) {
    const int64_t* order = b.item_order + at;
    const auto gradient = [&](int t) { return s.gradient[order[t] - before * examples]; };
    const auto user_row = [&](int t) { return s.user_row + (order[t] / examples - before) * p.factors; };
    move_row<kVec>(p, p.item + static_cast<int64_t>(row) * p.factors, p.item_bias + row, count, 1, lane, gradient,
                   user_row, gradient);
  } else {
    const int64_t* order = b.user_order + at;
    const auto total = [&](int t) { return s.user_gradient + (order[t] - before) * p.factors; };
    const auto sum = [&](int t) { return s.sum[order[t] - before]; };
    move_row<kVec>(
        p, p.user + static_cast<int64_t>(row) * p.factors, p.user_bias + row, count, examples, lane,
        [](int) { return 1.0f; }, total, sum);
  }
}

// A warp for each of `warps` interleaved sets of pairs, one after the other. Where two warps change the same row at
// once, one of the changes is lost, or parts of both stay: what is written is always a step from what was read.
template <int kVec>
__global__ void __launch_bounds__(kWarp* kWarps, 5)
    hogwild_kernel(const Params p, float bias_step, double* total_loss) {
  extern __shared__ float shared[];  // for each warp [examples] gradients and [examples] items
  const int lane = threadIdx.x % kWarp, mine = threadIdx.x / kWarp, examples = 1 + p.negatives;
  float* gradient = shared + mine * 2 * examples;
  auto* item = reinterpret_cast<int32_t*>(gradient + examples);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  double loss = 0.0;
  float pending = 0.0f;  // the global bias's gradients
  int pairs = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + mine; i < p.n; i += warps) {
    const int64_t user = p.pairs[2 * i];
    if (!inside(p, user, p.pairs[2 * i + 1])) continue;
    for (int j = lane; j < examples; j += kWarp) item[j] = example_item(p, i, j);
    __syncwarp();
    float* row = p.user + user * p.factors;
    const float bias = __ldcg(p.user_bias + user) + __ldcg(p.global_bias);
    float sum = 0.0f;
    for (int j = 0; j < examples; ++j) {
      const float product = dot<kVec>(row, p.item + int64_t{item[j]} * p.factors, p.factors, lane);
      const float2 g = logistic_loss(product + (bias + __ldcg(p.item_bias + item[j])), j == 0);
      sum += g.x;
      loss += g.y;
      if (lane == 0) gradient[j] = g.x;
    }
    __syncwarp();
    const float decay = static_cast<float>(examples) * p.reg;
    for (int f = lane * kVec; f < p.factors; f += kWarp * kVec) {
      auto u = Floats<kVec>::load(row + f);
      Floats<kVec> total;
#pragma unroll
      for (int k = 0; k < kVec; ++k) total.v[k] = decay * u.v[k];
      for (int j = 0; j < examples; ++j) {
        float* other = p.item + int64_t{item[j]} * p.factors + f;
        const float g = gradient[j];
        auto v = Floats<kVec>::load(other);
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          total.v[k] = fmaf(g, v.v[k], total.v[k]);
          v.v[k] -= p.lr * fmaf(g, u.v[k], p.reg * v.v[k]);
        }
        v.store(other);
      }
#pragma unroll
      for (int k = 0; k < kVec; ++k) u.v[k] -= p.lr * total.v[k];
      u.store(row + f);
    }
    for (int j = lane; j < examples; j += kWarp) {
      const float before = __ldcg(p.item_bias + item[j]);
      __stcg(p.item_bias + item[j], before - p.lr * fmaf(p.reg, before, gradient[j]));
    }
    pending += sum;
    ++pairs;
    if (lane == 0) {
      const float before = __ldcg(p.user_bias + user);
      __stcg(p.user_bias + user, before - p.lr * fmaf(decay, before, sum));
      if (pairs % kBiasEvery == 0) {
        atomicAdd(p.global_bias, -bias_step * pending);
        pending = 0.0f;
      }
    }
    __syncwarp();  // before the next pair's items replace these
  }
  if (lane == 0) {
    if (pairs % kBiasEvery) atomicAdd(p.global_bias, -bias_step * pending);
    atomicAdd(total_loss, loss);
  }
}

__global__ void mean_kernel(const double* total, double examples, float* mean) {
  *mean = examples > 0.0 ? static_cast<float>(*total / examples) : 0.0f;
}

// (sorted keys, where each stood), equal keys in their order.
std::pair<Tensor, Tensor> sort_keys(const Tensor& keys) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(keys),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Tensor floats(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, std::vector<int64_t>{n}, ScalarType::Float);
}

template <int kVec>
void descend_in_blocks(const Params& p, const Tensor& user, const Tensor& pairs, double* total,
                       const LaunchScope& scope) {
  const int examples = 1 + p.negatives;
  const int64_t block = std::min(p.n, kBlock);
  const Tensor gradient = floats(user, block * examples), sum = floats(user, block), loss = floats(user, block);
  const Tensor user_gradient = floats(user, block * p.factors), user_row = floats(user, block * p.factors);
  const auto data = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const Scratch s{data(gradient), data(user_gradient), data(user_row), data(loss), data(sum), total};
  const int64_t group_pairs = std::max<int64_t>(1, kGroupExamples / (kBlock * examples)) * kBlock;
  const auto whole = [&](int64_t first, int64_t most) {
    return std::min(p.n - first, most - (p.offset + first) % kBlock);
  };

  for (int64_t group = 0; group < p.n;) {
    const int64_t size = whole(group, group_pairs);
    Tensor item_keys = torch::stable::new_empty(pairs, std::vector<int64_t>{size * examples});
    Tensor user_keys = torch::stable::new_empty(pairs, std::vector<int64_t>{size});
    keys_kernel<<<static_cast<unsigned>(ceil_div(size * examples, 256)), 256, 0, scope.stream()>>>(
        p, group, size, static_cast<int64_t*>(item_keys.mutable_data_ptr()),
        static_cast<int64_t*>(user_keys.mutable_data_ptr()));
    scope.check();
    const auto items = sort_keys(item_keys), users = sort_keys(user_keys);
    const auto ids = [](const Tensor& t, int64_t at) { return static_cast<const int64_t*>(t.const_data_ptr()) + at; };
    for (int64_t first = group; first < group + size;) {
      const int64_t here = std::min(group + size - first, whole(first, kBlock)), before = first - group;
      const Block b{ids(items.first, before * examples),
                    ids(items.second, before * examples),
                    ids(users.first, before),
                    ids(users.second, before),
                    first,
                    group,
                    static_cast<int>(here)};
      gradients_kernel<kVec>
          <<<static_cast<unsigned>(ceil_div(here, kWarps)), kWarp * kWarps, 0, scope.stream()>>>(p, b, s);
      const int64_t warps = here * (examples + 1);
      steps_kernel<kVec>
          <<<static_cast<unsigned>(1 + ceil_div(warps, kWarps)), kWarp * kWarps, 0, scope.stream()>>>(p, b, s);
      scope.check();
      first += here;
    }
    group += size;
  }
}

// Pairs that may be under way at once: a row that is in many of them keeps one of their changes and loses the others.
// Twice as many as there are users, and items for each example four times over, lose few and still fill a GPU from some
// thousand items on.
int64_t most_at_once(const Params& p) {
  return std::max<int64_t>(1, std::min(2 * p.users, 4 * p.items / (1 + p.negatives)));
}

template <int kVec>
void descend_lock_free(const Params& p, double* total, const LaunchScope& scope) {
  int device = 0, processors = 0, each = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const size_t shared = sizeof(float) * 2 * kWarps * static_cast<size_t>(1 + p.negatives);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, hogwild_kernel<kVec>, kWarp * kWarps, shared);
  const int64_t grid =
      std::min({ceil_div(p.n, kWarps), ceil_div(most_at_once(p), kWarps), int64_t{std::max(1, each)} * processors});
  // All warps take their gradients of the global bias at about the same value, and none of its steps is lost.
  const int64_t together = std::min(p.n, grid * kWarps * kBiasEvery) * (1 + p.negatives);
  hogwild_kernel<kVec>
      <<<static_cast<unsigned>(grid), kWarp * kWarps, shared, scope.stream()>>>(p, step_of(p.lr, together), total);
  scope.check();
}

Tensor mf_sgd(Tensor user, Tensor item, Tensor user_bias, Tensor item_bias, Tensor global_bias, Tensor pairs,
              int64_t negatives, double lr, double reg, int64_t seed, int64_t offset, bool deterministic) {
  check({&user, &item, &user_bias, &item_bias, &global_bias}, pairs, negatives, lr, reg, offset);
  const LaunchScope scope(kOp, user);
  pairs = as_contiguous(pairs);
  const Params p =
      params({&user, &item, &user_bias, &item_bias, &global_bias}, pairs, negatives, lr, reg, seed, offset);
  Tensor mean = torch::stable::new_empty(user, std::vector<int64_t>{});
  const Tensor total = torch::stable::new_zeros(user, std::vector<int64_t>{1}, ScalarType::Double);
  auto* sum = static_cast<double*>(total.mutable_data_ptr());
  if (p.n > 0) {
    const auto aligned = [](const float* t) { return reinterpret_cast<uintptr_t>(t) % 16 == 0; };
    const bool vectors = p.factors % 4 == 0 && aligned(p.user) && aligned(p.item);
    if (deterministic) {
      vectors ? descend_in_blocks<4>(p, user, pairs, sum, scope) : descend_in_blocks<1>(p, user, pairs, sum, scope);
    } else {
      vectors ? descend_lock_free<4>(p, sum, scope) : descend_lock_free<1>(p, sum, scope);
    }
  }
  const double examples = static_cast<double>(p.n) * static_cast<double>(1 + negatives);
  mean_kernel<<<1, 1, 0, scope.stream()>>>(sum, examples, static_cast<float*>(mean.mutable_data_ptr()));
  scope.check();
  return mean;
}

}  // namespace
}  // namespace fastops::mf_sgd

FO_IMPL(CUDA, "mf_sgd", &fastops::mf_sgd::mf_sgd)
