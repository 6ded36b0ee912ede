// What becomes of the losses of rows: the four reductions, and where their result is written.
#pragma once

#include <string>

#include "tensor.h"

namespace m3ae {

enum class Reduction : int { none, sum, mean, sample_mean };

inline Reduction reduction_of(const std::string& name) {
  if (name == "none") return Reduction::none;
  if (name == "sum") return Reduction::sum;
  if (name == "mean") return Reduction::mean;
  M3AE_CHECK(name == "sample_mean", "reduction must be none, sum, mean or sample_mean, got ", name);
  return Reduction::sample_mean;
}

// One number, or with Reduction::none one a row; in an accumulation dtype. A tensor that is None is not written.
class Reduced {
 public:
  Reduced(const char* name, const Tensor& out, Reduction reduction, int64_t rows, Dtype accumulate)
      : data_(reduction == Reduction::none ? out.optional(name, {rows}, accumulate)
                                           : out.optional(name, {}, accumulate)),
        wide_(accumulate == Dtype::f64) {}
  void write(int64_t at, double value) const {
    if (wide_)
      as<double>(data_)[at] = value;
    else
      as<float>(data_)[at] = static_cast<float>(value);
  }

 private:
  void* data_;
  bool wide_;
};

// The sum of term(i) over [0, count), in short chains: one long one would round more often.
template <class Term>
double sum_in_chains(int64_t count, const Term& term) {
  double sums[16] = {};
  for (int64_t i = 0; i < count; ++i) sums[i % 16] += term(i);
  for (int half = 8; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  return sums[0];
}

}  // namespace m3ae
