// Sums over a row, a vector at a time.
#pragma once

#include "cpu/vec.h"

namespace m3ae::M3AE_ISA {

// Lanes from n on become zero, so that they add nothing to a sum.
template <class V>
M3AE_INLINE V only_first(V x, int n) { return n == V::width ? x : x.first_or(n, V::zero()); }

// sums[i] = the sum over [0, width) of what terms(d, n, sum) adds to sum[i], n <= V::width values from d on. In
// independent chains: one would wait for the adder's latency at every step. Vectors of one lane take more of them, to
// stay as exact as wide ones.
template <class V, int count, class Terms>
M3AE_INLINE void sum_lanes(int64_t width, typename V::scalar (&sums)[count], Terms&& terms) {
  constexpr int chains = V::width >= 4 ? 4 : 16;
  V chain[chains][count];
  for (auto& sum : chain)
    for (V& each : sum) each = V::zero();
  int64_t d = 0;
  for (; d + chains * V::width <= width; d += chains * V::width)
    for (int k = 0; k < chains; ++k) terms(d + k * V::width, V::width, chain[k]);
  for_lanes<V>(width - d, [&](int64_t e, int n) { terms(d + e, n, chain[0]); });
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < chains; k += 4)
      chain[k][i] = (chain[k][i] + chain[k + 1][i]) + (chain[k + 2][i] + chain[k + 3][i]);
    for (int k = 4; k < chains; k += 4) chain[0][i] = chain[0][i] + chain[k][i];
    sums[i] = chain[0][i].sum();
  }
}

// Sums of finite values that pass the largest number on their way: once more, of values so much smaller. Out of line,
// and of values captured by copy: the loops beside a call keep their registers.
template <class Scalar>
constexpr double kFar = sizeof(Scalar) == 8 ? 0x1p-600 : 0x1p-80;

template <class Scalar>
M3AE_INLINE bool overflows(Scalar sum) { return __builtin_expect(!(sum - sum == 0), false); }

// The mean of value(d, n): a vector whose lanes from n on are zero.
template <class V, class Value>
__attribute__((noinline, cold)) double far_mean(int64_t width, Value value) {
  typename V::scalar sum[1];
  const V far = V::set(static_cast<typename V::scalar>(kFar<typename V::scalar>));
  sum_lanes<V>(width, sum, [&](int64_t d, int n, V* sum) { sum[0] = V::fma(value(d, n), far, sum[0]); });
  return double(sum[0]) / width / kFar<typename V::scalar>;
}
// 1 / sqrt(the sum of squares / parts + eps); NaN where a value itself has passed the largest number.
template <class V, class Value>
__attribute__((noinline, cold)) double far_scale(int64_t width, int64_t parts, double eps, Value value) {
  typename V::scalar sum[1];
  const V far = V::set(static_cast<typename V::scalar>(kFar<typename V::scalar>));
  sum_lanes<V>(width, sum, [&](int64_t d, int n, V* sum) {
    const V small = value(d, n) * far;
    sum[0] = V::fma(small, small, sum[0]);
  });
  const double deviation = __builtin_sqrt(double(sum[0]) / parts) / kFar<typename V::scalar>;
  return 1 / __builtin_hypot(deviation, __builtin_sqrt(eps)) + (deviation - deviation);
}

}  // namespace m3ae::M3AE_ISA
