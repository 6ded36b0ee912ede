// What the bindings of the CPU and of CUDA take: tensors become a kernel's arguments, and are checked on the way.
#pragma once

#include <cmath>
#include <optional>

#include "ops/varlen_attention/varlen_attention.h"
#include "tensor.h"

namespace m3ae {

inline HeadRows head_rows(const char* name, const Tensor& x, int64_t rows, int64_t heads, int64_t width, Dtype dtype) {
  return {x.strided(name, {rows, heads, width}, dtype), x.stride(0), x.stride(1)};
}

inline VarlenAttention varlen_attention_arguments(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  std::optional<double> scale, const Tensor& out, const Tensor& stats) {
  const int64_t rows = q.size(0), heads = q.size(1), width = q.size(2), key_rows = k.size(0), key_heads = k.size(1);
  const Dtype dtype = q.dtype();
  M3AE_CHECK(width > 0, "q must have at least one channel, got none");
  M3AE_CHECK(key_heads > 0 && heads % key_heads == 0, "k must have a number of heads that divides q's ", heads,
             ", got ", key_heads);
  return {head_rows("q", q, rows, heads, width, dtype), head_rows("k", k, key_rows, key_heads, width, dtype),
          head_rows("v", v, key_rows, key_heads, width, dtype), out.dense("out", {rows, heads, width}, dtype),
          stats.dense("stats", {2, heads, rows}, accumulator(dtype)), rows, heads, heads / key_heads, width,
          scale.value_or(std::pow(static_cast<double>(width), -0.5)), dtype};
}

inline VarlenAttentionBackward varlen_attention_arguments(const Tensor& dout, const Tensor& dlse, const Tensor& q,
                                                          const Tensor& k, const Tensor& v, const Tensor& out,
                                                          const Tensor& stats, std::optional<double> scale,
                                                          const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const VarlenAttention a = varlen_attention_arguments(q, k, v, scale, out, stats);
  const int64_t key_rows = k.size(0), key_heads = k.size(1);
  return {head_rows("dout", dout, a.query_rows, a.heads, a.width, a.dtype), a.q, a.k, a.v, a.out, a.stats,
          dlse.optional("dlse", {a.heads, a.query_rows}, accumulator(a.dtype)),
          head_rows("dq", dq, a.query_rows, a.heads, a.width, a.dtype),
          head_rows("dk", dk, key_rows, key_heads, a.width, a.dtype),
          head_rows("dv", dv, key_rows, key_heads, a.width, a.dtype), a.query_rows, a.heads, a.groups, a.width, a.scale,
          a.dtype};
}

}  // namespace m3ae
