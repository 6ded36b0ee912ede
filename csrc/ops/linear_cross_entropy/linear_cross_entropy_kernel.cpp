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

// Sizes and pointers of a block whose x is of type R and is multiplied as T. A row of logits becomes that of their
// gradients, which products read without packing: R of which these are made are then `parts` rows of T, one after the
// other in every chunk.
template <class T, class R>
struct Block {
  using V = Vec<T>;
  using Accumulator = typename V::scalar;
  using U = Unit<T>;
  static constexpr int64_t depth = Units<U>::depth;
  static constexpr int64_t chunk = kSteps * depth;  // classes
  using Logit = std::conditional_t<depth == 2, R, Accumulator>;
  using Gradient = std::conditional_t<depth == 2, T, Accumulator>;

  static int64_t steps(int64_t elements) { return (elements + depth - 1) / depth; }

  explicit Block(const CrossEntropyBlock& a)
      : x(as<R>(a.x)), logits(reinterpret_cast<Logit*>(a.logits)),
        x_rows(reinterpret_cast<U*>(a.x_rows)), x_steps(reinterpret_cast<U*>(a.x_steps)), count(a.count),
        parts(a.parts > 1 ? a.parts : 1), stride(round_up(a.vocab, kClassPanel)),
        gradient_stride(stride * int64_t{sizeof(Logit)} / int64_t{sizeof(Gradient)}),
        row_ld(round_up(steps(a.width), V::width)), step_ld(round_up(a.width, V::width)) {}

  U* rows(int64_t row, int part) const { return x_rows + (part * count + row) * row_ld; }
  U* rows_as_steps(int64_t step, int part) const { return x_steps + (part * steps(count) + step) * step_ld; }
  Gradient* gradients(int64_t row, int64_t v, int part) const {
    const int64_t first = v / chunk * chunk, classes = stride - first < chunk ? stride - first : chunk;
    return reinterpret_cast<Gradient*>(logits + row * stride + first) + part * classes + (v - first);
  }

  const R* x;
  Logit* logits;  // [count, stride]; zeros behind the vocabulary
  U *x_rows, *x_steps;  // [parts, count, row_ld], [parts, steps(count), step_ld]
  int64_t count;
  int parts;  // operands of which a product is made
  int64_t stride, gradient_stride, row_ld, step_ld;
};

// The rows themselves, or that part of them (gemm.h) in `rounded`, `ld` apart; and how far they are apart.
template <class T, class Source>
const T* rows_of(const Source* rows, int64_t* stride, int64_t count, int64_t width, int part, T* rounded, int64_t ld) {
  if constexpr (std::is_same_v<T, Source>) {
    return rows;
  } else {
    map_rows(rows, *stride, count, width, rounded, ld, [&](Vec<T> x) { return part_of<T>(x, part); });
    *stride = ld;
    return rounded;
  }
}

// body(part of the left operand, part of the right one, whether it is the first): the product of the rests is left out.
template <class Body>
M3AE_INLINE void each_product(int parts, const Body& body) {
  for (int left = 0; left < parts; ++left)
    for (int right = 0; left + right < parts; ++right) body(left, right, left + right == 0);
}

template <class T, class R>
CrossEntropySizes sizes(const CrossEntropyBlock& a, int64_t rows) {
  using B = Block<T, R>;
  const B b(a);
  constexpr int64_t unit = sizeof(typename B::U), sum = sizeof(typename B::Accumulator), element = sizeof(T);
  const int64_t logits = b.parts * unit * B::steps(a.width) * kClassPanel + sum * rows * kClassPanel +
                         element * kClassPanel * a.width;
  const int64_t dx = b.parts * unit * kSteps * kDxColumns + sum * kDxRows * kDxColumns + element * B::chunk * kDxColumns;
  const int64_t dweight = b.parts * unit * B::steps(rows) * kClassPanel + sum * kClassPanel * b.step_ld;
  const int64_t most = logits > dx ? logits : dx;
  return {int64_t{sizeof(typename B::Logit)} * b.stride, b.parts * unit * b.row_ld, b.parts * unit * b.step_ld,
          most > dweight ? most : dweight};
}

