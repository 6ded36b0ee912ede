// masked_mse: rows [begin, end). Pure: no threads, no allocation.
#include "ops/masked_mse/masked_mse.h"

#include <cstring>

#include "cpu/sum_lanes.h"
#include "ops/gather_patches/patch_rows.h"

namespace m3ae::M3AE_ISA {
namespace {

// A row of targets in scratch, (value - mean) * scale when it is used.
template <class V>
struct Target {
  using Scalar = typename V::scalar;
  Scalar* values;
  int64_t count;
  V mean = V::zero(), minus_scale = V::set(-1);

  M3AE_INLINE V subtract_from(V pred, int64_t d) const { return V::fma(V::load(values + d) - mean, minus_scale, pred); }
  M3AE_INLINE void pad(Scalar value) {
    for (int64_t d = count; d % V::width; ++d) values[d] = value;
  }

  // Mean 0, unbiased variance 1. Sums run over differences, so that flat patches come out flat.
  M3AE_INLINE void normalize() {
    const Scalar first = values[0];
    pad(first);
    Scalar sum[1], squares[1];
    const auto from = [this](V other) { return [values = values, other](int64_t d, int) { return V::load(values + d) - other; }; };
    sum_lanes<V>(count, sum, [&](int64_t d, int n, V* sum) { sum[0] = sum[0] + from(V::set(first))(d, n); });
    const double shift = overflows(sum[0]) ? far_mean<V>(count, from(V::set(first))) : double(sum[0]) / count;
    const Scalar center = static_cast<Scalar>(first + shift);
    mean = V::set(center);
    pad(center);
    sum_lanes<V>(count, squares, [&](int64_t d, int n, V* sum) {
      const V difference = from(mean)(d, n);
      sum[0] = V::fma(difference, difference, sum[0]);
    });
    constexpr double eps = 1e-6;
    const double scale = overflows(squares[0]) ? far_scale<V>(count, count - 1, eps, from(mean))
                                               : 1 / __builtin_sqrt(double(squares[0]) / (count - 1) + eps);
    minus_scale = V::set(static_cast<Scalar>(-scale));
  }
};

template <class V, class Pixel>
M3AE_INLINE Target<V> read_target(const MaskedMse& a, int64_t image, int64_t t, void* scratch) {
  using Scalar = typename V::scalar;
  prefetch_patch<Pixel>(a.source, a.ids_mask, a.cu_mask, image, t);
  Target<V> target{as<Scalar>(scratch), a.source.patch * a.source.patch * a.source.channels};
  read_patch<V, Pixel>(a.source, image, a.ids_mask[t],
                       [&](int64_t d, V value, int n) { store_lanes(value, target.values + d, n); });
  if (a.norm_pix)
    target.normalize();
  else
    target.pad(0);
  return target;
}

template <class Pixel, class Pred>
void forward(const MaskedMse& a, void* scratch, int64_t begin, int64_t end) {
  using V = typename accumulate_in<Pixel, Pred>::type;
  const int64_t width = a.source.patch * a.source.patch * a.source.channels;
  int64_t image = 0;
  for (int64_t t = begin; t < end; ++t) {
    const Pred* pred = as<Pred>(a.pred) + t * width;
    Pred* error = a.error ? as<Pred>(a.error) + t * width : nullptr;
    image = image_of(a.cu_mask, a.images, t, image);
    if (image == a.images) {
      a.row_loss[t] = 0;
      if (error) std::memset(error, 0, static_cast<size_t>(width) * sizeof(Pred));
      continue;
    }
    const Target<V> target = read_target<V, Pixel>(a, image, t, scratch);
    typename V::scalar squares[1];
    sum_lanes<V>(width, squares, [&](int64_t d, int n, V* sum) {
      const V difference = target.subtract_from(load_lanes<V>(pred + d, n), d);
      if (error) store_lanes(difference, error + d, n);
      sum[0] = V::fma(difference, difference, sum[0]);
    });
    a.row_loss[t] = double(squares[0]) / width;
  }
}

template <class T>
void backward(const MaskedMseBackward& a, int64_t begin, int64_t end) {
  using V = Vec<T>;
  for (int64_t t = begin; t < end; ++t) {
    const T* error = as<T>(a.error) + t * a.width;
    T* dpred = as<T>(a.dpred) + t * a.width;
    if (t >= a.named) {
      std::memset(dpred, 0, static_cast<size_t>(a.width) * sizeof(T));
      continue;
    }
    const V factor = V::set(static_cast<typename V::scalar>(a.row_factor[t]));
    for_lanes<V>(a.width, [&](int64_t d, int n) { store_lanes(load_lanes<V>(error + d, n) * factor, dpred + d, n); });
  }
}

}  // namespace

void masked_mse(const MaskedMse& a, void* target, int64_t begin, int64_t end) {
  with_pixel(a.source, [&](auto pixel) {
    using Pixel = decltype(pixel);
    if (a.pred_dtype == Dtype::f64) return forward<Pixel, double>(a, target, begin, end);
    if (a.pred_dtype == Dtype::bf16) return forward<Pixel, bfloat16>(a, target, begin, end);
    forward<Pixel, float>(a, target, begin, end);
  });
}

void masked_mse_backward(const MaskedMseBackward& a, int64_t begin, int64_t end) {
  if (a.dtype == Dtype::f64) return backward<double>(a, begin, end);
  if (a.dtype == Dtype::bf16) return backward<bfloat16>(a, begin, end);
  backward<float>(a, begin, end);
}

}  // namespace m3ae::M3AE_ISA
