// varlen_attention on a GPU, forward: a block takes a sequence and a head (or some of its queries), a warp sixteen
// queries at a time. Keys and values wait in shared memory: all of a sequence's where two blocks then fit a processor,
// else some at a time. Scores stay in registers; the softmax is rescaled every kStep keys.
#include "cuda/bind.h"
#include "ops/varlen_attention/varlen_attention.cuh"

namespace m3ae::cuda {
namespace {

constexpr int kStep = 32;   // keys between two looks at the largest score
constexpr int kChunk = 64;  // keys in shared memory at a time where not all are
constexpr int kMostWarps = 8;
template <int D>
constexpr int kLeastBlocks = D <= 64 ? 2 : 1;  // that fit a processor: 128 or 255 registers a thread
constexpr int64_t kBlocks = 528;  // that keep a GPU busy: four for each of an H200's processors

struct Forward {
  VarlenAttention op;
  const int32_t *cu_q, *cu_k;
  int sequences, blocks, capacity;  // blocks: of a sequence and head; capacity: keys in shared memory, at most
  bool packs;
  float scale2;  // of scores whose powers of two are the weights
};

template <int D>
struct Softmax {
  float most[2], total[2];  // of rows g and g + 8: the largest score so far, this lane's share of the sum of weights
  float sums[D / 8][4];     // of weighted values
};

// Up to kStep keys more. keys, values: where this lane points in their tiles.
template <class T, int D>
__device__ __forceinline__ void add_keys(Softmax<D>& state, const Own<T, D, true>& queries, const T* keys,
                                         const T* values, int count, float scale2) {
  constexpr int kTiles = kStep / kRows;
  float scores[kTiles][2][4];
  float higher[2] = {state.most[0], state.most[1]};
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile * kRows >= count) break;
    queries.product(scores[tile], keys + tile * kRows * kStride<D>);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int key = tile * kRows + i / 4 * 8 + lane_of_warp() % 4 * 2 + i % 2;
      float& score = scores[tile][i / 4][i % 4];
      score = key < count ? score * scale2 : -INFINITY;
      higher[i % 4 / 2] = fmaxf(higher[i % 4 / 2], score);
    }
  }
  float shift[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    higher[row] = warp_max<4>(higher[row]);
    shift[row] = higher[row] == -INFINITY ? 0 : higher[row];
    const float shrink = exp2_fast(state.most[row] - shift[row]);
    state.most[row] = higher[row];
    state.total[row] *= shrink;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      state.sums[d][2 * row] *= shrink;
      state.sums[d][2 * row + 1] *= shrink;
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile * kRows >= count) break;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = scores[tile][i / 4][i % 4];
      score = exp2_fast(score - shift[i % 4 / 2]);
      state.total[i % 4 / 2] += score;
    }
    uint32_t weights[4];
    as_left<T>(weights, scores[tile]);
    add_product<T, D>(state.sums, weights, values + tile * kRows * kStride<D>);
  }
}

// Ends the softmax of a warp's rows, of which `rows` are real, and stores them from query row `row` on.
template <class T, int D>
__device__ __forceinline__ void finish(const Forward& a, Softmax<D>& state, int64_t row, int64_t head, int rows) {
  float factors[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = warp_sum<4>(state.total[half]);
    factors[half] = total == 0 ? 0 : 1 / total;
    const int mine = lane_of_warp() / 4 + 8 * half;
    if (lane_of_warp() % 4 == 0 && mine < rows)
      static_cast<float*>(a.op.lse)[head * a.op.query_rows + row + mine] =
          total == 0 ? -INFINITY : state.most[half] * kLn2 + logf(total);
  }
  const int width = static_cast<int>(a.op.width);
  const HeadRows out{a.op.out, a.op.heads * a.op.width, a.op.width};
  store_rows<T, D>(state.sums, factors, row_of<T>(out, row, head), out.row, rows, width, a.packs);
}

// The rows past the last sequence.
template <class T>
__device__ __forceinline__ void clear_the_rest(const Forward& a, int block, int64_t head) {
  const int first = a.cu_q[a.sequences];
  const HeadRows out{a.op.out, a.op.heads * a.op.width, a.op.width};
  clear_rows<T>(out, head, first, a.op.query_rows, static_cast<int>(a.op.width), block, a.blocks);
  for (int64_t row = first + block * blockDim.x + threadIdx.x; row < a.op.query_rows; row += a.blocks * blockDim.x)
    static_cast<float*>(a.op.lse)[head * a.op.query_rows + row] = -INFINITY;
}

