// masked_mse: rows [begin, end). Pure: no threads, no allocation.
#include "ops/masked_mse/masked_mse.h"

#include <cstring>

#include "ops/gather_patches/patch_rows.h"

namespace m3ae::M3AE_ISA {
namespace {

// The sum of term(offset) over [0, count) in steps of a vector: enough partial sums to hide latencies and, on one-lane
// vectors, to stay as exact as wide ones. Terms past count must be zero.
template <class V, class Term>
M3AE_INLINE double sum_terms(int64_t count, Term&& term) {
  constexpr int parts = V::width >= 4 ? 4 : 16;
  V part[parts];
  for (V& each : part) each = V::zero();
  int64_t i = 0;
  for (; i + parts * V::width <= count; i += parts * V::width)
    for (int k = 0; k < parts; ++k) part[k] = part[k] + term(i + k * V::width);
  for (; i < count; i += V::width) part[0] = part[0] + term(i);
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
  V mean = V::zero(), scale = V::set(1);

  M3AE_INLINE V at(int64_t d) const { return (V::load(values + d) - mean) * scale; }
  M3AE_INLINE void pad(Scalar value) {
    for (int64_t d = count; d % V::width; ++d) values[d] = value;
  }

  // Mean 0, unbiased variance 1. Sums run over differences, so that flat patches come out flat.
  M3AE_INLINE void normalise() {
    const Scalar first = values[0];
    pad(first);
    const double sum = sum_terms<V>(count, [&](int64_t d) { return V::load(values + d) - V::set(first); });
    const Scalar centre = static_cast<Scalar>(first + sum / count);
    mean = V::set(centre);
    pad(centre);
    const double squares = sum_terms<V>(count, [&](int64_t d) {
      const V difference = V::load(values + d) - mean;
      return difference * difference;
    });
    scale = V::set(static_cast<Scalar>(1 / __builtin_sqrt(squares / (count - 1) + 1e-6)));
  }
};

template <class V, class Pixel>
M3AE_INLINE Target<V> read_target(const MaskedMse& a, int64_t image, int64_t t, void* scratch) {
  using Scalar = typename V::scalar;
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
void forward(const MaskedMse& a, void* scratch, double* row_loss, int64_t begin, int64_t end) {
  using V = typename accumulate_in<Pixel, Pred>::type;
  int64_t image = 0;
  for (int64_t t = begin; t < end; ++t) {
    image = image_of(a.cu, a.images, t, image);
    const Target<V> target = read_target<V, Pixel>(a, image, t, scratch);
    const Pred* pred = as<Pred>(a.pred) + t * target.count;
    const double squares = sum_terms<V>(target.count, [&](int64_t d) {
      const int64_t left = target.count - d;
      const V error = load_lanes<V>(pred + d, left < V::width ? static_cast<int>(left) : V::width) - target.at(d);
      return error * error;
    });
    row_loss[t] = squares / target.count;
  }
}

template <class Pixel, class Pred>
void backward(const MaskedMseBackward& args, void* scratch, int64_t begin, int64_t end) {
  using V = typename accumulate_in<Pixel, Pred>::type;
  const MaskedMse& a = args.forward;
  const int64_t width = a.source.patch * a.source.patch * a.source.channels;
  int64_t image = 0;
  for (int64_t t = begin; t < end; ++t) {
    image = image_of(a.cu, a.images, t, image);
    const Pred* pred = as<Pred>(a.pred) + t * width;
    Pred* dpred = as<Pred>(args.dpred) + t * width;
    if (image == a.images) {
      std::memset(dpred, 0, static_cast<size_t>(width) * sizeof(Pred));
      continue;
    }
    const Target<V> target = read_target<V, Pixel>(a, image, t, scratch);
    const int64_t at = t * args.dloss_stride;
    const double dloss = a.pred_dtype == Dtype::f64 ? as<double>(args.dloss)[at] : as<float>(args.dloss)[at];
    const V factor = V::set(static_cast<typename V::scalar>(dloss * args.weight[image] * 2 / width));
    for_lanes<V>(width, [&](int64_t d, int n) {
      store_lanes((load_lanes<V>(pred + d, n) - target.at(d)) * factor, dpred + d, n);
    });
  }
}

}  // namespace

void masked_mse(const MaskedMse& a, void* target, double* row_loss, int64_t begin, int64_t end) {
  with_pixel(a.source, [&](auto pixel) {
    using Pixel = decltype(pixel);
    if (a.pred_dtype == Dtype::f64) return forward<Pixel, double>(a, target, row_loss, begin, end);
    if (a.pred_dtype == Dtype::bf16) return forward<Pixel, bfloat16>(a, target, row_loss, begin, end);
    forward<Pixel, float>(a, target, row_loss, begin, end);
  });
}

void masked_mse_backward(const MaskedMseBackward& a, void* target, int64_t begin, int64_t end) {
  with_pixel(a.forward.source, [&](auto pixel) {
    using Pixel = decltype(pixel);
    if (a.forward.pred_dtype == Dtype::f64) return backward<Pixel, double>(a, target, begin, end);
    if (a.forward.pred_dtype == Dtype::bf16) return backward<Pixel, bfloat16>(a, target, begin, end);
    backward<Pixel, float>(a, target, begin, end);
  });
}

}  // namespace m3ae::M3AE_ISA
