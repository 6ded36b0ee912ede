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

// out[r][d] = act(in[r][d]), or that part of it (gemm.h).
template <class T, class Source>
void activate(Activation activation, int part, const Source* in, int64_t stride, int64_t count, int64_t width, T* out,
              int64_t ld) {
  with_function(activation, [&](auto function) {
    map_rows(in, stride, count, width, out, ld, [&](Vec<T> x) { return part_of<T>(function.value(x), part); });
  });
}

// A product of elements of type T: sizes in units (csrc/cpu/gemm.h).
template <class T>
struct Block {
  using V = Vec<T>;
  using Sum = typename V::scalar;
  using U = Unit<T>;
  static constexpr int64_t depth = Units<U>::depth;
  static constexpr int64_t most = kProductSteps * depth;  // elements along k
  // Bytes of a thread's scratch: the left operand packed, its values, its steps, the sums. The right operand is packed
  // before them.
  static constexpr int64_t packed_bytes = sizeof(U) * (kBlockRows + V::width) * kProductSteps;
  static constexpr int64_t value_bytes = sizeof(T) * most * (kBlockRows > kPanel ? kBlockRows : kPanel);
  static constexpr int64_t step_bytes = kDenseLeft<U> ? sizeof(U) * kBlockRows * kProductSteps : 0;  // to be transposed
  // Sums of type Sum are added up where they are wanted, but for a last panel that ends within a vector.
  static constexpr int64_t sum_bytes = sizeof(Sum) * kBlockRows * kPanel * (std::is_same_v<T, Sum> ? 1 : kGroupPanels);

  explicit Block(const LinearProduct& a)
      : a(a), parts(a.parts > 1 ? a.parts : 1), steps((a.k + depth - 1) / depth),
        blocks(steps > kProductSteps ? (steps + kProductSteps - 1) / kProductSteps : 1) {}

  const LinearProduct& a;
  int parts;  // operands of which the product is made
  int64_t steps, blocks;

  struct Steps {
    int64_t first, count;  // units
    int64_t k, elements;
  };
  Steps block(int64_t b) const {
    // Whole blocks, the last one aside: zeros at the end of k change no bit.
    const int64_t first = kProductSteps * b, left = steps - first, k = first * depth;
    const int64_t count = left < kProductSteps ? left : kProductSteps;
    return {first, count, k, a.k - k < count * depth ? a.k - k : count * depth};
  }
  U* packed(int64_t panel, const Steps& s, int part) const {
    const int64_t before = (panel - a.first_panel) * steps + s.first;
    return reinterpret_cast<U*>(a.packed) + (before * parts + part * s.count) * kPanel;
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
  const int64_t stride = a.right_by_rows ? a.k : a.n;
  const auto pack_from = [&](const T* rows, int64_t stride, int part) {
    if (a.right_by_rows) pack_columns(rows, stride, count, width, b.packed(panel, s, part), kPanel);
    else pack_steps(rows, stride, count, width, b.packed(panel, s, part), kPanel);
  };
  if constexpr (std::is_same_v<T, Right>)
    if (a.right_activation == Activation::none) return pack_from(right, stride, 0);
  T* values = reinterpret_cast<T*>(scratch);
  const int64_t ld = a.right_by_rows ? b.most : kPanel;
  for (int part = 0; part < b.parts; ++part) {
    activate(a.right_activation, part, right, stride, count, width, values, ld);
    pack_from(values, ld, part);
  }
}

// The left operand of a block, or that part of it: where products read it.
template <class T>
struct Left {
  const Unit<T>* units;
  int64_t row, step;
};

template <class T, class R>
Left<T> left_of(const Block<T>& b, const typename Block<T>::Steps& s, int part, int64_t row, int64_t rows,
                char* scratch) {
  using B = Block<T>;
  using U = typename B::U;
  const LinearProduct& a = b.a;
  const bool by_columns = a.left_by_columns;
  const int64_t count = by_columns ? s.elements : rows, width = by_columns ? rows : s.elements;
  int64_t stride = by_columns ? a.m : a.k;
  const R* from = as<R>(a.left) + (by_columns ? s.k * a.m + row : row * a.k + s.k);
  const T* left;
  if (!std::is_same_v<R, T> || a.left_activation != Activation::none) {
    T* values = reinterpret_cast<T*>(scratch + B::packed_bytes);
    const int64_t ld = by_columns ? kBlockRows : B::most;
    activate(a.left_activation, part, from, stride, count, width, values, ld);
    left = values;
    stride = ld;
  } else {
    left = reinterpret_cast<const T*>(from);
  }
  U* packed = reinterpret_cast<U*>(scratch);
  if (by_columns) {
    const int64_t ld = round_up(rows, B::V::width);
    U* steps = kDenseLeft<U> ? reinterpret_cast<U*>(scratch + B::packed_bytes + B::value_bytes) : packed;
    pack_steps(left, stride, s.elements, rows, steps, ld);
    if constexpr (kDenseLeft<U>) {
      transpose_rows(steps, ld, rows, s.count, packed, kProductSteps);
      return {packed, kProductSteps, 1};
    }
    return {packed, 1, ld};
  }
  if ((std::is_same_v<T, U> || B::depth == 2) && a.k % B::depth == 0)  // rows of units as they stand
    return {reinterpret_cast<const U*>(left), stride / B::depth, 1};
  pack_rows(left, stride, rows, s.elements, packed, kProductSteps);
  return {packed, kProductSteps, 1};
}

// The sums of a panel, `stride` apart, become results: `sums` may be where these go.
template <class R, class Bias, class Out, class Function, class Slope>
void finish(const LinearProduct& a, const typename Vec<R>::scalar* sums, int64_t stride, int64_t row, int64_t rows,
            int64_t first, int64_t columns, Function function, Slope slope) {
  using V = Vec<R>;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (row + i) * a.n + first;
    for_lanes<V>(columns, [&](int64_t d, int n) {
      V z = load_lanes<V>(sums + i * stride + d, n);
      if (a.bias) z = z + load_lanes<V>(as<Bias>(a.bias) + first + d, n);
      if constexpr (!std::is_same_v<Slope, Identity>) z = z * slope.slope(load_lanes<V>(as<R>(a.slope_at) + at + d, n));
      if (a.before) store_rounded(z, as<R>(a.before) + at + d, n);
      store_rounded(function.value(z), as<Out>(a.out) + at + d, n);
    });
  }
}

