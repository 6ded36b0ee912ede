// layer_norm on a GPU. Rows of up to 1280 columns: a warp each, held in registers, N columns a lane at a time: eight of
// 16-bit types, four of any mix (cuda/raw.cuh). Other rows: a block each, read again from the caches.
#include "cuda/bind.h"
#include "cuda/partials.cuh"
#include "cuda/raw.cuh"
#include "cuda/reduce.cuh"
#include "ops/layer_norm/arguments.h"

namespace m3ae::cuda {
namespace {

constexpr int kRowThreads = 128, kWideThreads = 256;  // of a block with a row a warp, with one row
constexpr int kTogether = 4;                          // rows of a block of the wide backward pass at a time

template <int N>
__device__ __forceinline__ int column(int k) {
  return (k * kWarp + static_cast<int>(threadIdx.x) % kWarp) * N;
}

template <int N, int K>
__device__ __forceinline__ float lane_sum(const float (&x)[K][N]) {
  float sum[N] = {}, total = 0;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += x[k][i];
#pragma unroll
  for (int i = 0; i < N; ++i) total += sum[i];
  return total;
}

M3AE_HOST_DEVICE Dtype sum_dtype(const LayerNorm& a) {
  return !a.residual || a.x_dtype == a.residual_dtype ? a.x_dtype : Dtype::f32;
}

// s = x + residual where there is one, rounded, stored and widened again; else x.
template <int N, int K>
__device__ __forceinline__ void load_sum(float (&s)[K][N], const LayerNorm& a, int64_t row, int first) {
  const int width = static_cast<int>(a.width);
  Raw<N> x[K], residual[K];
  load_raw(x, a.x, row, a.x_dtype, first, width);
  if (!a.residual) return widen(s, x, a.x_dtype);
  load_raw(residual, a.residual, row, a.residual_dtype, first, width);
  float added[K][N];
  widen(s, x, a.x_dtype);
  widen(added, residual, a.residual_dtype);
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i) s[k][i] += added[k][i];
  const Dtype dtype = sum_dtype(a);
  narrow(x, s, dtype);
  store_raw(a.s, row, x, dtype, first, width);
  widen(s, x, dtype);
}

// y = normal * weight + bias, in place.
template <int N>
__device__ __forceinline__ void scale(float (&normal)[N], const LayerNorm& a, int d) {
  if (a.weight) {
    const auto weight = load<N>(as<float>(a.weight) + d);
#pragma unroll
    for (int i = 0; i < N; ++i) normal[i] *= weight.at[i];
  }
  if (a.bias) {
    const auto bias = load<N>(as<float>(a.bias) + d);
#pragma unroll
    for (int i = 0; i < N; ++i) normal[i] += bias.at[i];
  }
}

// 1 / sqrt(var + eps). sum(far): the sum of the row's squares over all its lanes, of values far times as large; where it
// overflows, of so much smaller ones.
template <class Sum>
__device__ __forceinline__ float inverse_root(const LayerNorm& a, const Sum& sum) {
  float squares = sum(1), far = 1;
  if (isinf(squares)) squares = sum(far = 0x1p-80f);
  return far / sqrtf(squares / static_cast<float>(a.width) + static_cast<float>(a.eps) * far * far);
}

// kValues of a row in each lane.
template <int N, int kValues>
__global__ void __launch_bounds__(kRowThreads, kValues <= 16 ? 8 : 3) layer_norm_kernel(LayerNorm a) {
  constexpr int K = kValues / N;
  const int64_t t = int64_t{blockIdx.x} * (kRowThreads / kWarp) + threadIdx.x / kWarp, row = t * a.width;
  const int width = static_cast<int>(a.width);
  if (t >= a.count) return;
  float s[K][N];
  load_sum(s, a, row, column<N>(0));
  const float mean = warp_sum(lane_sum(s)) / static_cast<float>(width);
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i) s[k][i] = column<N>(k) < width ? s[k][i] - mean : 0.f;
  const float rstd = inverse_root(a, [&](float far) {
    float squares[K][N];
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) squares[k][i] = s[k][i] * far * (s[k][i] * far);
    return warp_sum(lane_sum(squares));
  });
  if (threadIdx.x % kWarp == 0) {
    as<float>(a.stats)[t] = mean;
    as<float>(a.stats)[a.count + t] = rstd;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int i = 0; i < N; ++i) s[k][i] *= rstd;
    if (column<N>(k) < width) scale(s[k], a, column<N>(k));
  }
  Raw<N> y[K];
  narrow(y, s, a.y_dtype);
  store_raw(a.y, row, y, a.y_dtype, column<N>(0), width);
}