// Rows; with units of two, the even one packs its neighbor along. Rows of pairs are rows of T as they stand.
template <class T, class R>
void pack(const CrossEntropyBlock& a, int64_t begin, int64_t end) {
  const Block<T, R> b(a);
  for (int64_t s = (begin + b.depth - 1) / b.depth; s * b.depth < end; ++s) {
    const int64_t i = s * b.depth, here = a.count - i < b.depth ? a.count - i : b.depth;
    const R* row = b.x + a.rows[i].row * a.width;
    const int64_t next = here > 1 ? (a.rows[i + 1].row - a.rows[i].row) * a.width : 0;
    if constexpr (std::is_same_v<T, R>) {
      pack_rows(row, next, here, a.width, b.rows(i, 0), b.row_ld);
      pack_steps(row, next, here, a.width, b.rows_as_steps(s, 0), b.step_ld);
    } else {
      for (int part = 0; part < b.parts; ++part) {
        T* packed = reinterpret_cast<T*>(b.rows(i, part));
        const int64_t ld = b.row_ld * b.depth;
        std::memset(static_cast<void*>(packed), 0, sizeof(T) * static_cast<size_t>(here * ld));
        map_rows(row, next, here, a.width, packed, ld, [&](Vec<T> x) { return part_of<T>(x, part); });
        pack_steps(packed, ld, here, a.width, b.rows_as_steps(s, part), b.step_ld);
      }
    }
  }
}

