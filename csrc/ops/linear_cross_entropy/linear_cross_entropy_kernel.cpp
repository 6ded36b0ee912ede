// linear_cross_entropy: rows [begin, end) of a block of logits. Pure: no threads, no allocation.
#include "ops/linear_cross_entropy/linear_cross_entropy.h"

#include <cmath>

#include "cpu/vec_math.h"

namespace m3ae::M3AE_ISA {
namespace {

constexpr int64_t kSpan = 1024;  // logits summed in vector lanes before they join a fp64 sum

// The sum over [0, count) of term(offset, lanes), whose lanes past the first n are zero.
template <class V, class Term>
M3AE_INLINE double sum_lanes(int64_t count, const Term& term) {
  double sum = 0;
  for (int64_t first = 0; first < count; first += kSpan) {
    V lanes = V::zero();
    for_lanes<V>(count - first < kSpan ? count - first : kSpan,
                 [&](int64_t d, int n) { lanes = lanes + term(first + d, n); });
    sum += static_cast<double>(lanes.sum());
  }
  return sum;
}

template <class V, class T>
M3AE_INLINE typename V::scalar at(const T* p) { return V::load_first(p, 1).sum(); }

template <class T>
void run(const CrossEntropyBlock& a, int64_t begin, int64_t end) {
  using V = Vec<T>;
  using Accumulator = typename V::scalar;
  const int64_t vocab = a.vocab;
  const double smoothing = a.label_smoothing;
  for (int64_t i = begin; i < end; ++i) {
    T* logits = as<T>(a.logits) + i * vocab;
    const int32_t row = a.rows[i];
    T* const target = logits + as<int32_t>(a.target)[row];

    const V lowest = V::set(-INFINITY);
    V most = lowest;
    for_lanes<V>(vocab, [&](int64_t d, int n) { most = V::max(most, load_lanes<V>(logits + d, n).first_or(n, lowest)); });
    const Accumulator largest = most.largest();
    const V shift = V::set(largest);
    const double sum = sum_lanes<V>(
        vocab, [&](int64_t d, int n) { return exp(load_lanes<V>(logits + d, n) - shift).first_or(n, V::zero()); });
    const Accumulator wanted = at<V>(target);
    double loss = std::log(sum) + (static_cast<double>(largest) - wanted);
    if (smoothing > 0) {
      const double mean = sum_lanes<V>(vocab, [&](int64_t d, int n) { return load_lanes<V>(logits + d, n); }) / vocab;
      loss += smoothing * (wanted - mean);
    }
    bool hit = wanted == largest;
    for (const T* earlier = logits; hit && earlier < target; ++earlier) hit = at<V>(earlier) < largest;
    as<Accumulator>(a.loss)[row] = static_cast<Accumulator>(loss);
    as<Accumulator>(a.hit)[row] = hit;

    if (!a.dloss) continue;
    const double dloss = as<Accumulator>(a.dloss)[row];
    const V scale = V::set(static_cast<Accumulator>(dloss / sum));
    const V spread = V::set(static_cast<Accumulator>(-dloss * smoothing / vocab));
    const double p = std::exp(static_cast<double>(wanted) - largest) / sum;
    for_lanes<V>(vocab, [&](int64_t d, int n) {
      store_lanes(V::fma(exp(load_lanes<V>(logits + d, n) - shift), scale, spread), logits + d, n);
    });
    V::set(static_cast<Accumulator>(dloss * (p - smoothing / vocab - (1 - smoothing)))).store_first(target, 1);
  }
}

}  // namespace

void cross_entropy_block(const CrossEntropyBlock& args, int64_t begin, int64_t end) {
  if (args.dtype == Dtype::f64) return run<double>(args, begin, end);
  if (args.dtype == Dtype::bf16) return run<bfloat16>(args, begin, end);
  run<float>(args, begin, end);
}

}  // namespace m3ae::M3AE_ISA
