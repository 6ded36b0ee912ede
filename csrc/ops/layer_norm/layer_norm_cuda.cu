// layer_norm on a GPU. Rows of up to 1280 columns: a warp each, held in registers, four columns a lane at a time, which
// is sixteen bytes of fp32 and eight of a 16-bit type, so that rows of any mix of dtypes are moved side by side. Other
// rows: a block each, read again from the caches.
#include "ops/layer_norm/layer_norm.h"

#include "cuda/bind.h"
#include "cuda/partials.cuh"
#include "cuda/raw.cuh"
#include "cuda/reduce.cuh"

namespace m3ae::cuda {
namespace {

constexpr int kRowThreads = 128, kWideThreads = 256;  // of a block with a row a warp, with one row
constexpr int kTogether = 4;                          // rows of a block of the wide backward pass at a time

__device__ __forceinline__ int column(int k) { return (k * kWarp + static_cast<int>(threadIdx.x) % kWarp) * 4; }

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
  const Dtype dtype = a.x_dtype == a.residual_dtype ? a.x_dtype : Dtype::f32;
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

__device__ __forceinline__ float inverse_root(float squares, const LayerNorm& a) {
  return 1.f / sqrtf(squares / static_cast<float>(a.width) + static_cast<float>(a.eps));
}

template <int K>
__global__ void __launch_bounds__(kRowThreads, K <= 4 ? 8 : 3) layer_norm_kernel(LayerNorm a) {
  const int64_t t = int64_t{blockIdx.x} * (kRowThreads / kWarp) + threadIdx.x / kWarp, row = t * a.width;
  const int width = static_cast<int>(a.width);
  if (t >= a.count) return;
  float s[K][4];
  load_sum(s, a, row, column(0));
  const float mean = warp_sum(lane_sum(s)) / static_cast<float>(width);
  float squares[K][4];
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[k][i] = column(k) < width ? s[k][i] - mean : 0.f;
      squares[k][i] = s[k][i] * s[k][i];
    }
  const float rstd = inverse_root(warp_sum(lane_sum(squares)), a);
  if (threadIdx.x % kWarp == 0) {
    as<float>(a.stats)[t] = mean;
    as<float>(a.stats)[a.count + t] = rstd;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[k][i] *= rstd;
    if (column(k) < width) scale(s[k], a, column(k));
  }
  Raw<4> y[K];
  narrow(y, s, a.y_dtype);
  store_raw(a.y, row, y, a.y_dtype, column(0), width);
}

template <int N>
__global__ void __launch_bounds__(kWideThreads) layer_norm_wide_kernel(LayerNorm a) {
  __shared__ float scratch[kWideThreads / kWarp];
  const int64_t t = blockIdx.x, row = t * a.width;
  const int width = static_cast<int>(a.width), first = static_cast<int>(threadIdx.x) * N;
  const Dtype dtype = !a.residual || a.x_dtype == a.residual_dtype ? a.x_dtype : Dtype::f32;
  Raw<N> raw[1];
  float s[1][N], sum = 0, squares = 0;
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
  for (int d = first; d < width; d += kWideThreads * N) {
    load_offset(d);
    for (int i = 0; i < N; ++i) squares += s[0][i] * s[0][i];
  }
  const float rstd = inverse_root(block_sum(squares, scratch), a);
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
  sum_partials<N>(chunks.partials, Tile{1, 2 * width, 0, 2 * width}, blockIdx.x, gridDim.x, chunks.partials.tickets);
}

// With h = (s - mean) * rstd and g = dy * weight: dx = rstd * (g - mean(g) - h * mean(g * h)) + ds.
template <int K, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp, 2) layer_norm_backward_kernel(LayerNormBackward a, Chunks chunks) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, width = static_cast<int>(a.width);
  const int64_t begin = blockIdx.x * chunks.rows, end = begin + chunks.rows < a.count ? begin + chunks.rows : a.count;
  const float* stats = as<float>(a.stats);
  float* sums = dynamic_shared<float>() + 2 * warp * width;  // [warps][2][width]: each lane its own columns
  if (chunks.partials.each) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= width) continue;
      store(sums + column(k), Pack<float, 4>{});
      store(sums + width + column(k), Pack<float, 4>{});
    }
  }
  for (int64_t t = begin + warp; t < end; t += kWarps) {
    const int64_t row = t * a.width;
    Raw<4> dy[K], s[K], ds[K];
    load_raw(dy, a.dy, row, a.y_dtype, column(0), width);
    load_raw(s, a.s, row, a.s_dtype, column(0), width);
    if (a.ds) load_raw(ds, a.ds, row, a.s_dtype, column(0), width);
    const float mean = stats[t], rstd = stats[a.count + t];
    float g[K][4], h[K][4], sum_g[4] = {}, sum_gh[4] = {};
    widen(g, dy, a.y_dtype);  // zero beyond the row
    widen(h, s, a.s_dtype);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (column(k) >= width) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) h[k][i] = (h[k][i] - mean) * rstd;
      if (chunks.partials.each) {
        auto dweight = load<4>(sums + column(k)), dbias = load<4>(sums + width + column(k));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dweight.at[i] += g[k][i] * h[k][i];
          dbias.at[i] += g[k][i];
        }
        store(sums + column(k), dweight);
        store(sums + width + column(k), dbias);
      }
      if (a.weight) {
        const auto weight = load<4>(as<float>(a.weight) + column(k));
#pragma unroll
        for (int i = 0; i < 4; ++i) g[k][i] *= weight.at[i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum_g[i] += g[k][i];
        sum_gh[i] += g[k][i] * h[k][i];
      }
    }
    if (!a.dx) continue;
    const float mean_g = warp_sum(sum_g[0] + sum_g[1] + sum_g[2] + sum_g[3]) / static_cast<float>(width);
    const float mean_gh = warp_sum(sum_gh[0] + sum_gh[1] + sum_gh[2] + sum_gh[3]) / static_cast<float>(width);
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) g[k][i] = (g[k][i] - (mean_g + h[k][i] * mean_gh)) * rstd;
    if (a.ds) {
      widen(h, ds, a.s_dtype);
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) g[k][i] += h[k][i];
    }
    narrow(dy, g, a.s_dtype);
    store_raw(a.dx, row, dy, a.s_dtype, column(0), width);
  }
  if (!chunks.partials.each) return;
  __syncthreads();
  sums = dynamic_shared<float>();
  float* partial = chunks.partials.each + blockIdx.x * 2 * a.width;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * width; i += kWarps * kWarp) {
    float sum = sums[i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[2 * w * width + i];
    partial[i] = sum;
  }
  sum_partials<4>(chunks, width);
}

