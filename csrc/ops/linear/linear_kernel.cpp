// linear: blocks of a product, and the activation's backward pass over rows. Pure: no threads, no allocation.
#include "ops/linear/linear.h"

#include <type_traits>

#include "cpu/gemm.h"
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
    // e^88.7 is past fp32: bounded before it, where the share is 1e-38, which would be much of a large z
    const V logistic = V::set(1) / (V::set(1) + exp(V::zero() - V::max(V::set(-87), twice_u)));
    return where_negative(twice_u + V::set(87), V::zero(), logistic);
  }
  template <class V>
  static M3AE_INLINE V value(V z) { return z * share(z); }
  template <class V>
  static M3AE_INLINE V slope(V z) {
    // Beyond 32 the share is 0 or 1, and z^2 might be infinite. NaN stays, and an infinite z makes one.
    const V low = V::max(V::set(-32), z), x = V::zero() - V::max(V::set(-32), V::zero() - low);
    const V s = share(x), twice_du = V::fma(V::set(3 * cubic) * x, x, V::set(k));
    return V::fma(x * s * (V::set(1) - s), twice_du, V::fma(z, V::zero(), s));
  }
};

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

// body(a Function) for the activation.
template <class Body>
M3AE_INLINE void with_function(Activation activation, const Body& body) {
  if (activation == Activation::gelu) return body(Gelu{});
  if (activation == Activation::gelu_tanh) return body(GeluTanh{});
  body(Identity{});
}

// body(a T) for the dtype.
template <class Body>
M3AE_INLINE auto with_element(Dtype dtype, const Body& body) {
  if (dtype == Dtype::f64) return body(double{});
  if (dtype == Dtype::bf16) return body(bfloat16{});
  return body(float{});
}

// body(a T, a P): the types of rows and of parameters.
template <class Body>
M3AE_INLINE void with_elements(const LinearProduct& args, const Body& body) {
  if (args.dtype == Dtype::bf16 && args.parameter_dtype == Dtype::f32) return body(bfloat16{}, float{});
  with_element(args.dtype, [&](auto element) { body(element, element); });
}

// out[r][d] = act(in[r][d]).
template <class T, class Source>
void activate(Activation activation, const Source* in, int64_t stride, int64_t count, int64_t width, T* out, int64_t ld) {
  with_function(activation, [&](auto function) {
    map_rows(in, stride, count, width, out, ld, [&](Vec<T> x) { return function.value(x); });
  });
}

// A product of rows of type T: sizes in units (csrc/cpu/gemm.h).
template <class T>
struct Block {
  using V = Vec<T>;
  using Sum = typename V::scalar;
  using U = Unit<T>;
  static constexpr int64_t depth = Units<U>::depth;
  static constexpr int64_t most = kProductSteps * depth;  // elements along k
  // Bytes of a thread's scratch: the left operand packed, its values, the sums. The right operand is packed before them.
  static constexpr int64_t packed_bytes = sizeof(U) * (kBlockRows + V::width) * kProductSteps;
  static constexpr int64_t value_bytes = sizeof(T) * most * (kBlockRows > kPanel ? kBlockRows : kPanel);
  static_assert(!kDenseLeft<U> || value_bytes >= int64_t{sizeof(U)} * kBlockRows * kProductSteps, "rows to transpose");
  static constexpr int64_t sum_bytes = sizeof(Sum) * kBlockRows * kPanel * kGroupPanels;

  explicit Block(const LinearProduct& a)
      : a(a), steps((a.k + depth - 1) / depth), blocks(steps > kProductSteps ? (steps + kProductSteps - 1) / kProductSteps : 1) {}

  const LinearProduct& a;
  int64_t steps, blocks;

  struct Steps {
    int64_t first, count;  // units
    int64_t k, elements;
  };
  Steps block(int64_t b) const {
    const int64_t first = steps * b / blocks, count = steps * (b + 1) / blocks - first, k = first * depth;
    return {first, count, k, a.k - k < count * depth ? a.k - k : count * depth};
  }
  U* packed(int64_t panel, const Steps& s) const {
    return reinterpret_cast<U*>(a.packed) + ((panel - a.first_panel) * steps + s.first) * kPanel;
  }
  int64_t columns(int64_t panel) const { return a.n - panel * kPanel < kPanel ? a.n - panel * kPanel : kPanel; }
};

template <class T, class Right>
void pack(const LinearProduct& a, char* scratch, int64_t panel, int64_t block) {
  const Block<T> b(a);
  const auto s = b.block(block);
  const int64_t first = panel * kPanel, here = b.columns(panel);
  const int64_t count = a.right_by_rows ? here : s.elements, width = a.right_by_rows ? s.elements : here;
  const Right* right = as<Right>(a.right) + (a.right_by_rows ? first * a.k + s.k : s.k * a.n + first);
  int64_t stride = a.right_by_rows ? a.k : a.n;
  const auto pack_from = [&](const T* rows) {
    if (a.right_by_rows) pack_columns(rows, stride, count, width, b.packed(panel, s), kPanel);
    else pack_steps(rows, stride, count, width, b.packed(panel, s), kPanel);
  };
  if constexpr (std::is_same_v<T, Right>)
    if (a.right_activation == Activation::none) return pack_from(right);
  T* values = reinterpret_cast<T*>(scratch);
  const int64_t ld = a.right_by_rows ? b.most : kPanel;
  activate(a.right_activation, right, stride, count, width, values, ld);
  stride = ld;
  pack_from(values);
}

