// linear_cross_entropy: the stages of a block of rows, tasks [begin, end). Pure: no threads, no allocation.
#include "ops/linear_cross_entropy/linear_cross_entropy.h"

#include <cmath>
#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/vec_math.h"
#include "cpu/whole_sum.h"

namespace m3ae::M3AE_ISA {
namespace {

constexpr int64_t kSteps = 256;  // units that a product adds up before the sum joins its total
constexpr int64_t kSpan = 1024;  // logits summed in vector lanes before they join a fp64 sum

// Sizes and pointers of a block whose x is of type T.
template <class T>
struct Block {
  using V = Vec<T>;
  using Accumulator = typename V::scalar;
  using U = Unit<T>;
  static constexpr int64_t depth = Units<U>::depth;
  using Logit = std::conditional_t<depth == 2, bfloat16, Accumulator>;  // what products read without packing

  static int64_t logits_stride(int64_t vocab) { return round_up(vocab, kClassPanel); }  // zeros behind the vocabulary
  static int64_t row_units(int64_t width) { return round_up((width + depth - 1) / depth, V::width); }
  static int64_t step_units(int64_t width) { return round_up(width, V::width); }
  static int64_t steps(int64_t elements) { return (elements + depth - 1) / depth; }

  explicit Block(const CrossEntropyBlock& a)
      : x(as<T>(a.x)), logits(reinterpret_cast<Logit*>(a.logits)),
        x_rows(reinterpret_cast<U*>(a.x_rows)), x_steps(reinterpret_cast<U*>(a.x_steps)),
        stride(logits_stride(a.vocab)), row_ld(row_units(a.width)), step_ld(step_units(a.width)) {}