// A few rows at a time, so that partial sums are read and written less often than rows are.
template <int N>
__global__ void __launch_bounds__(kWideThreads) layer_norm_backward_wide_kernel(LayerNormBackward a, Chunks chunks) {
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
  const auto weight_at = [&](int d) { return a.weight ? as<float>(a.weight)[d] : 1.f; };
  for (int64_t start = begin; start == begin || start < end; start += kTogether) {  // once at least: to write zeros
    float mean_g[kTogether], mean_gh[kTogether];
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
      if (!a.dx || start + r >= end) continue;
      float g = 0, gh = 0;
      for (int d = first; d < width; d += kWideThreads * N) {
        load_row(start + r, d);
        for (int i = 0; i < N; ++i) {
          g += dy[0][i] * weight_at(d + i);
          gh += dy[0][i] * weight_at(d + i) * h[0][i];
        }
      }
      mean_g[r] = block_sum(g, scratch) / static_cast<float>(width);
      mean_gh[r] = block_sum(gh, scratch) / static_cast<float>(width);
    }
    for (int d = first; d < width; d += kWideThreads * N) {
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
          const float dx = (dy[0][i] * weight_at(d + i) - (mean_g[r] + h[0][i] * mean_gh[r])) * stats[a.count + t];
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

template <int K>
using Steps = std::integral_constant<int, K>;

// row(Steps<K>{}) where a warp can hold a row, K times four columns a lane; else wide(Steps<N>{}), N columns at a time.
template <class Row, class Wide, class... Addresses>
void choose(int64_t width, Row&& row, Wide&& wide, Addresses... addresses) {
  M3AE_CHECK(width < int64_t{1} << 30, "x must have fewer than 2^30 columns, got ", width);
  if (!in_fours(width, addresses...)) return wide(Steps<1>{});
  if (width <= 4 * 4 * kWarp) return row(Steps<4>{});
  if (width <= 6 * 4 * kWarp) return row(Steps<6>{});
  if (width <= 8 * 4 * kWarp) return row(Steps<8>{});
  if (width <= 10 * 4 * kWarp) return row(Steps<10>{});
  wide(Steps<4>{});
}

template <int K>
void launch_forward(Steps<K>, const LayerNorm& a, const Stream& stream) {
  const int64_t rows = kRowThreads / kWarp;
  M3AE_LAUNCH(layer_norm_kernel<K>, grid((a.count + rows - 1) / rows), kRowThreads, 0, stream, a);
}

template <int K>
void launch_backward(Steps<K>, const LayerNormBackward& a, const Chunks& chunks, const Stream& stream) {
  constexpr int kWarps = K <= 4 ? 8 : 4;
  const size_t shared = chunks.partials.each ? static_cast<size_t>(kWarps * 2 * a.width) * sizeof(float) : 0;
  M3AE_LAUNCH((layer_norm_backward_kernel<K, kWarps>), grid(chunks.number), kWarps * kWarp, shared, stream, a, chunks);
}

void forward(Address x, Address residual, Address weight, Address bias, Address y, Address s, Address stats,
             int64_t count, int64_t width, double eps, int x_dtype, int residual_dtype, int y_dtype, int device,
             Address on) {
  const LayerNorm a{pointer(x), pointer(residual), pointer(weight), pointer(bias),         pointer(y),
                    pointer(s), pointer(stats),    count,           width,                 eps,
                    Dtype(x_dtype), Dtype(residual_dtype), Dtype(y_dtype)};
  const Stream stream{device, on};
  choose(
      width, [&](auto steps) { launch_forward(steps, a, stream); },
      [&](auto columns) {
        constexpr int N = decltype(columns)::value;
        M3AE_LAUNCH(layer_norm_wide_kernel<N>, grid(count), kWideThreads, 0, stream, a);
      },
      a.x, a.residual, a.weight, a.bias, a.y, a.s);
}

// dparams: [2][width], dweight and dbias, the sum of `number` partials of that shape, at least one; null, both: not
// wanted.
void backward(Address dy, Address ds, Address s, Address weight, Address stats, Address dx, Address partials,
              Address dparams, Address tickets, int64_t number, int64_t count, int64_t width, int s_dtype, int y_dtype,
              int device, Address on) {
  const LayerNormBackward a{pointer(dy), pointer(ds), pointer(s), pointer(weight), pointer(stats),
                            pointer(dx), count,       width,      Dtype(s_dtype),  Dtype(y_dtype)};
  const Chunks chunks{partials_of(partials, dparams, tickets), number, (count + number - 1) / number};
  const Stream stream{device, on};
  choose(
      width, [&](auto steps) { launch_backward(steps, a, chunks, stream); },
      [&](auto columns) {
        constexpr int N = decltype(columns)::value;
        M3AE_LAUNCH(layer_norm_backward_wide_kernel<N>, grid(number), kWideThreads, 0, stream, a, chunks);
      },
      a.dy, a.ds, a.s, a.weight, a.dx);
}

}  // namespace

void bind_layer_norm(pybind11::module_& module) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  module.def("layer_norm", &forward, no_gil);
  module.def("layer_norm_backward", &backward, no_gil);
}

}  // namespace m3ae::cuda
