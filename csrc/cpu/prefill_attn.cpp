// prefill_attn: causal attention of many new rows a sequence, packed one after the other, over their KV caches.
// Floor at 4096 rows of one prompt, 9 heads on 3, D 64: 19.3 Gflop (4 D a pair of row and visible key, half of them),
// 82 ms at 235 Gflop/s (fp32, 2 threads at 3.67 GHz), 41 ms in bf16; 19 MB in fp32, 0.7 ms at 28 GB/s: flop-bound.
// Tiles of rows times heads share the transposed keys of a block, and skip the blocks that none of their rows sees.
// Reached: bench/results/cpu/prefill_attn.json.
#include "common/cpu_attention_call.h"
#include "common/register.h"

namespace fastops::attention {
namespace {

constexpr char kOp[] = "prefill_attn";

// Where sequences begin in q: from 0 to `rows`, none longer than max_q_len; `starts` is contiguous.
void check_starts(const Tensor& starts, int64_t rows, int64_t max_q_len) {
  const std::vector<int32_t> at(ints(starts), ints(starts) + starts.size(0));
  FO_CHECK(at.front() == 0 && at.back() == rows && std::is_sorted(at.begin(), at.end()), kOp,
           "cu_q_lens must rise from 0 to N = ", rows, ", got ", shape_string(at));
  for (size_t b = 0; b + 1 < at.size(); ++b) {
    check_range(kOp, "the differences of cu_q_lens", at[b + 1] - at[b], 0, max_q_len);
  }
}

std::tuple<Tensor, Tensor> prefill_attn(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_q_lens, Tensor lengths,
                                        int64_t max_q_len, std::optional<double> scale,
                                        std::optional<Tensor> block_table, std::optional<double> softcap,
                                        std::optional<int64_t> window) {
  check_query(kOp, q, "[N, Hq, D]", 3);
  check_sizes(kOp, "lengths", lengths, "[B]", 1);
  const int64_t rows = q.size(0), heads = q.size(1), d = q.size(2), batch = lengths.size(0);
  const Caches caches{k_cache, v_cache, block_table, softcap, window};
  check_attention(kOp, q, heads, caches, batch);
  check_per_sequence(kOp, "lengths", lengths, q, batch);
  check_same_device(kOp, "cu_q_lens", cu_q_lens, "q", q);
  check_dtype(kOp, "cu_q_lens", cu_q_lens, ScalarType::Int);
  FO_CHECK(cu_q_lens.dim() == 1 && cu_q_lens.size(0) == batch + 1, kOp, "cu_q_lens must be [B + 1] = [", batch + 1,
           "], got ", shape_string(cu_q_lens.sizes()));
  FO_CHECK(max_q_len >= 0, kOp, "max_q_len must not be negative, got ", max_q_len);

  lengths = as_contiguous(lengths);
  cu_q_lens = as_contiguous(cu_q_lens);
  const std::optional<Tensor> table = as_contiguous(block_table);
  check_starts(cu_q_lens, rows, max_q_len);
  check_cache_values(kOp, caches, lengths, table);

  Tensor out = cpu_output(q, {rows, heads, d}, q.scalar_type());
  Tensor lse = cpu_output(q, {rows, heads}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  Call call = make_call(q, heads, caches, table, scale);
  call.out = out.mutable_data_ptr();
  call.lse = static_cast<float*>(lse.mutable_data_ptr());
  call.q_stride = {q.stride(0), q.stride(1)};
  call.out_stride = {heads * d, d};
  call.lse_stride = {heads, 1};
  call.sequences.reserve(static_cast<size_t>(batch));
  call.sights.reserve(static_cast<size_t>(rows));
  const bool no_pages = table && k_cache.size(0) == 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = ints(cu_q_lens)[b], some = ints(cu_q_lens)[b + 1] - first;
    const int64_t place = ints(lengths)[b] - some;
    call.sequences.push_back({some, place, b, first * q.stride(0), first * heads * d, first * heads, first});
    add_causal_sights(call.sights, some, no_pages ? 0 : some, place, window);
  }
  run(call, q.scalar_type(), false);
  return {out, lse};
}

}  // namespace
}  // namespace fastops::attention

FO_IMPL(CPU, "prefill_attn", &fastops::attention::prefill_attn)