// Out: the type of the results, R or for dweight P.
template <class T, class R, class P, class Out>
void product(const LinearProduct& a, char* scratch, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  using B = Block<T>;
  using U = typename B::U;
  using Sum = typename B::Sum;
  const B b(a);
  const Multiplying<U> multiplying;
  // [panels][rows][kPanel]
  Sum* sums = reinterpret_cast<Sum*>(scratch + B::packed_bytes + B::value_bytes + B::step_bytes);
  for (int64_t block = 0; block < b.blocks; ++block) {
    const auto s = b.block(block);
    for (int part = 0; part < b.parts; ++part) {
      const Left<T> left = left_of<T, R>(b, s, part, row, rows, scratch);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t first = (panel + p) * kPanel, columns = b.columns(panel + p);
        const int64_t lanes = round_up(columns, B::V::width);
        Sum* c = sums + (std::is_same_v<T, Sum> ? 0 : p * rows * kPanel);
        int64_t stride = kPanel;
        const bool in_place = std::is_same_v<Out, Sum> && columns == lanes;
        if (in_place) c = as<Sum>(a.out) + row * a.n + first, stride = a.n;
        for (int other = 0; part + other < b.parts; ++other)  // not the product of the rests
          multiply(Product<U>{left.units, left.row, left.step, b.packed(panel + p, s, other), kPanel, c, stride,
                              s.count, block + part + other > 0},
                   rows, lanes);
        const bool finished = in_place && !a.bias && !a.slope_at && a.activation == Activation::none;
        if (block + 1 < b.blocks || part + 1 < b.parts || finished) continue;
        const auto finish_with = [&](auto function, auto slope) {
          finish<R, P, Out>(a, c, stride, row, rows, first, columns, function, slope);
        };
        if (a.slope_at) with_function(a.slope, [&](auto slope) { finish_with(Identity{}, slope); });
        else with_function(a.activation, [&](auto function) { finish_with(function, Identity{}); });
      }
    }
  }
}

}  // namespace

LinearSizes linear_sizes(const LinearProduct& args) {
  return with_elements(args, [&](auto element, auto, auto) {
    using B = Block<decltype(element)>;
    const B b(args);
    return LinearSizes{static_cast<int64_t>(sizeof(typename B::U)) * b.steps * b.parts * kPanel,
                       B::packed_bytes + B::value_bytes + B::step_bytes + B::sum_bytes, b.blocks,
                       kWholeRows<typename B::U>};
  });
}

void linear_pack(const LinearProduct& args, char* scratch, int64_t panel, int64_t block) {
  with_elements(args, [&](auto element, auto row, auto parameter) {
    using T = decltype(element);
    if (args.left_by_columns) pack<T, decltype(row)>(args, scratch, panel, block);  // dweight: x
    else pack<T, decltype(parameter)>(args, scratch, panel, block);
  });
}

void linear_multiply(const LinearProduct& args, char* scratch, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  with_elements(args, [&](auto element, auto in, auto parameter) {
    using T = decltype(element);
    using R = decltype(in);
    using P = decltype(parameter);
    if (args.left_by_columns) product<T, R, P, P>(args, scratch, row, rows, panel, panels);  // dweight
    else product<T, R, P, R>(args, scratch, row, rows, panel, panels);
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