// The left operand of a block: where products read it.
template <class T>
struct Left {
  const Unit<T>* units;
  int64_t row, step;
};

template <class T>
Left<T> left_of(const Block<T>& b, const typename Block<T>::Steps& s, int64_t row, int64_t rows, char* scratch) {
  using B = Block<T>;
  using U = typename B::U;
  const LinearProduct& a = b.a;
  U* packed = reinterpret_cast<U*>(scratch);
  if (a.left_by_columns) {
    const int64_t ld = round_up(rows, B::V::width);
    U* steps = kDenseLeft<U> ? reinterpret_cast<U*>(scratch + B::packed_bytes) : packed;
    pack_steps(as<T>(a.left) + s.k * a.m + row, a.m, s.elements, rows, steps, ld);
    if constexpr (kDenseLeft<U>) {
      transpose_rows(steps, ld, rows, s.count, packed, kProductSteps);
      return {packed, kProductSteps, 1};
    }
    return {packed, 1, ld};
  }
  const T* left = as<T>(a.left) + row * a.k + s.k;
  int64_t stride = a.k;
  if (a.left_activation != Activation::none) {
    T* values = reinterpret_cast<T*>(scratch + B::packed_bytes);
    activate(a.left_activation, left, stride, rows, s.elements, values, B::most);
    left = values;
    stride = B::most;
  }
  if ((std::is_same_v<T, U> || B::depth == 2) && a.k % B::depth == 0)  // rows of units as they stand
    return {reinterpret_cast<const U*>(left), stride / B::depth, 1};
  pack_rows(left, stride, rows, s.elements, packed, kProductSteps);
  return {packed, kProductSteps, 1};
}

template <class T, class Bias, class Out, class Function, class Slope>
void finish(const LinearProduct& a, const typename Vec<T>::scalar* sums, int64_t row, int64_t rows, int64_t first,
            int64_t columns, Function function, Slope slope) {
  using V = Vec<T>;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (row + i) * a.n + first;
    for_lanes<V>(columns, [&](int64_t d, int n) {
      V z = load_lanes<V>(sums + i * kPanel + d, n);
      if (a.bias) z = z + load_lanes<V>(as<Bias>(a.bias) + first + d, n);
      if constexpr (!std::is_same_v<Slope, Identity>) z = z * slope.slope(load_lanes<V>(as<T>(a.slope_at) + at + d, n));
      if (a.before) store_rounded(z, as<T>(a.before) + at + d, n);
      store_rounded(function.value(z), as<Out>(a.out) + at + d, n);
    });
  }
}

template <class T, class P>
void product(const LinearProduct& a, char* scratch, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  using B = Block<T>;
  using U = typename B::U;
  const B b(a);
  auto* sums = reinterpret_cast<typename B::Sum*>(scratch + B::packed_bytes + B::value_bytes);  // [panels][rows][kPanel]
  for (int64_t block = 0; block < b.blocks; ++block) {
    const auto s = b.block(block);
    const Left<T> left = left_of(b, s, row, rows, scratch);
    for (int64_t p = 0; p < panels; ++p)
      multiply(Product<U>{left.units, left.row, left.step, b.packed(panel + p, s), kPanel, sums + p * rows * kPanel,
                          kPanel, s.count, block > 0},
               rows, round_up(b.columns(panel + p), B::V::width));
  }
  for (int64_t p = 0; p < panels; ++p) {
    const auto finish_with = [&](auto out, auto function, auto slope) {
      finish<T, P, decltype(out)>(a, sums + p * rows * kPanel, row, rows, (panel + p) * kPanel, b.columns(panel + p),
                                  function, slope);
    };
    if (a.left_by_columns) finish_with(P{}, Identity{}, Identity{});  // dweight
    else if (a.slope_at) with_function(a.slope, [&](auto slope) { finish_with(T{}, Identity{}, slope); });
    else with_function(a.activation, [&](auto function) { finish_with(T{}, function, Identity{}); });
  }
}

}  // namespace

LinearSizes linear_sizes(const LinearProduct& args) {
  return with_element(args.dtype, [&](auto element) {
    using B = Block<decltype(element)>;
    const B b(args);
    return LinearSizes{static_cast<int64_t>(sizeof(typename B::U)) * b.steps * kPanel,
                       B::packed_bytes + B::value_bytes + B::sum_bytes, b.blocks};
  });
}

void linear_pack(const LinearProduct& args, char* scratch, int64_t panel, int64_t block) {
  with_elements(args, [&](auto element, auto parameter) {
    using T = decltype(element);
    if (args.left_by_columns) pack<T, T>(args, scratch, panel, block);  // dweight: x
    else pack<T, decltype(parameter)>(args, scratch, panel, block);
  });
}

void linear_multiply(const LinearProduct& args, char* scratch, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  with_elements(args, [&](auto element, auto parameter) {
    product<decltype(element), decltype(parameter)>(args, scratch, row, rows, panel, panels);
  });
}

void linear_activation_backward(const LinearActivationBackward& args, void* sum, int64_t begin, int64_t end) {
  with_element(args.dtype, [&](auto element) {
    with_function(args.activation, [&](auto function) {
      backward<decltype(element), decltype(function)>(args, sum, begin, end);
    });
  });
}

}  // namespace m3ae::M3AE_ISA