  const T* x;
  Logit* logits;          // [count, stride]
  U *x_rows, *x_steps;    // [count, row_ld], [steps(count), step_ld]
  int64_t stride, row_ld, step_ld;
};

// The rows themselves, or as rows of T in `rounded` (`ld` apart).
template <class T, class P>
const T* rows_of(const P* rows, int64_t stride, int64_t count, int64_t width, T* rounded, int64_t ld) {
  if constexpr (std::is_same_v<T, P>) {
    return rows;
  } else {
    map_rows(rows, stride, count, width, rounded, ld, [](Vec<T> x) { return x; });
    return rounded;
  }
}

template <class T>
CrossEntropySizes sizes(int64_t rows, int64_t width, int64_t vocab) {
  using B = Block<T>;
  constexpr int64_t unit = sizeof(typename B::U), sum = sizeof(typename B::Accumulator);
  const int64_t logits = unit * B::steps(width) * kClassPanel + sum * rows * kClassPanel + sizeof(T) * kClassPanel * width;
  const int64_t dx = unit * kSteps * kDxColumns + sum * kDxRows * kDxColumns + sizeof(T) * kSteps * B::depth * kDxColumns;
  const int64_t dweight = unit * B::steps(rows) * kClassPanel + sum * kClassPanel * B::step_units(width);
  const int64_t most = logits > dx ? logits : dx;
  return {static_cast<int64_t>(sizeof(typename B::Logit)) * B::logits_stride(vocab), unit * B::row_units(width),
          unit * B::step_units(width), most > dweight ? most : dweight};
}

// Rows; with units of two, the even one packs its neighbour along.
template <class T>
void pack(const CrossEntropyBlock& a, int64_t begin, int64_t end) {
  const Block<T> b(a);
  for (int64_t s = (begin + b.depth - 1) / b.depth; s * b.depth < end; ++s) {
    const int64_t i = s * b.depth, here = a.count - i < b.depth ? a.count - i : b.depth;
    const T* row = b.x + a.rows[i].row * a.width;
    const int64_t next = here > 1 ? (a.rows[i + 1].row - a.rows[i].row) * a.width : 0;
    pack_rows(row, next, here, a.width, b.x_rows + i * b.row_ld, b.row_ld);
    pack_steps(row, next, here, a.width, b.x_steps + s * b.step_ld, b.step_ld);
  }
}

template <class T, class P>
void logits(const CrossEntropyBlock& a, char* scratch, int64_t begin, int64_t end) {
  using B = Block<T>;
  using V = typename B::V;
  using U = typename B::U;
  using Accumulator = typename B::Accumulator;
  const B b(a);
  const int64_t steps = B::steps(a.width);
  U* classes = reinterpret_cast<U*>(scratch);  // [steps, kClassPanel]
  Accumulator* sums = reinterpret_cast<Accumulator*>(classes + steps * kClassPanel);  // [count, kClassPanel]
  T* rounded = reinterpret_cast<T*>(sums + a.count * kClassPanel);                    // [kClassPanel, width]
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t v = panel * kClassPanel, here = a.vocab - v < kClassPanel ? a.vocab - v : kClassPanel;
    const T* weight = rows_of<T, P>(as<P>(a.weight) + v * a.width, a.width, here, a.width, rounded, a.width);
    pack_columns(weight, a.width, here, a.width, classes, kClassPanel);
    int64_t s = 0;
    do {  // once also where width is 0: the sums are then zero
      const int64_t some = steps - s < kSteps ? steps - s : kSteps;
      multiply(Product<U>{b.x_rows + s, b.row_ld, 1, classes + s * kClassPanel, kClassPanel, sums, kClassPanel, some, s > 0},
               a.count, round_up(here, V::width));
      s += kSteps;
    } while (s < steps);
    for (int64_t i = 0; i < a.count; ++i) {
      typename B::Logit* out = b.logits + i * b.stride + v;
      for_lanes<V>(here, [&](int64_t d, int n) {
        V z = load_lanes<V>(sums + i * kClassPanel + d, n);
        if (a.bias) z = z + load_lanes<V>(as<P>(a.bias) + v + d, n);
        store_lanes(z, out + d, n);
      });
      std::memset(static_cast<void*>(out + here), 0, sizeof(*out) * static_cast<size_t>(kClassPanel - here));
    }
  }
}

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

// A row in which a logit is no finite number. One that passed the lowest number on its way is minus infinity: where the
// whole sum is above that, its probability is not 0 but unknown, and the logit becomes NaN. Returns the first class whose
// logit is NaN, or -1.
template <class T, class P>
__attribute__((noinline, cold)) int64_t forget_lost_logits(const CrossEntropyBlock& a, int64_t i) {
  using V = Vec<T>;
  using Accumulator = typename V::scalar;
  const Block<T> b(a);
  const T* x = b.x + a.rows[i].row * a.width;
  const auto rounded = [](double value, auto* to) {  // as they round it, of which the logits were made
    V::set(static_cast<Accumulator>(value)).store_first(to, 1);
    return value_at(to);
  };
  int64_t first = -1;
  for (int64_t v = 0; v < a.vocab; ++v) {
    auto* logit = b.logits + i * b.stride + v;
    if (at<V>(logit) == -INFINITY) {
      const P* weight = as<P>(a.weight) + v * a.width;
      T element;
      typename Block<T>::Logit whole;
      const double sum = whole_sum(a.bias ? value_at(as<P>(a.bias) + v) : 0, a.width,
                                   [&](int64_t d) { return value_at(x + d); },
                                   [&](int64_t d) { return rounded(value_at(weight + d), &element); });
      if (rounded(sum, &whole) > -INFINITY) V::set(NAN).store_first(logit, 1);
    }
    if (first < 0 && at<V>(logit) != at<V>(logit)) first = v;
  }
  return first;
}

template <class T, class P>
void softmax(const CrossEntropyBlock& a, int64_t begin, int64_t end) {
  using V = Vec<T>;
  using Accumulator = typename V::scalar;
  using Logit = typename Block<T>::Logit;
  const Block<T> b(a);
  const int64_t vocab = a.vocab;
  const double smoothing = a.label_smoothing;
  for (int64_t i = begin; i < end; ++i) {
    Logit* logits = b.logits + i * b.stride;
    CrossEntropyRow& row = a.rows[i];
    Logit* const target = logits + row.target;

    const V lowest = V::set(-INFINITY);
    V most = lowest, zeros = V::zero();  // zeros: NaN where a logit is not finite
    for_lanes<V>(vocab, [&](int64_t d, int n) {
      const V z = load_lanes<V>(logits + d, n);
      most = V::max(most, z.first_or(n, lowest));
      zeros = V::fma(z, V::zero(), zeros);
    });
    const int64_t first_nan = zeros.sum() == 0 ? -1 : forget_lost_logits<T, P>(a, i);
    const Accumulator largest = most.largest();
    const V shift = V::set(largest);
    const double sum = sum_lanes<V>(
        vocab, [&](int64_t d, int n) { return exp(load_lanes<V>(logits + d, n) - shift).first_or(n, V::zero()); });
    const Accumulator wanted = at<V>(target);
    double loss = std::log(sum) + (static_cast<double>(largest) - wanted);
    if (smoothing > 0) {
      const double below = sum_lanes<V>(
          vocab, [&](int64_t d, int n) { return (load_lanes<V>(logits + d, n) - shift).first_or(n, V::zero()); });
      loss += smoothing * (static_cast<double>(wanted) - largest - below / vocab);
    }
    row.loss = static_cast<Accumulator>(loss);
    bool hit = first_nan < 0 ? wanted == largest : first_nan == row.target;
    for (const Logit* earlier = logits; hit && first_nan < 0 && earlier < target; ++earlier) hit = at<V>(earlier) < largest;
    row.hit = hit;

    if (!a.dx && !a.dweight && !a.dbias) continue;
    const double dloss = row.dloss;
    const V scale = V::set(static_cast<Accumulator>(dloss / sum));
    const V spread = V::set(static_cast<Accumulator>(-dloss * smoothing / vocab));
    const double p = std::exp(static_cast<double>(wanted) - largest) / sum;
    for_lanes<V>(vocab, [&](int64_t d, int n) {
      store_lanes(V::fma(exp(load_lanes<V>(logits + d, n) - shift), scale, spread), logits + d, n);
    });
    V::set(static_cast<Accumulator>(dloss * (p - smoothing / vocab - (1 - smoothing)))).store_first(target, 1);
  }
}

// Tasks are bands of rows x bands of columns.
template <class T, class P>
void dx(const CrossEntropyBlock& a, char* scratch, int64_t begin, int64_t end) {
  using B = Block<T>;
  using V = typename B::V;
  using U = typename B::U;
  using Accumulator = typename B::Accumulator;
  const B b(a);
  U* classes = reinterpret_cast<U*>(scratch);  // [kSteps, kDxColumns]
  Accumulator* sums = reinterpret_cast<Accumulator*>(classes + kSteps * kDxColumns);  // [kDxRows, kDxColumns]
  T* rounded = reinterpret_cast<T*>(sums + kDxRows * kDxColumns);                     // [kSteps * depth, kDxColumns]
  const int64_t bands = (a.count + kDxRows - 1) / kDxRows, column_bands = (a.width + kDxColumns - 1) / kDxColumns;
  const bool packed = !std::is_same_v<T, U> || a.width % V::width != 0;  // whole vectors of the weight itself will do
  for (int64_t task = begin; task < end; ++task) {
    const int64_t band = task / column_bands, first = a.count * band / bands, rows = a.count * (band + 1) / bands - first;
    const int64_t d0 = task % column_bands * kDxColumns;
    const int64_t columns = a.width - d0 < kDxColumns ? a.width - d0 : kDxColumns;
    for (int64_t v = 0; v < a.vocab; v += kSteps * B::depth) {
      const int64_t some = a.vocab - v < kSteps * B::depth ? a.vocab - v : kSteps * B::depth;
      const P* rows_here = as<P>(a.weight) + v * a.width + d0;
      const T* weight = rows_of<T, P>(rows_here, a.width, some, columns, rounded, kDxColumns);
      const int64_t stride = std::is_same_v<T, P> ? a.width : kDxColumns;
      if (packed) pack_steps(weight, stride, some, columns, classes, kDxColumns);
      const U* right = packed ? classes : reinterpret_cast<const U*>(weight);
      const U* left = reinterpret_cast<const U*>(b.logits + first * b.stride + v);
      multiply(Product<U>{left, b.stride / B::depth, 1, right, packed ? kDxColumns : a.width, sums, kDxColumns,
                          B::steps(some), v > 0},
               rows, round_up(columns, V::width));
    }
    for (int64_t i = 0; i < rows; ++i) {
      T* out = as<T>(a.dx) + a.rows[first + i].row * a.width + d0;
      for_lanes<V>(columns, [&](int64_t d, int n) {
        store_lanes(load_lanes<V>(sums + i * kDxColumns + d, n), out + d, n);
      });
    }
  }
}

template <class T, class P>
void dweight(const CrossEntropyBlock& a, char* scratch, int64_t begin, int64_t end) {
  using B = Block<T>;
  using V = typename B::V;
  using U = typename B::U;
  using Accumulator = typename B::Accumulator;
  const B b(a);
  const int64_t steps = B::steps(a.count);
  U* left = reinterpret_cast<U*>(scratch);  // [steps, kClassPanel]
  Accumulator* sums = reinterpret_cast<Accumulator*>(left + steps * kClassPanel);  // [kClassPanel, step_ld]
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t v = panel * kClassPanel, here = a.vocab - v < kClassPanel ? a.vocab - v : kClassPanel;
    const typename B::Logit* dlogits = b.logits + v;
    if (a.dbias) {
      Accumulator* sum = as<Accumulator>(a.dbias) + v;
      for_lanes<V>(here, [&](int64_t d, int n) {
        V total = a.first ? V::zero() : load_lanes<V>(sum + d, n);
        for (int64_t i = 0; i < a.count; ++i) total = total + load_lanes<V>(dlogits + i * b.stride + d, n);
        store_lanes(total, sum + d, n);
      });
    }
    if (!a.dweight) continue;
    pack_steps(dlogits, b.stride, a.count, here, left, kClassPanel);
    multiply(Product<U>{left, 1, kClassPanel, b.x_steps, b.step_ld, sums, b.step_ld, steps, false}, here, b.step_ld);
    for (int64_t c = 0; c < here; ++c) {
      P* out = as<P>(a.dweight) + (v + c) * a.width;
      for_lanes<V>(a.width, [&](int64_t d, int n) {
        const V sum = load_lanes<V>(sums + c * b.step_ld + d, n);
        store_lanes(a.first ? sum : sum + load_lanes<V>(out + d, n), out + d, n);
      });
    }
  }
}

}  // namespace