template <int N>
__global__ void __launch_bounds__(kWideThreads) layer_norm_wide_kernel(LayerNorm a) {
  __shared__ float scratch[kWideThreads / kWarp];
  const int64_t t = blockIdx.x, row = t * a.width;
  const int width = static_cast<int>(a.width), first = static_cast<int>(threadIdx.x) * N;
  const Dtype dtype = sum_dtype(a);
  Raw<N> raw[1];
  float s[1][N], sum = 0;
  for (int d = first; d < width; d += kWideThreads * N) {
    load_sum(s, a, row, d);
    sum += lane_sum(s);
  }
  const float mean = block_sum(sum, scratch) / static_cast<float>(width);
  const auto load_offset = [&](int d) {  // each thread reads the columns that it stored
    load_raw(raw, a.residual ? a.s : a.x, row, dtype, d, width);
    widen(s, raw, dtype);
    for (int i = 0; i < N; ++i) s[0][i] -= mean;
  };
  const float rstd = inverse_root(a, [&](float far) {
    float squares = 0;
    for (int d = first; d < width; d += kWideThreads * N) {
      load_offset(d);
      for (int i = 0; i < N; ++i) squares += s[0][i] * far * (s[0][i] * far);
    }
    return block_sum(squares, scratch);
  });
  if (threadIdx.x == 0) {
    as<float>(a.stats)[t] = mean;
    as<float>(a.stats)[a.count + t] = rstd;
  }
  for (int d = first; d < width; d += kWideThreads * N) {
    load_offset(d);
    for (int i = 0; i < N; ++i) s[0][i] *= rstd;
    scale(s[0], a, d);
    narrow(raw, s, a.y_dtype);
    store_raw(a.y, row, raw, a.y_dtype, d, width);
  }
}

// A chunk of rows is a block's.
struct Chunks {
  Partials partials;  // [number][2][width]: dweight and dbias
  int64_t number, rows;
};

// By a block that has left its own.
template <int N>
__device__ __forceinline__ void sum_partials(const Chunks& chunks, int width) {
  sum_partials<N>(chunks.partials, Tile{1, 2 * width, 0, 2 * width}, blockIdx.x, gridDim.x, chunks.partials.counters);
}

// Where a warp's sums have column d: fours of a lane's columns side by side with those of its neighbors, since shared
// memory that lanes read 32 bytes apart is read in twice the time.
template <int N>
__device__ __forceinline__ int sum_place(int d) {
  return (d / (kWarp * N) * N / 4 + d % N / 4) * kWarp * 4 + d / N % kWarp * 4 + d % 4;
}

// With h = (s - mean) * rstd and g = dy * weight: dx = rstd * (g - mean(g) - h * mean(g * h)) + ds.
template <int N, int kValues, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp, 2) layer_norm_backward_kernel(LayerNormBackward a, Chunks chunks) {
  constexpr int K = kValues / N, kSpan = kValues * kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, width = static_cast<int>(a.width);
  const int64_t begin = blockIdx.x * chunks.rows, end = begin + chunks.rows < a.count ? begin + chunks.rows : a.count;
  const float* stats = as<float>(a.stats);
  float* sums = dynamic_shared<float>() + 2 * warp * kSpan;  // [warps][2][kSpan]: each lane its own columns
  if (chunks.partials.each) {
#pragma unroll
    for (int i = 0; i < 2 * kValues; i += 4) store(sums + sum_place<N>(column<N>(0)) + i * kWarp, Pack<float, 4>{});
  }
  for (int64_t t = begin + warp; t < end; t += kWarps) {
    const int64_t row = t * a.width;
    Raw<N> dy[K], s[K], ds[K];
    load_raw(dy, a.dy, row, a.y_dtype, column<N>(0), width);
    load_raw(s, a.s, row, a.s_dtype, column<N>(0), width);
    if (a.ds) load_raw(ds, a.ds, row, a.s_dtype, column<N>(0), width);
    const float mean = stats[t], rstd = stats[a.count + t];
    float g[K][N], h[K][N], sum_g[1][N] = {}, sum_gh[1][N] = {};
    widen(g, dy, a.y_dtype);  // zero beyond the row
    widen(h, s, a.s_dtype);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column<N>(k) >= width) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) h[k][i] = (h[k][i] - mean) * rstd;
      if (chunks.partials.each) {
#pragma unroll
        for (int first = 0; first < N; first += 4) {
          float* sum = sums + sum_place<N>(column<N>(k) + first);
          auto dweight = load<4>(sum), dbias = load<4>(sum + kSpan);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            dweight.at[i] += g[k][first + i] * h[k][first + i];
            dbias.at[i] += g[k][first + i];
          }
          store(sum, dweight);
          store(sum + kSpan, dbias);
        }
      }
      if (a.weight) {
        const auto weight = load<N>(as<float>(a.weight) + column<N>(k));
#pragma unroll
        for (int i = 0; i < N; ++i) g[k][i] *= weight.at[i];
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum_g[0][i] += g[k][i];
        sum_gh[0][i] += g[k][i] * h[k][i];
      }
    }
    if (!a.dx) continue;
    const float mean_g = warp_sum(lane_sum(sum_g)) / static_cast<float>(width);
    const float mean_gh = warp_sum(lane_sum(sum_gh)) / static_cast<float>(width);
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) g[k][i] = (g[k][i] - (mean_g + h[k][i] * mean_gh)) * rstd;
    if (a.ds) {
      widen(h, ds, a.s_dtype);
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int i = 0; i < N; ++i) g[k][i] += h[k][i];
    }
    narrow(dy, g, a.s_dtype);
    store_raw(a.dx, row, dy, a.s_dtype, column<N>(0), width);
  }
  if (!chunks.partials.each) return;
  __syncthreads();
  sums = dynamic_shared<float>();
  float* partial = chunks.partials.each + blockIdx.x * 2 * a.width;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * width; i += kWarps * kWarp) {
    const int place = i < width ? sum_place<N>(i) : kSpan + sum_place<N>(i - width);
    float sum = sums[place];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[2 * w * kSpan + place];
    partial[i] = sum;
  }
  sum_partials<4>(chunks, width);
}

