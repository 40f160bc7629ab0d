// mf_sgd: one pass of SGD over pairs and their sampled negatives, in place; sigmoid(u . v + biases), cross-entropy.
// Floor at 943 x 1682 tables, F = 64, 100 000 pairs, 4 negatives: an example multiplies and adds 5 F times (z, both
// rows' sums), 64 Mflop a 100 000 examples' dot alone; 320 Mflop in all, 2 ms at 0.16 Tflop/s. The tables (0.7 MB) stay
// in L2, through which a pair moves 8 (F + 1) (2 + negatives) = 3.1 kB: 312 MB, 2.5 ms at 64 bytes a cycle and core.
// Tables beyond the caches are bound by memory instead: the same bytes at 27 GB/s, 12 ms.
// In blocks: all gradients of a block at the values before it, then each row's step, summed along the chain of its
// occurrences by the one thread that owns it; so the bits do not depend on the threads. Lock-free: pair after pair.
// Reached: bench/results/cpu/mf_sgd.json.
#include "common/mf_sgd.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "common/cpu_logistic.h"
#include "common/cpu_simd.h"
#include "common/cpu_team.h"
#include "common/register.h"
#include "common/tensor.h"

namespace fastops::mf_sgd {
namespace {

constexpr int kTile = 16;          // positives whose negatives are drawn together, and whose sigmoids are
constexpr int kTileFloats = 6144;  // of item rows in a tile: they are read twice, the second time from L1
constexpr int kOwnedRows = 16;     // neighbouring rows have one owner, so that biases share no cache line
constexpr int64_t kGrain = 16384;  // factors of examples worth a thread's while

struct Chain {
  uint32_t stamp = 0;  // the block it is of
  int32_t first = 0;
};

// What an owner of rows needs: its rows of a block, and the occurrences of the one whose step it takes.
struct Owned {
  std::vector<int64_t> rows;
  std::vector<int32_t> positive;  // whose examples they are
  std::vector<float> weight, total;
};

// What a block needs beside the tables.
struct Scratch {
  int examples;                      // a positive's: 1 + negatives
  std::vector<int32_t> items;        // [kBlock, examples]
  std::vector<float> gradient;       // [kBlock, examples], of z
  std::vector<float> user_gradient;  // [kBlock, factors]: sum over a positive's examples of gradient * item row
  std::vector<float> user_row;       // [kBlock, factors]: the user's row before the block
  std::vector<float> loss, sum;      // [kBlock]: a positive's loss, and the sum of its gradients
  std::vector<Chain> item_chain, user_chain;  // [items], [users]: the first of the row's examples or positives
  std::vector<int32_t> item_next, user_next;  // [kBlock, examples], [kBlock]: the next one of the row, or -1

  std::vector<float> ones;  // [kBlock]
  uint64_t reciprocal;      // e / examples = e * reciprocal >> 32 for every e of a block
  std::vector<Owned> owned;

