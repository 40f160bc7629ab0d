// The kernels of csrc/cpu/mf_sgd.cpp, in terms of cpu_simd.h. No include guard: common/cpu_each_isa.h includes this
// once for each instruction set, with
//   FO_VECTOR  the struct of cpu_simd.h to use
//   FO_KERNEL  the target attribute of its functions

namespace {

using V = FO_VECTOR;

FO_KERNEL FO_INLINE void prefetch_row(const float* row, int factors) {
  for (int f = 0; f < factors; f += 16) __builtin_prefetch(row + f);
}

// philox() of kTile counters from `counter` on, and `index`: word[w][i] is word w of counter i. Words stand in 64 bits,
// as the products of two need them.
FO_KERNEL FO_INLINE void philox_tile(uint64_t seed, uint64_t counter, int index, uint64_t (&word)[4][kTile]) {
  typedef uint64_t Lanes __attribute__((vector_size(64)));
  constexpr int kLanes = sizeof(Lanes) / sizeof(uint64_t);
  const Lanes low = Lanes{} + 0xffffffffu;
  for (int base = 0; base < kTile; base += kLanes) {
    Lanes all = Lanes{0, 1, 2, 3, 4, 5, 6, 7} + (counter + static_cast<uint64_t>(base));
    Lanes c0 = all & low, c1 = all >> 32, c2 = Lanes{} + static_cast<uint64_t>(index), c3{};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const Lanes first = c0 * kPhiloxM0, second = c2 * kPhiloxM1;
      c0 = (second >> 32) ^ c1 ^ k0;
      c2 = (first >> 32) ^ c3 ^ k1;
      c1 = second & low;
      c3 = first & low;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    std::memcpy(word[0] + base, &c0, sizeof(c0));
    std::memcpy(word[1] + base, &c1, sizeof(c1));
    std::memcpy(word[2] + base, &c2, sizeof(c2));
    std::memcpy(word[3] + base, &c3, sizeof(c3));
  }
}

// Items of `count` <= kTile positives from `first` on: theirs, then the sampled ones.
FO_KERNEL FO_INLINE void draw_items(const Params& p, int64_t first, int count, int32_t* items) {
  const int examples = 1 + p.negatives;
  for (int i = 0; i < count; ++i) items[i * examples] = static_cast<int32_t>(p.pairs[2 * (first + i) + 1]);
  const uint64_t counter = static_cast<uint64_t>(p.offset + first);
  for (int index = 0; 4 * index < p.negatives; ++index) {
    uint64_t word[4][kTile];
    philox_tile(p.seed, counter, index, word);
    const int left = std::min(4, p.negatives - 4 * index);
    for (int i = 0; i < count; ++i) {
      for (int w = 0; w < left; ++w)
        items[i * examples + 1 + 4 * index + w] = item_of(static_cast<uint32_t>(word[w][i]), p.items);
    }
  }
}

FO_KERNEL FO_INLINE float dot(const float* a, const float* b, int n) {
  auto even = V::zero(), odd = V::zero();
  int f = 0;
  for (; f + 2 * V::kLanes <= n; f += 2 * V::kLanes) {
    even = V::fma(V::load(a + f), V::load(b + f), even);
    odd = V::fma(V::load(a + f + V::kLanes), V::load(b + f + V::kLanes), odd);
  }
  if (f + V::kLanes <= n) {
    even = V::fma(V::load(a + f), V::load(b + f), even);
    f += V::kLanes;
  }
  float total = V::sum(V::add(even, odd));
  for (; f < n; ++f) total += a[f] * b[f];
  return total;
}

// z of a positive's examples.
FO_KERNEL FO_INLINE void products(const Params& p, int64_t user, const int32_t* items, int examples, float global_bias,
                                  float* z) {
  const float* row = p.user + user * p.factors;
  const float bias = p.user_bias[user] + global_bias;
  for (int j = 0; j < examples; ++j) {
    z[j] = dot(row, p.item + int64_t{items[j]} * p.factors, p.factors) + (bias + p.item_bias[items[j]]);
  }
}

// From z [count * examples] to d loss / d z, in place, and each positive's loss and sum of gradients; z and softplus
// are padded to whole tiles.
FO_KERNEL FO_INLINE void losses(float* z, int count, int examples, float* softplus, float* loss, float* sum) {
  for (int i = 0; i < count; ++i) loss[i] = -z[i * examples];  // of the label
  for (int base = 0; base < count * examples; base += kFloats) logistic(z + base, softplus + base);
  for (int i = 0; i < count; ++i) {
    float* g = z + i * examples;
    g[0] -= 1.0f;
    float all = 0.0f, loss_of_all = loss[i];
    for (int j = 0; j < examples; ++j) {
      all += g[j];
      loss_of_all += softplus[i * examples + j];
    }
    sum[i] = all;
    loss[i] = loss_of_all;
  }
}

// out = sum over j of weight[j] * row(j), `vectors` vectors from f on.
template <int kVectors, class Row>
FO_KERNEL FO_INLINE void weighted_sum(int count, const float* weight, const Row& row, int f, float* out) {
  V::F sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = V::zero();
  for (int j = 0; j < count; ++j) {
    const float* from = row(j) + f;
    const auto w = V::broadcast(weight + j);
    for (int v = 0; v < kVectors; ++v) sum[v] = V::fma(w, V::load(from + v * V::kLanes), sum[v]);
  }
  for (int v = 0; v < kVectors; ++v) V::store(out + f + v * V::kLanes, sum[v]);
}

template <class Row>
FO_KERNEL FO_INLINE void weighted_sum(int count, const float* weight, const Row& row, int factors, float* out) {
  int f = 0;
  for (; f + 4 * V::kLanes <= factors; f += 4 * V::kLanes) weighted_sum<4>(count, weight, row, f, out);
  for (; f + V::kLanes <= factors; f += V::kLanes) weighted_sum<1>(count, weight, row, f, out);
  for (; f < factors; ++f) {
    float sum = 0.0f;
    for (int j = 0; j < count; ++j) sum += weight[j] * row(j)[f];
    out[f] = sum;
  }
}

struct ItemRows {
  const float* table;
  const int32_t* items;
  int factors;
  FO_KERNEL FO_INLINE const float* operator()(int j) const { return table + int64_t{items[j]} * factors; }
};

struct UserRows {  // of the positives that examples belong to
  const float* rows;
  const int32_t* positive;
  int factors;
  FO_KERNEL FO_INLINE const float* operator()(int j) const { return rows + int64_t{positive[j]} * factors; }
};

// The first half of a block, for positives begin ... end - 1 of it.
FO_KERNEL void gradients(const Block& b, int64_t begin, int64_t end) {
  const Params& p = *b.params;
  Scratch& s = *b.scratch;
  const int examples = s.examples;
  const auto at = [](auto& v, int64_t i) { return v.data() + i; };
  for (int64_t i = begin; i < end; i += kTile) {
    draw_items(p, b.first + i, static_cast<int>(std::min<int64_t>(kTile, end - i)), at(s.items, i * examples));
  }
  const int64_t tile = std::clamp<int64_t>(kTileFloats / (int64_t{p.factors} * examples), 1, kTile);
  std::vector<float> softplus(static_cast<size_t>(ceil_div(tile * examples, kFloats) * kFloats)), z(softplus);
  for (int64_t i = begin; i < end; i += tile) {
    const int count = static_cast<int>(std::min(tile, end - i));
    const int64_t* pairs = p.pairs + 2 * (b.first + i);
    for (int64_t next = i + tile; next < std::min(end, i + 2 * tile); ++next) {
      prefetch_row(p.user + p.pairs[2 * (b.first + next)] * p.factors, p.factors);
      for (int j = 0; j < examples; ++j) {
        prefetch_row(p.item + int64_t{s.items[next * examples + j]} * p.factors, p.factors);
      }
    }
    for (int k = 0; k < count; ++k) {
      const int64_t place = (i + k) * examples;
      products(p, pairs[2 * k], at(s.items, place), examples, *p.global_bias, z.data() + k * examples);
    }
    losses(z.data(), count, examples, softplus.data(), at(s.loss, i), at(s.sum, i));
    std::copy_n(z.data(), count * examples, at(s.gradient, i * examples));
    for (int k = 0; k < count; ++k) {
      const int64_t place = (i + k) * examples;
      const ItemRows rows{p.item, at(s.items, place), p.factors};
      weighted_sum(examples, at(s.gradient, place), rows, p.factors, at(s.user_gradient, (i + k) * p.factors));
      std::copy_n(p.user + pairs[2 * k] * p.factors, p.factors, at(s.user_row, (i + k) * p.factors));
    }
  }
}

// w -= step * (total + decay * w)
FO_KERNEL FO_INLINE void move_row(float* w, const float* total, int n, float step, float decay) {
  const auto minus = -step;
  int f = 0;
  for (; f + V::kLanes <= n; f += V::kLanes) {
    const auto before = V::load(w + f);
    const auto sum = V::fma(V::broadcast(&decay), before, V::load(total + f));
    V::store(w + f, V::fma(V::broadcast(&minus), sum, before));
  }
  for (; f < n; ++f) w[f] -= step * (total[f] + decay * w[f]);
}

// Whose row it is, in [0, owners).
FO_KERNEL FO_INLINE int owner_of(int64_t row, int owners) {
  const uint32_t mixed = static_cast<uint32_t>(row / kOwnedRows) * 0x9E3779B1u;
  return static_cast<int>(uint64_t{mixed} * static_cast<uint32_t>(owners) >> 32);
}

// Puts occurrence `i` before the others of `row`; to be called from the last to the first.
FO_KERNEL FO_INLINE void link(std::vector<Chain>& chains, std::vector<int32_t>& next, std::vector<int64_t>& rows,
                              uint32_t stamp, int64_t row, int64_t i) {
  Chain& chain = chains[static_cast<size_t>(row)];
  const bool seen = chain.stamp == stamp;
  next[static_cast<size_t>(i)] = seen ? chain.first : -1;
  if (!seen) rows.push_back(row);
  chain = {stamp, static_cast<int32_t>(i)};
}

// The step of one row and its bias: `count` occurrences, `each` examples in one; occurrence j adds weight[j] times row
// positive[j] of `rows`, and bias_gradient[j].
FO_KERNEL FO_INLINE void take_step(const Params& p, float* row, float* bias, const float* rows, const Owned& o,
                                   const float* weight, const float* bias_gradient, int count, int64_t each,
                                   float* total) {
  const float step = step_of(p.lr, count * each), decay = static_cast<float>(count * each) * p.reg;
  weighted_sum(count, weight, UserRows{rows, o.positive.data(), p.factors}, p.factors, total);
  move_row(row, total, p.factors, step, decay);
  float sum = 0.0f;
  for (int j = 0; j < count; ++j) sum += bias_gradient[j];
  *bias -= step * (sum + decay * *bias);
}

// The second half of a block: the rows that `owner` has.
FO_KERNEL void steps(const Block& b, int owner) {
  const Params& p = *b.params;
  Scratch& s = *b.scratch;
  Owned& o = s.owned[static_cast<size_t>(owner)];
  const bool all = b.owners == 1;
  int32_t* const positive = o.positive.data();
  float *const weight = o.weight.data(), *const total = o.total.data();

  o.rows.clear();
  for (int64_t e = b.size * s.examples; e-- > 0;) {
    const int64_t row = s.items[static_cast<size_t>(e)];
    if (all || owner_of(row, b.owners) == owner) link(s.item_chain, s.item_next, o.rows, b.stamp, row, e);
  }
  for (size_t r = 0; r < o.rows.size(); ++r) {
    const int64_t row = o.rows[r];
    if (r + 1 < o.rows.size()) prefetch_row(p.item + o.rows[r + 1] * p.factors, p.factors);
    int count = 0;
    for (int32_t e = s.item_chain[static_cast<size_t>(row)].first; e >= 0; e = s.item_next[static_cast<size_t>(e)]) {
      positive[count] = static_cast<int32_t>(static_cast<uint64_t>(e) * s.reciprocal >> 32);
      weight[count++] = s.gradient[static_cast<size_t>(e)];
    }
    take_step(p, p.item + row * p.factors, p.item_bias + row, s.user_row.data(), o, weight, weight, count, 1, total);
  }

  o.rows.clear();
  const int64_t* pairs = p.pairs + 2 * b.first;
  for (int64_t i = b.size; i-- > 0;) {
    const int64_t row = pairs[2 * i];
    if (all || owner_of(row, b.owners) == owner) link(s.user_chain, s.user_next, o.rows, b.stamp, row, i);
  }
  for (size_t r = 0; r < o.rows.size(); ++r) {
    const int64_t row = o.rows[r];
    if (r + 1 < o.rows.size()) prefetch_row(p.user + o.rows[r + 1] * p.factors, p.factors);
    int count = 0;
    for (int32_t i = s.user_chain[static_cast<size_t>(row)].first; i >= 0; i = s.user_next[static_cast<size_t>(i)]) {
      positive[count] = i;
      weight[count++] = s.sum[static_cast<size_t>(i)];
    }
    take_step(p, p.user + row * p.factors, p.user_bias + row, s.user_gradient.data(), o, s.ones.data(), weight, count,
              s.examples, total);
  }
}

// Pairs begin ... end - 1 one after the other, each with its negatives, at the values they find. Other threads do the
// same meanwhile: a row that two of them change at once keeps one of the changes, or some floats of each. The global
// bias is each thread's own for a tile, then what it moved by is added to the shared one. Returns the summed loss.
FO_KERNEL double hogwild(const Params& p, int64_t begin, int64_t end) {
  const int examples = 1 + p.negatives;
  const float minus = -p.lr;
  std::vector<int32_t> drawn[2] = {std::vector<int32_t>(static_cast<size_t>(kTile * examples)),
                                   std::vector<int32_t>(static_cast<size_t>(kTile * examples))};
  std::vector<float> gradient(static_cast<size_t>(ceil_div(examples, kFloats) * kFloats)), softplus(gradient);
  std::atomic_ref<float> shared_bias(*p.global_bias);
  double total = 0.0;
  draw_items(p, begin, static_cast<int>(std::min<int64_t>(kTile, end - begin)), drawn[0].data());
  for (int64_t i = begin, turn = 0; i < end; i += kTile, turn ^= 1) {
    const std::vector<int32_t>& items = drawn[turn];
    if (i + kTile < end) {
      const int64_t after = std::min<int64_t>(kTile, end - i - kTile);
      draw_items(p, i + kTile, static_cast<int>(after), drawn[turn ^ 1].data());
      for (int64_t e = 0; e < after * examples; ++e) {
        prefetch_row(p.item + int64_t{drawn[turn ^ 1][static_cast<size_t>(e)]} * p.factors, p.factors);
      }
      for (int64_t k = 0; k < after; ++k) prefetch_row(p.user + p.pairs[2 * (i + kTile + k)] * p.factors, p.factors);
    }
    const float found = shared_bias.load(std::memory_order_relaxed);
    float bias = found;
    for (int64_t k = 0; k < std::min<int64_t>(kTile, end - i); ++k) {
      const int64_t user = p.pairs[2 * (i + k)];
      const int32_t* mine = items.data() + k * examples;
      float loss, sum;
      products(p, user, mine, examples, bias, gradient.data());
      losses(gradient.data(), 1, examples, softplus.data(), &loss, &sum);
      total += loss;
      float* row = p.user + user * p.factors;
      const float decay = static_cast<float>(examples) * p.reg;
      int f = 0;
      for (; f + V::kLanes <= p.factors; f += V::kLanes) {
        const auto u = V::load(row + f);
        auto all = V::mul(V::broadcast(&decay), u);
        for (int j = 0; j < examples; ++j) {
          float* other = p.item + int64_t{mine[j]} * p.factors + f;
          const auto v = V::load(other), g = V::broadcast(&gradient[static_cast<size_t>(j)]);
          all = V::fma(g, v, all);
          V::store(other, V::fma(V::broadcast(&minus), V::fma(g, u, V::mul(V::broadcast(&p.reg), v)), v));
        }
        V::store(row + f, V::fma(V::broadcast(&minus), all, u));
      }
      for (; f < p.factors; ++f) {
        const float u = row[f];
        float all = decay * u;
        for (int j = 0; j < examples; ++j) {
          float& v = p.item[int64_t{mine[j]} * p.factors + f];
          const float g = gradient[static_cast<size_t>(j)];
          all += g * v;
          v -= p.lr * (g * u + p.reg * v);
        }
        row[f] = u - p.lr * all;
      }
      for (int j = 0; j < examples; ++j) {
        float& v = p.item_bias[mine[j]];
        v -= p.lr * (gradient[static_cast<size_t>(j)] + p.reg * v);
      }
      p.user_bias[user] -= p.lr * (sum + decay * p.user_bias[user]);
      bias -= p.lr * sum;
    }
    shared_bias.fetch_add(bias - found, std::memory_order_relaxed);
  }
  return total;
}

template <class T>  // float
constexpr Kernel kernels() {
  return {&gradients, &steps, &hogwild};
}

}  // namespace
