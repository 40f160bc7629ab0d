// What the kernels of mf_sgd share: its arguments and their checks, its random numbers, the constants of its blocks.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "common/check.h"

#if defined(__CUDACC__)
#define FO_HOST_DEVICE __host__ __device__
#else
#define FO_HOST_DEVICE
#endif

namespace fastops::mf_sgd {

constexpr char kOp[] = "mf_sgd";
constexpr int64_t kBlock = 2048;  // positives whose gradients are taken at the same values
constexpr int kCap = 16;          // occurrences in a block from which on a row's step no longer grows
constexpr int64_t kMaxRows = int64_t{1} << 31, kMaxNegatives = 1024;

struct Params {
  float* user;           // [users, factors]
  float* item;           // [items, factors]
  float* user_bias;      // [users]
  float* item_bias;      // [items]
  float* global_bias;    // [1]
  const int64_t* pairs;  // [n, 2]
  int64_t n, users, items;
  int factors, negatives;
  float lr, reg;
  uint64_t seed;
  int64_t offset;
};

// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// `words` is the counter before and the random words after.
FO_HOST_DEVICE inline void philox(uint64_t seed, uint32_t (&words)[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t first = uint64_t{kPhiloxM0} * words[0], second = uint64_t{kPhiloxM1} * words[2];
    words[0] = static_cast<uint32_t>(second >> 32) ^ words[1] ^ k0;
    words[2] = static_cast<uint32_t>(first >> 32) ^ words[3] ^ k1;
    words[1] = static_cast<uint32_t>(second);
    words[3] = static_cast<uint32_t>(first);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

// The item that 32 random bits stand for.
FO_HOST_DEVICE inline int32_t item_of(uint32_t word, int64_t items) {
  return static_cast<int32_t>(static_cast<uint64_t>(word) * static_cast<uint64_t>(items) >> 32);
}

// A row that occurs `count` times in a block moves by this times the sum of its gradients.
FO_HOST_DEVICE inline float step_of(float lr, int64_t count) {
  return count > kCap ? lr * (static_cast<float>(kCap) / static_cast<float>(count)) : lr;
}

inline void check_contiguous(const char* name, const Tensor& t) {
  FO_CHECK(t.is_contiguous(), kOp, name, " must be contiguous, got strides ", shape_string(t.strides()), " of shape ",
           shape_string(t.sizes()));
}

inline void check_matrix(const char* name, const Tensor& t) {
  check_dtype(kOp, name, t, ScalarType::Float);
  FO_CHECK(t.dim() == 2, kOp, name, " must have 2 dimensions, got ", t.dim());
}

inline void check_table(const char* name, const Tensor& t, const std::vector<int64_t>& wanted, const Tensor& user) {
  check_same_device(kOp, name, t, "user", user);
  check_dtype(kOp, name, t, ScalarType::Float);
  bool same = t.dim() == static_cast<int64_t>(wanted.size());
  for (size_t i = 0; same && i < wanted.size(); ++i) same = t.size(static_cast<int64_t>(i)) == wanted[i];
  FO_CHECK(same, kOp, name, " must have shape ", shape_string(wanted), ", got ", shape_string(t.sizes()));
  check_contiguous(name, t);
}

// As _check in pyops/ops/mf_sgd.py, in the same order. Pairs may have any strides.
inline void check(const std::array<const Tensor*, 5>& tables, const Tensor& pairs, int64_t negatives, double lr,
                  double reg, int64_t offset) {
  constexpr const char* kNames[] = {"user", "item", "user_bias", "item_bias", "global_bias", "pairs"};
  const Tensor &user = *tables[0], &item = *tables[1], &global_bias = *tables[4];
  check_matrix("user", user);
  check_contiguous("user", user);
  check_same_device(kOp, "item", item, "user", user);
  check_matrix("item", item);
  FO_CHECK(user.size(1) >= 1, kOp, "user must have at least 1 factor, got shape ", shape_string(user.sizes()));
  check_table("item", item, {item.size(0), user.size(1)}, user);
  check_table("user_bias", *tables[2], {user.size(0)}, user);
  check_table("item_bias", *tables[3], {item.size(0)}, user);
  check_same_device(kOp, "global_bias", global_bias, "user", user);
  check_dtype(kOp, "global_bias", global_bias, ScalarType::Float);
  FO_CHECK(global_bias.dim() <= 1 && global_bias.numel() == 1, kOp, "global_bias must have shape [] or [1], got ",
           shape_string(global_bias.sizes()));
  check_same_device(kOp, "pairs", pairs, "user", user);
  check_dtype(kOp, "pairs", pairs, ScalarType::Long);
  FO_CHECK(pairs.dim() == 2 && pairs.size(1) == 2, kOp, "pairs must have shape [n, 2], got ",
           shape_string(pairs.sizes()));
  for (int i = 0; i < 2; ++i) {
    FO_CHECK(tables[i]->size(0) <= kMaxRows, kOp, kNames[i], " must have at most ", kMaxRows, " rows, got ",
             tables[i]->size(0));
  }
  FO_CHECK(negatives >= 0 && negatives <= kMaxNegatives, kOp, "negatives must be from 0 to ", kMaxNegatives, ", got ",
           negatives);
  FO_CHECK(std::isfinite(lr) && lr >= 0, kOp, "lr must be finite and at least 0, got ", lr);
  FO_CHECK(std::isfinite(reg) && reg >= 0, kOp, "reg must be finite and at least 0, got ", reg);
  FO_CHECK(offset >= 0 && offset < int64_t{1} << 62, kOp, "offset must be from 0 to 2^62 - 1, got ", offset);

  std::array<std::pair<const char*, const char*>, 6> spans;
  for (size_t i = 0; i < spans.size(); ++i) {
    const Tensor& t = i < tables.size() ? *tables[i] : pairs;
    const char* begin = static_cast<const char*>(t.const_data_ptr());
    int64_t last = 0;  // elements from the first to the last
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    spans[i] = {begin, t.numel() ? begin + (last + 1) * static_cast<int64_t>(t.element_size()) : begin};
    for (size_t j = 0; j < i; ++j) {
      FO_CHECK(spans[i].first >= spans[j].second || spans[j].first >= spans[i].second, kOp, kNames[i],
               " must not overlap ", kNames[j], ", got tensors that share memory");
    }
  }
}

inline Params params(const std::array<Tensor*, 5>& tables, const Tensor& pairs, int64_t negatives, double lr,
                     double reg, int64_t seed, int64_t offset) {
  const auto data = [](Tensor* t) { return static_cast<float*>(t->mutable_data_ptr()); };
  return {data(tables[0]),
          data(tables[1]),
          data(tables[2]),
          data(tables[3]),
          data(tables[4]),
          static_cast<const int64_t*>(pairs.const_data_ptr()),
          pairs.size(0),
          tables[0]->size(0),
          tables[1]->size(0),
          static_cast<int>(tables[0]->size(1)),
          static_cast<int>(negatives),
          static_cast<float>(lr),
          static_cast<float>(reg),
          static_cast<uint64_t>(seed),
          offset};
}

}  // namespace fastops::mf_sgd