  Scratch(const Params& p, int owners)
      : examples(1 + p.negatives),
        reciprocal(((uint64_t{1} << 32) + static_cast<uint64_t>(p.negatives)) / (1 + p.negatives)) {
    const auto block = static_cast<size_t>(std::min(p.n, kBlock)), each = block * static_cast<size_t>(examples);
    items.resize(each);
    gradient.resize(each);
    item_next.resize(each);
    user_next.resize(block);
    loss.resize(block);
    sum.resize(block);
    user_gradient.resize(block * static_cast<size_t>(p.factors));
    user_row.resize(block * static_cast<size_t>(p.factors));
    item_chain.resize(static_cast<size_t>(p.items));
    user_chain.resize(static_cast<size_t>(p.users));
    ones.assign(block, 1.0f);
    owned.resize(static_cast<size_t>(owners));
    for (Owned& o : owned) {
      o.rows.reserve(std::min(each, static_cast<size_t>(p.items)));
      o.positive.resize(each);
      o.weight.resize(each);
      o.total.resize(static_cast<size_t>(p.factors));
    }
  }
};

struct Block {
  const Params* params;
  Scratch* scratch;
  int64_t first;  // within the call
  int64_t size;
  uint32_t stamp;
  int owners;
};

// The three functions that are compiled once for each instruction set.
struct Kernel {
  void (*gradients)(const Block&, int64_t begin, int64_t end);
  void (*steps)(const Block&, int owner);
  double (*hogwild)(const Params&, int64_t begin, int64_t end);
};

}  // namespace

#define FO_FLOAT_ONLY
#define FO_KERNELS "common/cpu_mf_sgd.h"
#include "common/cpu_each_isa.h"

namespace {

// Half a vector left over costs eight steps of one float: there the narrower vectors are faster.
Kernel kernel_for(Isa isa, int factors) {
  const bool narrow = factors % 16 >= 8 && factors < 64;
  return kernels_for<float>(narrow ? std::min(isa, Isa::kAvx2) : isa);
}

void check_ids(const Params& p) {
  std::atomic<int64_t> worst{p.n};  // the first bad pair
  torch::stable::parallel_for(0, p.n, 1 << 15, [&](int64_t begin, int64_t end) {
    uint64_t outside = 0;
    for (int64_t i = begin; i < end; ++i) {
      outside |= static_cast<uint64_t>(p.pairs[2 * i]) >= static_cast<uint64_t>(p.users);
      outside |= static_cast<uint64_t>(p.pairs[2 * i + 1]) >= static_cast<uint64_t>(p.items);
    }
    if (outside) worst = begin;
  });
  if (worst == p.n) return;
  for (int column = 0; column < 2; ++column) {  // as Python says it: the users' before the items'
    int64_t low = 0, high = -1;
    for (int64_t i = 0; i < p.n; ++i) {
      low = std::min(low, p.pairs[2 * i + column]);
      high = std::max(high, p.pairs[2 * i + column]);
    }
    const int64_t rows = column ? p.items : p.users;
    FO_CHECK(low >= 0 && high < rows, kOp, "pairs must hold ", column ? "items" : "users", " from 0 to ", rows - 1,
             ", got ", low < 0 ? low : high);
  }
}

// Returns the summed loss.
double descend_in_blocks(const Params& p, const Kernel& kernel, Team& team) {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  Scratch scratch(p, threads);
  const int64_t work = int64_t{p.factors} * scratch.examples, unit = std::max<int64_t>(kTile, kGrain / work);
  double loss = 0.0;
  uint32_t stamp = 0;
  for (int64_t first = 0; first < p.n;) {
    const int64_t size = std::min(p.n - first, kBlock - (p.offset + first) % kBlock);
    const int owners = size > unit ? threads : 1;
    if (++stamp == 0) {  // of 2^32 blocks: no old link may look new
      std::fill(scratch.item_chain.begin(), scratch.item_chain.end(), Chain{});
      std::fill(scratch.user_chain.begin(), scratch.user_chain.end(), Chain{});
      stamp = 1;
    }
    const Block block{&p, &scratch, first, size, stamp, owners};
    team.run(ceil_div(size, unit),
             [&](int64_t i) { kernel.gradients(block, i * unit, std::min(size, (i + 1) * unit)); });
    team.run(owners, [&](int64_t owner) { kernel.steps(block, static_cast<int>(owner)); });
    double sum = 0.0;
    for (int64_t i = 0; i < size; ++i) {
      sum += scratch.sum[static_cast<size_t>(i)];
      loss += scratch.loss[static_cast<size_t>(i)];
    }
    *p.global_bias -= step_of(p.lr, size * scratch.examples) * static_cast<float>(sum);
    first += size;
  }
  return loss;
}

double descend_lock_free(const Params& p, const Kernel& kernel) {
  std::atomic<double> loss{0.0};
  torch::stable::parallel_for(0, p.n, kBlock,
                              [&](int64_t begin, int64_t end) { loss.fetch_add(kernel.hogwild(p, begin, end)); });
  return loss;
}

Tensor mf_sgd(Tensor user, Tensor item, Tensor user_bias, Tensor item_bias, Tensor global_bias, Tensor pairs,
              int64_t negatives, double lr, double reg, int64_t seed, int64_t offset, bool deterministic) {
  check({&user, &item, &user_bias, &item_bias, &global_bias}, pairs, negatives, lr, reg, offset);
  pairs = as_contiguous(pairs);
  const Params p =
      params({&user, &item, &user_bias, &item_bias, &global_bias}, pairs, negatives, lr, reg, seed, offset);
  check_ids(p);
  const Kernel kernel = kernel_for(active_isa, p.factors);
  double loss = 0.0;
  if (deterministic) {
    Team::work([&](Team& team) { loss = descend_in_blocks(p, kernel, team); });
  } else {
    loss = descend_lock_free(p, kernel);
  }
  Tensor mean = torch::stable::new_empty(user, std::vector<int64_t>{});
  const double examples = static_cast<double>(p.n) * static_cast<double>(1 + negatives);
  *static_cast<float*>(mean.mutable_data_ptr()) = p.n ? static_cast<float>(loss / examples) : 0.0f;
  return mean;
}

}  // namespace
}  // namespace fastops::mf_sgd

FO_IMPL(CPU, "mf_sgd", &fastops::mf_sgd::mf_sgd)
