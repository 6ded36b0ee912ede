// masked_mse: rows [begin, end). Pure: no threads, no allocation.
#include "ops/masked_mse/masked_mse.h"

#include <cstring>

#include "ops/gather_patches/patch_rows.h"

namespace m3ae::M3AE_ISA {
namespace {

// sum = add(sum, offset, n) over [0, count), n <= V::width values at a time: enough partial sums to hide latencies and,
// on one-lane vectors, to stay as exact as wide ones. Lanes past n must add nothing.
template <class V, class Add>
M3AE_INLINE double sum_up(int64_t count, Add&& add) {
  constexpr int parts = V::width >= 4 ? 4 : 16;
  V part[parts];
  for (V& each : part) each = V::zero();
  int64_t i = 0;
  for (; i + parts * V::width <= count; i += parts * V::width)
    for (int k = 0; k < parts; ++k) part[k] = add(part[k], i + k * V::width, V::width);
  for_lanes<V>(count - i, [&](int64_t d, int n) { part[0] = add(part[0], i + d, n); });
  for (int half = parts / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) part[k] = part[k] + part[k + half];
  return static_cast<double>(part[0].sum());
}

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
  M3AE_INLINE void normalise() {
    const Scalar first = values[0];
    pad(first);
    const double sum = sum_up<V>(count, [&](V sum, int64_t d, int) { return sum + (V::load(values + d) - V::set(first)); });
    const Scalar centre = static_cast<Scalar>(first + sum / count);
    mean = V::set(centre);
    pad(centre);
    const double squares = sum_up<V>(count, [&](V sum, int64_t d, int) {
      const V difference = V::load(values + d) - mean;
      return V::fma(difference, difference, sum);
    });
    minus_scale = V::set(static_cast<Scalar>(-1 / __builtin_sqrt(squares / (count - 1) + 1e-6)));
  }
};

template <class V, class Pixel>
M3AE_INLINE Target<V> read_target(const MaskedMse& a, int64_t image, int64_t t, void* scratch) {
  using Scalar = typename V::scalar;
  prefetch_patch<Pixel>(a.source, a.ids, a.cu, image, t);
  Target<V> target{as<Scalar>(scratch), a.source.patch * a.source.patch * a.source.channels};
  read_patch<V, Pixel>(a.source, image, a.ids[t],
                       [&](int64_t d, V value, int n) { store_lanes(value, target.values + d, n); });
  if (a.norm_pix)
    target.normalise();
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
    image = image_of(a.cu, a.images, t, image);
    if (image == a.images) {
      a.row_loss[t] = 0;
      if (error) std::memset(error, 0, static_cast<size_t>(width) * sizeof(Pred));
      continue;
    }
    const Target<V> target = read_target<V, Pixel>(a, image, t, scratch);
    const double squares = sum_up<V>(width, [&](V sum, int64_t d, int n) {
      const V difference = target.subtract_from(load_lanes<V>(pred + d, n), d);
      if (error) store_lanes(difference, error + d, n);
      return V::fma(difference, difference, sum);
    });
    a.row_loss[t] = squares / width;
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
