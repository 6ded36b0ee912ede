// restore_tokens: output rows [begin, end). Pure: no threads, no allocation.
#include "ops/restore_tokens/restore_tokens.h"

#include "cpu/vec.h"

namespace m3ae::M3AE_ISA {
namespace {

template <class Kept, class Out>
void forward(const RestoreTokens& a, int64_t begin, int64_t end) {
  using V = Vec<Out>;
  const int64_t width = a.width;
  for (int64_t t = begin; t < end; ++t) {
    const int32_t row = a.rows[t], slot = a.slots[t];
    const bool image = slot >= 0 && slot < a.patches, text = slot >= a.patches;
    const Kept* kept = row >= 0 ? as<Kept>(a.kept) + row * width : nullptr;
    const Out* mask = row >= 0 ? nullptr : as<Out>(image ? a.image_mask_token : text ? a.text_mask_token : nullptr);
    const Out* position = image  ? as<Out>(a.image_position) + slot * width
                          : text ? as<Out>(a.text_position) + (slot - a.patches) * width
                                 : nullptr;
    const Out* type = as<Out>(image ? a.image_type : text ? a.text_type : nullptr);
    Out* out = as<Out>(a.out) + t * width;
    for_lanes<V>(width, [&](int64_t d, int n) {
      const V source = kept ? load_lanes<V>(kept + d, n) : mask ? load_lanes<V>(mask + d, n) : V::zero();
      const V place = position ? load_lanes<V>(position + d, n) : V::zero();
      const V of = type ? load_lanes<V>(type + d, n) : V::zero();
      store_lanes(source + (place + of), out + d, n);
    });
  }
}

template <class Kept, class Out>
void backward(const RestoreTokensBackward& a, int64_t begin, int64_t end, void* partial) {
  using V = Vec<Out>;
  using Accumulator = typename V::scalar;
  const int64_t width = a.width;
  for (int64_t t = begin; t < end; ++t) {
    const int32_t row = a.rows[t], slot = a.slots[t];
    const Out* dout = as<Out>(a.dout) + t * width;
    Kept* dkept = row >= 0 && a.dkept ? as<Kept>(a.dkept) + row * width : nullptr;
    const int64_t which = 2 * (slot >= a.patches) + (row >= 0);
    Accumulator* sum = slot >= 0 && partial ? as<Accumulator>(partial) + which * width : nullptr;
    if (!dkept && !sum) continue;
    for_lanes<V>(width, [&](int64_t d, int n) {
      const V value = load_lanes<V>(dout + d, n);
      if (dkept) store_lanes(value, dkept + d, n);
      if (sum) store_lanes(load_lanes<V>(sum + d, n) + value, sum + d, n);
    });
  }
}

}  // namespace

void restore_tokens(const RestoreTokens& a, int64_t begin, int64_t end) {
  if (a.out_dtype == Dtype::f64) return forward<double, double>(a, begin, end);
  if (a.out_dtype == Dtype::bf16) return forward<bfloat16, bfloat16>(a, begin, end);
  if (a.kept_dtype == Dtype::bf16) return forward<bfloat16, float>(a, begin, end);
  forward<float, float>(a, begin, end);
}

void restore_tokens_backward(const RestoreTokensBackward& a, int64_t begin, int64_t end, void* partial) {
  if (a.out_dtype == Dtype::f64) return backward<double, double>(a, begin, end, partial);
  if (a.out_dtype == Dtype::bf16) return backward<bfloat16, bfloat16>(a, begin, end, partial);
  if (a.kept_dtype == Dtype::bf16) return backward<bfloat16, float>(a, begin, end, partial);
  backward<float, float>(a, begin, end, partial);
}

}  // namespace m3ae::M3AE_ISA
