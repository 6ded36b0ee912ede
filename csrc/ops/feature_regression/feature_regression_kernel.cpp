// feature_regression: rows [begin, end). Pure: no threads, no allocation. A row comes from memory once; the later passes
// find it in the first cache. While one row is worked on, the next is asked for, into the second level: rows are too
// short for the hardware to foresee them.
#include "ops/feature_regression/feature_regression.h"

#include <cstring>

#include "cpu/sum_lanes.h"
#include "cpu/vec_math.h"

namespace m3ae::M3AE_ISA {
namespace {

// A row of target, normalized as it is read. Lanes from n on are zero.
template <class V, class T>
struct Target {
  using Scalar = typename V::scalar;
  const T* values;
  const T* next;  // the row after this one
  V mean = V::zero(), scale = V::set(1);

  M3AE_INLINE V centered(int64_t d, int n) const { return only_first(load_lanes<V>(values + d, n) - mean, n); }
  M3AE_INLINE V load(int64_t d, int n) const { return centered(d, n) * scale; }

  // Mean 0, variance 1. Sums run over differences from a value of the row, so that flat rows come out flat. One pass sums
  // them and their squares, unless that value is so far out that the variance would lose bits.
  M3AE_INLINE void normalize(int64_t width, double eps) {
    const Scalar first = Lane<Scalar>::load(values).v;
    Scalar sums[2], squares[1];
    mean = V::set(first);
    sum_lanes<V>(width, sums, [&](int64_t d, int n, V* sum) {
      __builtin_prefetch(next + d, 0, 2);
      const V off = centered(d, n);
      sum[0] = sum[0] + off;
      sum[1] = V::fma(off, off, sum[1]);
    });
    const auto from_mean = [this] { return [row = *this](int64_t d, int n) { return row.centered(d, n); }; };
    const double shift = overflows(sums[0]) ? far_mean<V>(width, from_mean()) : double(sums[0]) / width;
    double variance = double(sums[1]) / width - shift * shift;
    mean = V::set(static_cast<Scalar>(first + shift));
    if (overflows(variance)) {
      scale = V::set(static_cast<Scalar>(far_scale<V>(width, width, eps, from_mean())));
      return;
    }
    if (variance < shift * shift / 4) {
      sum_lanes<V>(width, squares, [&](int64_t d, int n, V* sum) {
        const V off = centered(d, n);
        sum[0] = V::fma(off, off, sum[0]);
      });
      variance = double(squares[0]) / width;
    }
    scale = V::set(static_cast<Scalar>(1 / __builtin_sqrt(variance + eps)));
  }
};

// size with the sign of x; 0 where x is 0 or NaN.
template <class V>
M3AE_INLINE V signed_as(V x, V size) {
  return where_negative(x, V::zero() - size, where_negative(V::zero() - x, size, V::zero()));
}

// mean((pred - target)^2), or of |pred - target|.
template <bool l1, class V, class P, class T>
M3AE_INLINE double difference(const P* pred, const Target<V, T>& target, int64_t width, double weight, P* dpred) {
  using Scalar = typename V::scalar;
  const V factor = V::set(static_cast<Scalar>(weight * (l1 ? 1 : 2) / width)), minus_scale = V::zero() - target.scale;
  Scalar sum[1];
  sum_lanes<V>(width, sum, [&](int64_t d, int n, V* sum) {
    __builtin_prefetch(pred + width + d, 0, 2);
    const V off = V::fma(target.centered(d, n), minus_scale, load_lanes<V>(pred + d, n));
    sum[0] = l1 ? sum[0] + magnitude(off) : V::fma(off, off, sum[0]);
    if (dpred) store_lanes(l1 ? signed_as(off, factor) : off * factor, dpred + d, n);
  });
  return double(sum[0]) / width;
}

// 1 - cos(pred, target), norms below 1e-8 taken for that.
template <class V, class P, class T>
M3AE_INLINE double cosine(const P* pred, const Target<V, T>& target, int64_t width, double weight, P* dpred) {
  using Scalar = typename V::scalar;
  Scalar sums[3];  // <p, t>, <p, p>, <t, t>
  sum_lanes<V>(width, sums, [&](int64_t d, int n, V* sum) {
    __builtin_prefetch(pred + width + d, 0, 2);
    const V p = load_lanes<V>(pred + d, n), t = target.load(d, n);
    sum[0] = V::fma(p, t, sum[0]);
    sum[1] = V::fma(p, p, sum[1]);
    sum[2] = V::fma(t, t, sum[2]);
  });
  double by_p = 1, by_t = 1;  // what the rows are multiplied by in these sums, and in all that is made of them
  if (overflows(sums[1]) || overflows(sums[2])) {
    if (overflows(sums[1])) by_p = kFar<Scalar>;
    if (overflows(sums[2])) by_t = kFar<Scalar>;
    const V small_p = V::set(static_cast<Scalar>(by_p)), small_t = V::set(static_cast<Scalar>(by_t));
    sum_lanes<V>(width, sums, [&](int64_t d, int n, V* sum) {
      const V p = load_lanes<V>(pred + d, n) * small_p, t = target.load(d, n) * small_t;
      sum[0] = V::fma(p, t, sum[0]);
      sum[1] = V::fma(p, p, sum[1]);
      sum[2] = V::fma(t, t, sum[2]);
    });
  }
  const auto at_least = [](double norm, double least) { return norm < least ? least : norm; };  // NaN stays
  const double norm = __builtin_sqrt(double(sums[1])), bounded = at_least(norm, 1e-8 * by_p);
  const double target_norm = at_least(__builtin_sqrt(double(sums[2])), 1e-8 * by_t);
  const double cos = sums[0] / bounded / target_norm;
  if (dpred) {  // norms apart: a product of two may be too small for fp32
    const auto number = [](double x) { return V::set(static_cast<Scalar>(x)); };
    const V one = number(norm == 0 ? 0 : by_p / norm), a = number(weight * cos * by_p / bounded);
    const V one_of_target = number(by_t / target_norm), b = number(-weight * by_p / bounded);
    for_lanes<V>(width, [&](int64_t d, int n) {
      store_lanes(V::fma(load_lanes<V>(pred + d, n) * one, a, target.load(d, n) * one_of_target * b), dpred + d, n);
    });
  }
  return 1 - cos;
}

template <class P, class T>
void forward(const FeatureRegression& a, int64_t begin, int64_t end) {
  using V = Vec<P>;
  for (int64_t r = begin; r < end; ++r) {
    const P* pred = as<P>(a.pred) + r * a.width;
    P* dpred = a.dpred ? as<P>(a.dpred) + r * a.width : nullptr;
    const double weight = a.weight[r];
    if (weight == 0) {
      a.row_loss[r] = 0;
      if (dpred) std::memset(dpred, 0, static_cast<size_t>(a.width) * sizeof(P));
      continue;
    }
    const auto row_of_target = [&](int64_t r) { return as<T>(a.target) + (a.rows ? a.rows[r] : r) * a.width; };
    Target<V, T> target{row_of_target(r), row_of_target(r + 1 < end && a.weight[r + 1] != 0 ? r + 1 : r)};
    if (a.normalize) target.normalize(a.width, a.eps);
    a.row_loss[r] = a.distance == Distance::l2   ? difference<false>(pred, target, a.width, weight, dpred)
                    : a.distance == Distance::l1 ? difference<true>(pred, target, a.width, weight, dpred)
                                                 : cosine(pred, target, a.width, weight, dpred);
  }
}

}  // namespace

void feature_regression(const FeatureRegression& a, int64_t begin, int64_t end) {
  const bool pred_bf16 = a.pred_dtype == Dtype::bf16, target_bf16 = a.target_dtype == Dtype::bf16;
  if (a.pred_dtype == Dtype::f64) return forward<double, double>(a, begin, end);
  if (pred_bf16 && target_bf16) return forward<bfloat16, bfloat16>(a, begin, end);
  if (pred_bf16) return forward<bfloat16, float>(a, begin, end);
  if (target_bf16) return forward<float, bfloat16>(a, begin, end);
  forward<float, float>(a, begin, end);
}

}  // namespace m3ae::M3AE_ISA