// A few rows at a time, so that partial sums are read and written less often than rows are.
template <int N>
__global__ void __launch_bounds__(kWideThreads, 2) layer_norm_backward_wide_kernel(LayerNormBackward a, Chunks chunks) {
  __shared__ float scratch[kWideThreads / kWarp];
  const int width = static_cast<int>(a.width), first = static_cast<int>(threadIdx.x) * N;
  const int64_t begin = blockIdx.x * chunks.rows, end = begin + chunks.rows < a.count ? begin + chunks.rows : a.count;
  const float* stats = as<float>(a.stats);
  float* partial = chunks.partials.each ? chunks.partials.each + blockIdx.x * 2 * a.width : nullptr;
  float dy[1][N], h[1][N], ds[1][N];
  Raw<N> raw[1];
  const auto load_row = [&](int64_t t, int d) {
    load_raw(raw, a.dy, t * width, a.y_dtype, d, width);
    widen(dy, raw, a.y_dtype);
    load_raw(raw, a.s, t * width, a.s_dtype, d, width);
    widen(h, raw, a.s_dtype);
    for (int i = 0; i < N; ++i) h[0][i] = (h[0][i] - stats[t]) * stats[a.count + t];
  };
  const auto weights = [&](int d) {
    Pack<float, N> ones;
    for (int i = 0; i < N; ++i) ones.at[i] = 1;
    return a.weight ? load<N>(as<float>(a.weight) + d) : ones;
  };
  for (int64_t start = begin; start == begin || start < end; start += kTogether) {  // once at least: to write zeros
    float mean_g[kTogether], mean_gh[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      if (!a.dx || start + r >= end) continue;
      float g = 0, gh = 0;
      for (int d = first; d < width; d += kWideThreads * N) {
        load_row(start + r, d);
        const auto weight = weights(d);
        for (int i = 0; i < N; ++i) {
          g += dy[0][i] * weight.at[i];
          gh += dy[0][i] * weight.at[i] * h[0][i];
        }
      }
      mean_g[r] = block_sum(g, scratch) / static_cast<float>(width);
      mean_gh[r] = block_sum(gh, scratch) / static_cast<float>(width);
    }
    for (int d = first; d < width; d += kWideThreads * N) {
      const auto weight = weights(d);
      Pack<float, N> dweight{}, dbias{};
      if (partial && start > begin) dweight = load<N>(partial + d), dbias = load<N>(partial + width + d);
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int64_t t = start + r;
        if (t >= end) continue;
        load_row(t, d);
        for (int i = 0; i < N; ++i) {
          dweight.at[i] += dy[0][i] * h[0][i];
          dbias.at[i] += dy[0][i];
        }
        if (!a.dx) continue;
        if (a.ds) load_raw(raw, a.ds, t * width, a.s_dtype, d, width), widen(ds, raw, a.s_dtype);
        for (int i = 0; i < N; ++i) {
          const float dx = (dy[0][i] * weight.at[i] - (mean_g[r] + h[0][i] * mean_gh[r])) * stats[a.count + t];
          h[0][i] = a.ds ? dx + ds[0][i] : dx;
        }
        narrow(raw, h, a.s_dtype);
        store_raw(a.dx, t * width, raw, a.s_dtype, d, width);
      }
      if (partial) store(partial + d, dweight), store(partial + width + d, dbias);
    }
  }
  if (partial) sum_partials<N>(chunks, width);
}

