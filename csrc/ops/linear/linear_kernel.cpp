// linear: activations of elements [begin, end) forward, of rows [begin, end) backward. Pure: no threads, no allocation.
#include "ops/linear/linear.h"

#include <type_traits>

#include "cpu/vec_math.h"

namespace m3ae::M3AE_ISA {
namespace {

struct Identity {
  template <class V>
  static M3AE_INLINE V value(V z) { return z; }
  template <class V>
  static M3AE_INLINE V slope(V) { return V::set(1); }
};

// z Phi(z)
struct Gelu {
  template <class V>
  static M3AE_INLINE V share(V z, const Normal<V>& normal) {
    return where_negative(z, normal.below, V::set(1) - normal.below);
  }
  template <class V>
  static M3AE_INLINE V value(V z) { return z * share(z, Normal<V>::at(z)); }
  template <class V>
  static M3AE_INLINE V slope(V z) {
    const Normal<V> normal = Normal<V>::at(z);
    return V::fma(z, normal.density, share(z, normal));
  }
};

// z (1 + tanh u) / 2 with u = sqrt(2 / pi) (z + 0.044715 z^3): z times the logistic function of 2 u
struct GeluTanh {
  static constexpr double k = 1.59576912160573071175, cubic = 0.044715 * k;  // 2 sqrt(2 / pi)

  template <class V>
  static M3AE_INLINE V share(V z) {
    const V twice_u = z * V::fma(V::set(cubic) * z, z, V::set(k));
    // e^88.7 is past fp32: bounded before it, where the share is 1e-38
    return V::set(1) / (V::set(1) + exp(V::zero() - V::max(V::set(-87), twice_u)));
  }
  template <class V>
  static M3AE_INLINE V value(V z) { return z * share(z); }
  template <class V>
  static M3AE_INLINE V slope(V z) {
    const V s = share(z), twice_du = V::fma(V::set(3 * cubic) * z, z, V::set(k));
    return V::fma(z * s * (V::set(1) - s), twice_du, s);
  }
};

template <class T, class Function>
void forward(const LinearActivation& a, int64_t begin, int64_t end) {
  using V = Vec<T>;
  const T* z = as<T>(a.z) + begin;
  T* y = as<T>(a.y) + begin;
  for_lanes<V>(end - begin, [&](int64_t d, int n) { store_lanes(Function::value(load_lanes<V>(z + d, n)), y + d, n); });
}

template <class T, class Function>
void backward(const LinearActivationBackward& a, void* sums, int64_t begin, int64_t end) {
  using V = Vec<T>;
  using Accumulator = typename V::scalar;
  constexpr bool active = !std::is_same_v<Function, Identity>;
  Accumulator* sum = as<Accumulator>(sums);
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = as<T>(a.dy) + row * a.width;
    const T* z = active ? as<T>(a.z) + row * a.width : nullptr;
    T* dz = a.dz ? as<T>(a.dz) + row * a.width : nullptr;
    for_lanes<V>(a.width, [&](int64_t d, int n) {
      V gradient = load_lanes<V>(dy + d, n);
      if constexpr (active) gradient = gradient * Function::slope(load_lanes<V>(z + d, n));
      if (dz) store_lanes(gradient, dz + d, n);
      if (sum) store_lanes(load_lanes<V>(sum + d, n) + gradient, sum + d, n);
    });
  }
}

// body(a T, a Function) for the dtype and activation of args.
template <class Args, class Body>
M3AE_INLINE void choose(const Args& args, const Body& body) {
  const auto with = [&](auto element) {
    if (args.activation == Activation::gelu) return body(element, Gelu{});
    if (args.activation == Activation::gelu_tanh) return body(element, GeluTanh{});
    body(element, Identity{});
  };
  if (args.dtype == Dtype::f64) return with(double{});
  if (args.dtype == Dtype::bf16) return with(bfloat16{});
  with(float{});
}

}  // namespace

void linear_activation(const LinearActivation& args, int64_t begin, int64_t end) {
  choose(args, [&](auto element, auto function) { forward<decltype(element), decltype(function)>(args, begin, end); });
}

void linear_activation_backward(const LinearActivationBackward& args, void* sum, int64_t begin, int64_t end) {
  choose(args, [&](auto element, auto function) {
    backward<decltype(element), decltype(function)>(args, sum, begin, end);
  });
}

}  // namespace m3ae::M3AE_ISA
