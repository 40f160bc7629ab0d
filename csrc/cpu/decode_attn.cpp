// decode_attn: out = softmax(scale q k^T) v of the newest rows of each sequence over its KV cache, and the log of the
// sum.
// Floor at B 8, S 1024, 9 heads on 3, D 64, T 1: K and V of 12.6 MB in fp32, 6.3 MB in bf16, 0.45 and 0.22 ms at 28
// GB/s (copy, 2 threads); 19 Mflop, 0.08 ms at 235 Gflop/s: bytes-bound up to about 16 rows times heads of a KV head.
// So K and V are read once for all of them, and the next block is fetched while one is worked on; more rows are a small
// matrix product in registers (common/cpu_attention_kernel.h).
// Reached: bench/results/cpu/decode_attn.json.
#include "common/cpu_attention_call.h"
#include "common/register.h"

namespace fastops::attention {

template void run_as<float>(const Call&, bool);
template void run_as<Half>(const Call&, bool);
template void run_as<BFloat16>(const Call&, bool);

namespace {

constexpr char kOp[] = "decode_attn";

std::tuple<Tensor, Tensor> decode_attn(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths,
                                       std::optional<double> scale, std::optional<Tensor> tree_mask,
                                       std::optional<Tensor> block_table, std::optional<Tensor> q_lens,
                                       std::optional<double> softcap, std::optional<int64_t> window) {
  check_query(kOp, q, "[B, Hq, T, D]", 4);
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), d = q.size(3);
  FO_CHECK(rows <= kMaxRows, kOp, "q must have at most ", kMaxRows, " rows a sequence (prefill_attn takes more), got ",
           rows);
  const Caches caches{k_cache, v_cache, block_table, softcap, window};
  check_attention(kOp, q, heads, caches, batch);
  check_per_sequence(kOp, "lengths", lengths, q, batch);
  check_per_sequence(kOp, "q_lens", q_lens, q, batch);
  if (tree_mask) check_tree_mask(kOp, *tree_mask, q, batch, rows);

  lengths = as_contiguous(lengths);
  q_lens = as_contiguous(q_lens);
  tree_mask = as_contiguous(tree_mask);
  const std::optional<Tensor> table = as_contiguous(block_table);
  check_cache_values(kOp, caches, lengths, table);
  for (int64_t b = 0; q_lens && b < batch; ++b) check_range(kOp, "q_lens", ints(*q_lens)[b], 0, rows);

  Tensor out = cpu_output(q, {batch, heads, rows, d}, q.scalar_type());
  Tensor lse = cpu_output(q, {batch, heads, rows}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  Call call = make_call(q, heads, caches, table, scale);
  call.out = out.mutable_data_ptr();
  call.lse = static_cast<float*>(lse.mutable_data_ptr());
  call.q_stride = {q.stride(2), q.stride(1)};
  call.out_stride = {d, rows * d};
  call.lse_stride = {1, rows};
  call.sequences.reserve(static_cast<size_t>(batch));
  call.sights.reserve(static_cast<size_t>(batch * rows));
  const bool no_pages = table && k_cache.size(0) == 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t rows_here = q_lens ? ints(*q_lens)[b] : rows, new_rows = no_pages ? 0 : rows_here;
    const int64_t place = ints(lengths)[b] - rows_here;
    call.sequences.push_back({rows, place, b, b * q.stride(0), b * heads * rows * d, b * heads * rows, b * rows});
    if (tree_mask) {
      const int64_t* masks = static_cast<const int64_t*>(tree_mask->const_data_ptr()) + b * rows;
      add_tree_sights(call.sights, masks, rows, new_rows, place, window);
    } else {
      add_causal_sights(call.sights, rows, new_rows, place, window);
    }
  }
  run(call, q.scalar_type(), true);
  return {out, lse};
}

}  // namespace
}  // namespace fastops::attention

FO_IMPL(CPU, "decode_attn", &fastops::attention::decode_attn)