template <int kValues>
using Share = std::integral_constant<int, kValues>;

// row(Columns<N>{}, Share<kValues>{}) where a warp can hold a row, kValues a lane; else wide(Columns<N>{}).
// params: weight and bias, fp32 beside rows of any dtype.
template <class Row, class Wide>
void choose(int64_t width, std::initializer_list<Rows> rows, std::initializer_list<const void*> params, Row&& row,
            Wide&& wide) {
  M3AE_CHECK(width < int64_t{1} << 30, "x must have fewer than 2^30 columns, got ", width);
  const auto moved = [&](auto columns) {
    if (width <= 16 * kWarp) return row(columns, Share<16>{});
    if (width <= 24 * kWarp) return row(columns, Share<24>{});
    if (width <= 32 * kWarp) return row(columns, Share<32>{});
    if (width <= 40 * kWarp) return row(columns, Share<40>{});
    wide(columns);
  };
  int columns = columns_a_lane(width, rows);
  for (const void* param : params)
    if (reinterpret_cast<std::uintptr_t>(param) % 16 != 0) columns = 1;
  if (columns == 8) moved(Columns<8>{});
  else if (columns == 4) moved(Columns<4>{});
  else wide(Columns<1>{});
}

template <int N, int kValues>
void launch_forward(Columns<N>, Share<kValues>, const LayerNorm& a, const Stream& stream) {
  const int64_t rows = kRowThreads / kWarp;
  M3AE_LAUNCH((layer_norm_kernel<N, kValues>), grid((a.count + rows - 1) / rows), kRowThreads, 0, stream, a);
}

template <int N, int kValues>
void launch_backward(Columns<N>, Share<kValues>, const LayerNormBackward& a, const Chunks& chunks,
                     const Stream& stream) {
  constexpr int kWarps = kValues <= 16 ? 8 : 4;
  const size_t shared = chunks.partials.each ? kWarps * 2 * kValues * kWarp * sizeof(float) : 0;
  M3AE_LAUNCH((layer_norm_backward_kernel<N, kValues, kWarps>), grid(chunks.number), kWarps * kWarp, shared, stream, a,
              chunks);
}

void forward(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, double eps,
             const Tensor& y, const Tensor& s, const Tensor& stats) {
  const LayerNorm a = layer_norm_arguments(x, residual, weight, bias, eps, y, s, stats);
  const Stream stream = stream_of(x);
  choose(
      a.width,
      {{a.x, a.x_dtype}, {a.residual, a.residual_dtype}, {a.s, sum_dtype(a)}, {a.y, a.y_dtype}}, {a.weight, a.bias},
      [&](auto columns, auto share) { launch_forward(columns, share, a, stream); },
      [&](auto columns) {
        constexpr int N = decltype(columns)::value;
        M3AE_LAUNCH(layer_norm_wide_kernel<N>, grid(a.count), kWideThreads, 0, stream, a);
      });
}

// dparams: [2][width], dweight and dbias, the sum of the partials, at least one of that shape.
void backward(const Tensor& dy, const Tensor& ds, const Tensor& s, const Tensor& weight, const Tensor& stats,
              const Tensor& partials, Address counters, int64_t number, const Tensor& dx, const Tensor& dparams) {
  const LayerNormBackward a = layer_norm_arguments(dy, ds, s, weight, stats, dx);
  const Chunks chunks{partials_of(partials.optional("partials", {number, 2, a.width}, Dtype::f32),
                                  dparams.optional("dparams", {2, a.width}, Dtype::f32), counters),
                      number, (a.count + number - 1) / number};
  const Stream stream = stream_of(s);
  choose(
      a.width, {{a.dy, a.y_dtype}, {a.ds, a.s_dtype}, {a.s, a.s_dtype}, {a.dx, a.s_dtype}}, {a.weight},
      [&](auto columns, auto share) { launch_backward(columns, share, a, chunks, stream); },
      [&](auto columns) {
        constexpr int N = decltype(columns)::value;
        M3AE_LAUNCH(layer_norm_backward_wide_kernel<N>, grid(number), kWideThreads, 0, stream, a, chunks);
      });
}

}  // namespace

void bind_layer_norm(pybind11::module_& module) {
  bind(module, "layer_norm", forward, {"x", "residual", "weight", "bias", "eps", "y", "s", "stats"});
  bind(module, "layer_norm_backward", backward, {"dy", "ds", "s", "weight", "stats", "partials", "counters", "number",
       "dx", "dparams"});
}

}  // namespace m3ae::cuda