template <class T, int D>
__global__ void __launch_bounds__(kMostWarps* kWarp, kLeastBlocks<D>) varlen_attention_kernel(Forward a) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int warps = threads / kWarp, warp = thread / kWarp;
  const int block = static_cast<int>(blockIdx.x) % a.blocks, rest = static_cast<int>(blockIdx.x) / a.blocks;
  const int heads = static_cast<int>(a.op.heads), width = static_cast<int>(a.op.width);
  const int sequence = rest / heads;
  const int64_t head = rest % heads, key_head = head / a.op.groups;
  if (sequence == a.sequences) return clear_the_rest<T>(a, block, head);
  const Span queries = span(a.cu_q, sequence), keys = span(a.cu_k, sequence);
  const int tiles = tiles_of(queries.count);
  if (block * warps >= tiles) return;

  T* key_tile = dynamic_shared<T>();
  T* value_tile = key_tile + a.capacity * kStride<D>;
  T* query_tile = value_tile + (a.capacity + warp * kRows) * kStride<D>;
  const auto bring_keys = [&](int start, int count) {
    load_rows<D>(key_tile, row_of<const T>(a.op.k, keys.first + start, key_head), a.op.k.row, count, tiles_of(count),
                 width, a.packs, thread, threads);
    load_rows<D>(value_tile, row_of<const T>(a.op.v, keys.first + start, key_head), a.op.v.row, count,
                 tiles_of(count), width, a.packs, thread, threads);
  };
  const bool whole = keys.count <= a.capacity;
  if (whole) bring_keys(0, keys.count);
  for (int first = block * warps; first < tiles; first += a.blocks * warps) {  // all warps: barriers are the block's
    const int row = (first + warp) * kRows, rows = min(queries.count - row, kRows);
    load_rows<D>(query_tile, row_of<const T>(a.op.q, queries.first + row, head), a.op.q.row, rows, 1, width, a.packs,
                 lane_of_warp(), kWarp);
    copies_wait();
    if (whole && first == block * warps) __syncthreads();
    else __syncwarp();
    const Own<T, D, true> own(query_tile);
    Softmax<D> state{{-INFINITY, -INFINITY}, {0, 0}, {}};
    for (int start = 0; start < keys.count; start += a.capacity) {
      const int count = min(keys.count - start, a.capacity);
      if (!whole) {
        __syncthreads();  // the keys before are done with
        bring_keys(start, count);
        copies_wait();
        __syncthreads();
      }
      if (rows <= 0) continue;
#pragma unroll 1
      for (int key = 0; key < count; key += kStep) {
        const int place = key * kStride<D> + lane_place(kStride<D>);
        add_keys<T, D>(state, own, key_tile + place, value_tile + place, count - key, a.scale2);
      }
    }
    if (rows > 0) finish<T, D>(a, state, queries.first + row, head, rows);
    __syncwarp();  // query_tile is done with
  }
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

void forward(Strides q, Strides k, Strides v, Address cu_q, Address cu_k, Address out, Address lse, int64_t batch,
             int64_t query_rows, int64_t /*key_rows*/, int64_t heads, int64_t key_heads, int64_t width, int64_t max_q,
             int64_t max_k, double scale, int dtype, int64_t shared_limit, int device, Address stream) {
  Forward args{{head_rows(q), head_rows(k), head_rows(v), pointer(out), pointer(lse), query_rows, heads,
                heads / key_heads, width, scale, Dtype(dtype)},
               int32s(cu_q), int32s(cu_k), static_cast<int>(batch), 1, 0, false, static_cast<float>(scale) * kLog2e};
  args.packs = in_packs(args.op.q, width) && in_packs(args.op.k, width) && in_packs(args.op.v, width) &&
               in_packs({args.op.out, heads * width, width}, width);
  with_tile(args.op.dtype, width, [&](auto type, auto tile) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(tile)::value;
    constexpr int64_t row_bytes = kStride<D> * sizeof(T);
    const int64_t tiles = std::max<int64_t>(1, (max_q + kRows - 1) / kRows);
    int64_t rounds = (tiles + kMostWarps - 1) / kMostWarps;
    const int64_t warps = (tiles + rounds - 1) / rounds;
    const auto bytes = [&](int64_t keys) { return (2 * keys + warps * kRows) * row_bytes; };
    int64_t capacity = std::max<int64_t>(kRows, round_up(max_k, kRows)), blocks = rounds;
    if (bytes(capacity) <= (shared_limit - 1024) / 2)
      blocks = std::min(rounds, (kBlocks - 1) / std::max<int64_t>(1, batch * heads) + 1);
    else capacity = std::min<int64_t>(capacity, kChunk);
    args.capacity = static_cast<int>(capacity);
    args.blocks = static_cast<int>(blocks);
    launch("varlen_attention_kernel", varlen_attention_kernel<T, D>, grid(blocks * heads * (batch + 1)),
           static_cast<int>(warps) * kWarp, static_cast<size_t>(bytes(capacity)), Stream{device, stream}, args);
  });
}

}  // namespace

void bind_varlen_attention_backward(pybind11::module_& module);  // varlen_attention_backward_cuda.cu

void bind_varlen_attention(pybind11::module_& module) {
  module.def("varlen_attention", &forward, pybind11::call_guard<pybind11::gil_scoped_release>());
  bind_varlen_attention_backward(module);
}

}  // namespace m3ae::cuda