template <class T, class R, class P>
void logits(const CrossEntropyBlock& a, char* scratch, int64_t begin, int64_t end) {
  using B = Block<T, R>;
  using V = typename B::V;
  using U = typename B::U;
  using Accumulator = typename B::Accumulator;
  const B b(a);
  const Multiplying<U> multiplying;
  const int64_t steps = B::steps(a.width);
  U* classes = reinterpret_cast<U*>(scratch);  // [parts, steps, kClassPanel]
  Accumulator* sums = reinterpret_cast<Accumulator*>(classes + b.parts * steps * kClassPanel);  // [count, kClassPanel]
  T* rounded = reinterpret_cast<T*>(sums + a.count * kClassPanel);                              // [kClassPanel, width]
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t v = panel * kClassPanel, here = a.vocab - v < kClassPanel ? a.vocab - v : kClassPanel;
    for (int part = 0; part < b.parts; ++part) {
      int64_t stride = a.width;
      const T* weight = rows_of(as<P>(a.weight) + v * a.width, &stride, here, a.width, part, rounded, a.width);
      pack_columns(weight, stride, here, a.width, classes + part * steps * kClassPanel, kClassPanel);
    }
    int64_t s = 0;
    do {  // once also where width is 0: the sums are then zero
      const int64_t some = steps - s < kSteps ? steps - s : kSteps;
      each_product(b.parts, [&](int left, int right, bool first) {
        multiply(Product<U>{b.rows(0, left) + s, b.row_ld, 1, classes + (right * steps + s) * kClassPanel, kClassPanel,
                            sums, kClassPanel, some, s > 0 || !first},
                 a.count, round_up(here, V::width));
      });
      s += kSteps;
    } while (s < steps);
    for (int64_t i = 0; i < a.count; ++i) {
      typename B::Logit* out = b.logits + i * b.stride + v;
      for_lanes<V>(here, [&](int64_t d, int n) {
        V z = load_lanes<V>(sums + i * kClassPanel + d, n);
        if (a.bias) z = z + load_lanes<V>(as<P>(a.bias) + v + d, n);
        store_rounded(z, out + d, n);
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

// Of a row's logits that are minus infinity the first that only passed the lowest number on its way, or -1: the whole sum
// is above that, and its probability is not 0 but unknown.
template <class T, class R, class P>
__attribute__((noinline)) int64_t lost_logit(const CrossEntropyBlock& a, int64_t i) {
  using V = Vec<T>;
  using Accumulator = typename V::scalar;
  const Block<T, R> b(a);
  const auto* logits = b.logits + i * b.stride;
  const R* x = b.x + a.rows[i].row * a.width;
  const P* bias = as<P>(a.bias);
  const auto rounded = [](double value, auto* to) {  // as they round it, of which the logits were made
    V::set(static_cast<Accumulator>(value)).store_first(to, 1);
    return value_at(to);
  };
  const auto lost = [&](int64_t v) {
    const P* weight = as<P>(a.weight) + v * a.width;
    R element;
    typename Block<T, R>::Logit whole;
    const double sum = whole_sum(bias ? value_at(bias + v) : 0, a.width, [&](int64_t d) { return value_at(x + d); },
                                 [&](int64_t d) { return rounded(value_at(weight + d), &element); });
    return rounded(sum, &whole) > -INFINITY;
  };
  int64_t first = -1;
  for_lanes<V>(a.vocab, [&](int64_t v, int n) {
    const V from = bias ? load_lanes<V>(bias + v, n) : V::zero();
    const V fall = V::max(from - load_lanes<V>(logits + v, n), V::zero());  // 0 where the bias is minus infinity, too
    if (first >= 0 || fall.largest() < INFINITY) return;
    for (int64_t j = v; first < 0 && j < v + n; ++j)
      if (at<V>(logits + j) == -INFINITY && lost(j)) first = j;
  });
  return first;
}

// e^x for x up to 0, which dlogits are made of: as exact as their unit.
template <class U, class V>
M3AE_INLINE V exp_of_unit(V x) {
  if constexpr (Units<U>::depth == 2) return Units<U>::exp2(x * V::set(0x1.715476p+0f));  // log2 e
  else return exp(x);
}

// The cross entropy of a row, w the weights of classes, y its target, s the smoothing, V the vocabulary:
//   (1 - s) w_y (lse - z_y) + s / V sum_v w_v (lse - z_v) = whole (lse - z_y) + s (mean(w) z_y - sum_v w_v z_v / V),
// with whole = (1 - s) w_y + s mean(w), and its gradient: whole p_v - s / V w_v, less (1 - s) w_y where v = y.
template <class T, class R, class P, bool Weighted>
void softmax(const CrossEntropyBlock& a, int64_t begin, int64_t end) {
  using V = Vec<T>;
  using U = typename Block<T, R>::U;
  using Accumulator = typename V::scalar;
  using Logit = typename Block<T, R>::Logit;
  const Block<T, R> b(a);
  const int64_t vocab = a.vocab;
  const double smoothing = a.label_smoothing;
  const auto weighted = [&](V x, int64_t v, int n) {
    if constexpr (Weighted) return x * load_lanes<V>(as<Accumulator>(a.class_weight) + v, n);
    else return x;
  };
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
    const Accumulator largest = most.largest();
    const V shift = V::set(largest);
    double sum = sum_lanes<V>(
        vocab, [&](int64_t d, int n) { return exp(load_lanes<V>(logits + d, n) - shift).first_or(n, V::zero()); });
    int64_t first_nan = -1;
    if (sum != sum) {
      for (int64_t v = 0; first_nan < 0 && v < vocab; ++v)
        if (at<V>(logits + v) != at<V>(logits + v)) first_nan = v;
    } else if (zeros.sum() != 0) {
      first_nan = lost_logit<T, R, P>(a, i);
      if (first_nan >= 0) sum = NAN;
    }
    const Accumulator wanted = at<V>(target);
    const double whole = row.weight + smoothing * (a.mean_weight - row.weight);
    double loss = whole * (std::log(sum) + (static_cast<double>(largest) - wanted));
    if (smoothing > 0) {
      const double below = sum_lanes<V>(vocab, [&](int64_t d, int n) {
        return weighted(load_lanes<V>(logits + d, n) - shift, d, n).first_or(n, V::zero());
      });
      loss += smoothing * (a.mean_weight * (static_cast<double>(wanted) - largest) - below / vocab);
    }
    row.loss = static_cast<Accumulator>(loss);
    row.lse = std::log(sum) + largest;
    bool hit = first_nan < 0 ? wanted == largest : first_nan == row.target;
    for (const Logit* earlier = logits; hit && first_nan < 0 && earlier < target; ++earlier) hit = at<V>(earlier) < largest;
    row.hit = hit;

    if (!a.dx && !a.dweight && !a.dbias) continue;
    const double dloss = row.dloss, dlse = row.dlse + 2 * row.dsquares * row.lse;
    const V scale = V::set(static_cast<Accumulator>((dloss * whole + dlse) / sum));
    const V spread = V::set(static_cast<Accumulator>(-dloss * smoothing / vocab));
    const double p = std::exp(static_cast<double>(wanted) - largest) / sum;
    const double less_target = whole * p - row.weight * (smoothing / vocab) - row.weight * (1 - smoothing);
    const Accumulator of_target = static_cast<Accumulator>(dloss * less_target + dlse * p);
    if constexpr (!std::is_same_v<T, R>) {
      alignas(64) Accumulator values[b.chunk];
      for (int64_t v = 0; v < b.stride; v += b.chunk) {
        const int64_t here = b.stride - v < b.chunk ? b.stride - v : b.chunk;
        const int64_t classes = vocab - v < here ? vocab - v : here;
        std::memset(values + classes, 0, sizeof(Accumulator) * static_cast<size_t>(here - classes));
        for_lanes<V>(classes, [&](int64_t d, int n) {
          const V weight = exp(load_lanes<V>(logits + v + d, n) - shift);
          store_lanes(V::fma(weight, scale, weighted(spread, v + d, n)), values + d, n);
        });
        if (row.target >= v && row.target < v + here) values[row.target - v] = of_target;
        for (int part = 0; part < b.parts; ++part)
          map_rows(values, 0, 1, here, b.gradients(i, v, part), 0, [&](V x) { return part_of<T>(x, part); });
      }
      continue;
    }
    for_lanes<V>(vocab, [&](int64_t d, int n) {
      const V weight = exp_of_unit<U>(load_lanes<V>(logits + d, n) - shift);
      store_rounded(V::fma(weight, scale, weighted(spread, d, n)), logits + d, n);
    });
    V::set(of_target).store_first(target, 1);
  }
}

// Tasks are bands of rows x bands of columns.
template <class T, class R, class P>
void dx(const CrossEntropyBlock& a, char* scratch, int64_t begin, int64_t end) {
  using B = Block<T, R>;
  using V = typename B::V;
  using U = typename B::U;
  using Accumulator = typename B::Accumulator;
  const B b(a);
  const Multiplying<U> multiplying;
  U* classes = reinterpret_cast<U*>(scratch);  // [parts, kSteps, kDxColumns]
  Accumulator* sums = reinterpret_cast<Accumulator*>(classes + b.parts * kSteps * kDxColumns);  // [kDxRows, kDxColumns]
  T* rounded = reinterpret_cast<T*>(sums + kDxRows * kDxColumns);                               // [chunk, kDxColumns]
  const int64_t bands = (a.count + kDxRows - 1) / kDxRows, column_bands = (a.width + kDxColumns - 1) / kDxColumns;
  const bool packed = !std::is_same_v<T, U> || a.width % V::width != 0;  // whole vectors of the weight itself will do
  for (int64_t task = begin; task < end; ++task) {
    const int64_t band = task / column_bands, first = share_begin<U>(a.count, band, bands);
    const int64_t rows = share_begin<U>(a.count, band + 1, bands) - first;
    const int64_t d0 = task % column_bands * kDxColumns;
    const int64_t columns = a.width - d0 < kDxColumns ? a.width - d0 : kDxColumns;
    for (int64_t v = 0; v < a.vocab; v += B::chunk) {
      const int64_t some = a.vocab - v < B::chunk ? a.vocab - v : B::chunk;
      const T* weight = nullptr;
      for (int part = 0; part < b.parts; ++part) {
        int64_t stride = a.width;
        weight = rows_of(as<P>(a.weight) + v * a.width + d0, &stride, some, columns, part, rounded, kDxColumns);
        if (packed) pack_steps(weight, stride, some, columns, classes + part * kSteps * kDxColumns, kDxColumns);
      }
      each_product(b.parts, [&](int left, int right, bool begins) {
        const U* gradients = reinterpret_cast<const U*>(b.gradients(first, v, left));
        const U* units = packed ? classes + right * kSteps * kDxColumns : reinterpret_cast<const U*>(weight);
        multiply(Product<U>{gradients, b.gradient_stride / B::depth, 1, units, packed ? kDxColumns : a.width, sums,
                            kDxColumns, B::steps(some), v > 0 || !begins},
                 rows, round_up(columns, V::width));
      });
    }
    for (int64_t i = 0; i < rows; ++i) {
      R* out = as<R>(a.dx) + a.rows[first + i].row * a.width + d0;
      for_lanes<V>(columns, [&](int64_t d, int n) {
        store_lanes(load_lanes<V>(sums + i * kDxColumns + d, n), out + d, n);
      });
    }
  }
}

template <class T, class R, class P>
void dweight(const CrossEntropyBlock& a, char* scratch, int64_t begin, int64_t end) {
  using B = Block<T, R>;
  using V = typename B::V;
  using U = typename B::U;
  using Accumulator = typename B::Accumulator;
  const B b(a);
  const Multiplying<U> multiplying;
  const int64_t steps = B::steps(a.count);
  U* left = reinterpret_cast<U*>(scratch);  // [parts, steps, kClassPanel]
  Accumulator* sums = reinterpret_cast<Accumulator*>(left + b.parts * steps * kClassPanel);  // [kClassPanel, step_ld]
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t v = panel * kClassPanel, here = a.vocab - v < kClassPanel ? a.vocab - v : kClassPanel;
    if (a.dbias) {
      Accumulator* sum = as<Accumulator>(a.dbias) + v;
      for_lanes<V>(here, [&](int64_t d, int n) {
        V total = a.first ? V::zero() : load_lanes<V>(sum + d, n);
        for (int part = 0; part < b.parts; ++part) {
          const auto* gradients = b.gradients(0, v, part) + d;
          for (int64_t i = 0; i < a.count; ++i) total = total + load_lanes<V>(gradients + i * b.gradient_stride, n);
        }
        store_lanes(total, sum + d, n);
      });
    }
    if (!a.dweight) continue;
    const auto packed = [&](int part) { return left + part * steps * kClassPanel; };
    for (int part = 0; part < b.parts; ++part)
      pack_steps(b.gradients(0, v, part), b.gradient_stride, a.count, here, packed(part), kClassPanel);
    each_product(b.parts, [&](int of_left, int of_right, bool begins) {
      multiply(Product<U>{packed(of_left), 1, kClassPanel, b.rows_as_steps(0, of_right), b.step_ld, sums, b.step_ld,
                          steps, !begins},
               here, b.step_ld);
    });
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

CrossEntropySizes cross_entropy_sizes(const CrossEntropyBlock& args, int64_t rows) {
  return with_elements(args, [&](auto t, auto r, auto) { return sizes<decltype(t), decltype(r)>(args, rows); });
}
void cross_entropy_pack(const CrossEntropyBlock& args, int64_t begin, int64_t end) {
  with_elements(args, [&](auto t, auto r, auto) { pack<decltype(t), decltype(r)>(args, begin, end); });
}
void cross_entropy_logits(const CrossEntropyBlock& args, char* scratch, int64_t begin, int64_t end) {
  with_elements(args, [&](auto t, auto r, auto p) {
    logits<decltype(t), decltype(r), decltype(p)>(args, scratch, begin, end);
  });
}
void cross_entropy_softmax(const CrossEntropyBlock& args, int64_t begin, int64_t end) {
  with_elements(args, [&](auto t, auto r, auto p) {
    if (args.class_weight) softmax<decltype(t), decltype(r), decltype(p), true>(args, begin, end);
    else softmax<decltype(t), decltype(r), decltype(p), false>(args, begin, end);
  });
}
void cross_entropy_dx(const CrossEntropyBlock& args, char* scratch, int64_t begin, int64_t end) {
  with_elements(args, [&](auto t, auto r, auto p) {
    dx<decltype(t), decltype(r), decltype(p)>(args, scratch, begin, end);
  });
}
void cross_entropy_dweight(const CrossEntropyBlock& args, char* scratch, int64_t begin, int64_t end) {
  with_elements(args, [&](auto t, auto r, auto p) {
    dweight<decltype(t), decltype(r), decltype(p)>(args, scratch, begin, end);
  });
}

}  // namespace m3ae::M3AE_ISA