#define M3AE_BY_DTYPE(function, ...)                                            \
  if (args.dtype == Dtype::f64) return function<double>(__VA_ARGS__);           \
  if (args.dtype == Dtype::bf16) return function<bfloat16>(__VA_ARGS__);        \
  return function<float>(__VA_ARGS__);
#define M3AE_BY_DTYPES(function, ...)                                                         \
  if (args.dtype == Dtype::f64) return function<double, double>(__VA_ARGS__);                 \
  if (args.dtype == Dtype::f32) return function<float, float>(__VA_ARGS__);                   \
  if (args.parameter_dtype == Dtype::f32) return function<bfloat16, float>(__VA_ARGS__);      \
  return function<bfloat16, bfloat16>(__VA_ARGS__);

CrossEntropySizes cross_entropy_sizes(int64_t rows, int64_t width, int64_t vocab, Dtype dtype) {
  const struct { Dtype dtype; } args{dtype};
  M3AE_BY_DTYPE(sizes, rows, width, vocab)
}
void cross_entropy_pack(const CrossEntropyBlock& args, int64_t begin, int64_t end) {
  M3AE_BY_DTYPE(pack, args, begin, end)
}
void cross_entropy_logits(const CrossEntropyBlock& args, char* scratch, int64_t begin, int64_t end) {
  M3AE_BY_DTYPES(logits, args, scratch, begin, end)
}
void cross_entropy_softmax(const CrossEntropyBlock& args, int64_t begin, int64_t end) {
  M3AE_BY_DTYPES(softmax, args, begin, end)
}
void cross_entropy_dx(const CrossEntropyBlock& args, char* scratch, int64_t begin, int64_t end) {
  M3AE_BY_DTYPES(dx, args, scratch, begin, end)
}
void cross_entropy_dweight(const CrossEntropyBlock& args, char* scratch, int64_t begin, int64_t end) {
  M3AE_BY_DTYPES(dweight, args, scratch, begin, end)
}

}  // namespace m3ae::M3AE_ISA
