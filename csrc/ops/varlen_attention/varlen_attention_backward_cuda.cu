// varlen_attention on a GPU, backward, in one launch and without atomics: no two warps add to one sum.
//
// Of a sequence and a key head, a warp owns sixteen keys and meets all queries (dk and dv stay in its registers), then
// it owns sixteen queries and meets all keys (dq). Where q, k, v and dout of the whole sequence fit shared memory, one
// block does both, and where the derivatives of the scores fit too, it keeps them for dq; else they are made twice.
// Where the rows do not fit, or several query heads share the keys, a block does kChunk keys or kChunk queries of
// either kind, and the other side comes kChunk rows at a time.
#include "cuda/bind.h"
#include "ops/varlen_attention/varlen_attention.cuh"

namespace m3ae::cuda {
namespace {

constexpr int kChunk = 64;

template <int D>
constexpr int kMostWarps = D <= 32 ? 10 : D <= 80 ? 12 : 8;
template <int D>
constexpr int kLeastBlocks = D <= 32 ? 2 : 1;  // of whole sequences, a processor: 96, 168 or 255 registers a thread
// A warp's own rows, in registers as far as these go: of k (then q), of v (then dout).
template <class T, int D>
using First = Own<T, D, D <= 80>;
template <class T, int D>
using Second = Own<T, D, D == 64>;

struct Backward {
  VarlenAttentionBackward op;
  const int32_t *cu_q, *cu_k;
  int64_t key_rows;
  int sequences, blocks, key_blocks;     // blocks: of a sequence and key head; key_blocks: of keys among them, 0: whole
  int query_capacity, key_capacity;      // rows in shared memory, at most
  bool packs, keep;                      // keep: derivatives of scores, from dk's turn to dq's
  float scale, scale2;                   // scale2: of scores whose powers of two are the weights
};

// What a block holds in shared memory, and whose it is.
template <class T, int D>
struct Held {
  const Backward& a;
  Span queries, keys;  // the sequence's
  int key_head;

  __device__ __forceinline__ Held(const Backward& a, int sequence, int key_head)
      : a(a), queries(span(a.cu_q, sequence)), keys(span(a.cu_k, sequence)), key_head(key_head) {
    if (a.key_blocks > 0) return;  // whole: never past the memory, whatever the caller said of the longest length
    queries.count = min(queries.count, a.query_capacity);
    keys.count = min(keys.count, a.key_capacity);
  }

  __device__ __forceinline__ T* k() const { return dynamic_shared<T>(); }
  __device__ __forceinline__ T* v() const { return k() + a.key_capacity * kStride<D>; }
  __device__ __forceinline__ T* q() const { return v() + a.key_capacity * kStride<D>; }
  __device__ __forceinline__ T* dout() const { return q() + a.query_capacity * kStride<D>; }
  // Of the queries: lse in powers of two, and what a row of dscores loses to the softmax's normalisation.
  __device__ __forceinline__ float* lse2() const {
    return reinterpret_cast<float*>(dout() + a.query_capacity * kStride<D>);
  }
  __device__ __forceinline__ float* delta() const { return lse2() + a.query_capacity; }
  // [keys][dscores_stride], where kept.
  __device__ __forceinline__ T* dscores() const { return reinterpret_cast<T*>(delta() + a.query_capacity); }
  __device__ __forceinline__ int dscores_stride() const { return a.query_capacity + 8; }

  __device__ __forceinline__ void bring_keys(int start, int count) const {
    const int width = static_cast<int>(a.op.width), thread = threadIdx.x, threads = blockDim.x;
    load_rows<D>(k(), row_of<const T>(a.op.k, keys.first + start, key_head), a.op.k.row, count, tiles_of(count), width,
                 a.packs, thread, threads);
    load_rows<D>(v(), row_of<const T>(a.op.v, keys.first + start, key_head), a.op.v.row, count, tiles_of(count), width,
                 a.packs, thread, threads);
  }

  __device__ __forceinline__ void bring_queries(int head, int start, int count) const {
    const int width = static_cast<int>(a.op.width), thread = threadIdx.x, threads = blockDim.x;
    load_rows<D>(q(), row_of<const T>(a.op.q, queries.first + start, head), a.op.q.row, count, tiles_of(count), width,
                 a.packs, thread, threads);
    load_rows<D>(dout(), row_of<const T>(a.op.dout, queries.first + start, head), a.op.dout.row, count,
                 tiles_of(count), width, a.packs, thread, threads);
    bring_sums(head, start, count);
  }

  // lse2 and delta = sum(dout * out) - dlse, four lanes a row. Rows past the last weigh nothing.
  __device__ __forceinline__ void bring_sums(int head, int start, int count) const {
    const HeadRows out{const_cast<void*>(a.op.out), a.op.heads * a.op.width, a.op.width};
    const int width = static_cast<int>(a.op.width), t = lane_of_warp() % 4;
#pragma unroll 1
    for (int row = threadIdx.x / 4; row < tiles_of(count) * kRows; row += blockDim.x / 4) {
      const T* x = row_of<const T>(out, queries.first + start + row, head);
      const T* y = row_of<const T>(a.op.dout, queries.first + start + row, head);
      float sum = 0;
      if (row < count && a.packs) {
#pragma unroll
        for (int i = 0; i < D / 8; i += 4) {
          const int d = (i + t) * 8;
          if (d >= width) continue;
          const auto these = load<8>(x + d), those = load<8>(y + d);
#pragma unroll
          for (int e = 0; e < 8; ++e) sum += widen(these.at[e]) * widen(those.at[e]);
        }
      } else if (row < count) {
#pragma unroll 1
        for (int d = t; d < width; d += 4) sum += widen(x[d]) * widen(y[d]);
      }
      sum = warp_sum<4>(sum);
      if (t != 0) continue;
      const int64_t at = int64_t{head} * a.op.query_rows + queries.first + start + row;
      const float lse = row < count ? static_cast<const float*>(a.op.lse)[at] : INFINITY;
      lse2()[row] = lse == -INFINITY ? 0 : lse * kLog2e;
      delta()[row] = row < count && a.op.dlse ? sum - static_cast<const float*>(a.op.dlse)[at] : sum;
    }
  }
};

template <int D>
struct KeySums {
  float dk[D / 8][4], dv[D / 8][4];
};

// What sixteen queries from `query` on add to the sums of the keys of tile `tile`, of which `keys` are real.
template <class T, int D>
__device__ __forceinline__ void add_queries(const Held<T, D>& held, KeySums<D>& sums, const First<T, D>& k,
                                            const Second<T, D>& v, int tile, int keys, int query, float scale2) {
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
  const int place = query * kStride<D> + lane_place(kStride<D>);
  float weights[2][4], dscores[2][4];
  k.product(weights, held.q() + place);
  v.product(dscores, held.dout() + place);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int column = query + i / 4 * 8 + 2 * t + i % 2;
    float &weight = weights[i / 4][i % 4], &dscore = dscores[i / 4][i % 4];
    const float lse2 = held.lse2()[column];  // a padded query's is infinite: it weighs nothing, whatever the key
    weight = g + i % 4 / 2 * 8 < keys && lse2 != INFINITY ? exp2_fast(fmaf(weight, scale2, -lse2)) : 0;
    dscore = weight * (dscore - held.delta()[column]);
  }
  uint32_t left[4];
  as_left<T>(left, weights);
  add_product<T, D>(sums.dv, left, held.dout() + place);
  as_left<T>(left, dscores);
  add_product<T, D>(sums.dk, left, held.q() + place);
  if (!held.a.keep) return;
  T* kept = held.dscores() + (tile * kRows + g) * held.dscores_stride() + query + 2 * t;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    *reinterpret_cast<uint32_t*>(kept + i % 2 * 8 * held.dscores_stride() + i / 2 * 8) = left[i];
}

// What sixteen keys from `key` on, of which `keys` are real, add to dq. lse2, delta: of this lane's rows g and g + 8.
template <class T, int D>
__device__ __forceinline__ void add_keys(const Held<T, D>& held, float (&dq)[D / 8][4], const First<T, D>& q,
                                         const Second<T, D>& dout, int key, int keys, const float (&lse2)[2],
                                         const float (&delta)[2], float scale2) {
  const int place = key * kStride<D> + lane_place(kStride<D>);
  float weights[2][4], dscores[2][4];
  q.product(weights, held.k() + place);
  dout.product(dscores, held.v() + place);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int column = i / 4 * 8 + lane_of_warp() % 4 * 2 + i % 2, row = i % 4 / 2;
    const float weight = column < keys ? exp2_fast(fmaf(weights[i / 4][i % 4], scale2, -lse2[row])) : 0;
    dscores[i / 4][i % 4] = weight * (dscores[i / 4][i % 4] - delta[row]);
  }
  uint32_t left[4];
  as_left<T>(left, dscores);
  add_product<T, D>(dq, left, held.k() + place);
}

// dk and dv of this warp's share of `count` keys from `first` on, which lie in shared memory. kWhole: all queries do
// too; else a warp has one tile at most, and all warps of the block bring the queries.
template <class T, int D, bool kWhole>
__device__ __forceinline__ void of_keys(const Backward& a, const Held<T, D>& held, int first, int count) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int groups = kWhole ? 1 : static_cast<int>(a.op.groups), key_head = held.key_head;
  const int at_a_time = kWhole ? held.queries.count : a.query_capacity;
  for (int tile = warp; tile < (kWhole ? tiles_of(count) : warps); tile += warps) {
    const First<T, D> k(held.k() + tile * kRows * kStride<D>);
    const Second<T, D> v(held.v() + tile * kRows * kStride<D>);
    const int keys = count - tile * kRows;
    KeySums<D> sums;
    clear<D>(sums.dk);
    clear<D>(sums.dv);
    for (int head = key_head * groups; head < (key_head + 1) * groups; ++head)
      for (int start = 0; start < held.queries.count; start += at_a_time) {
        const int queries = min(held.queries.count - start, at_a_time);
        if constexpr (!kWhole) {
          __syncthreads();  // the queries before are done with
          held.bring_queries(head, start, queries);
          copies_wait();
          __syncthreads();
        }
        if (keys <= 0) continue;
#pragma unroll 1
        for (int query = 0; query < queries; query += kRows)
          add_queries<T, D>(held, sums, k, v, tile, keys, query, a.scale2);
      }
    if (keys <= 0) continue;
    const int64_t row = held.keys.first + first + tile * kRows;
    const int width = static_cast<int>(a.op.width);
    store_rows<T, D>(sums.dk, {a.scale, a.scale}, row_of<T>(a.op.dk, row, key_head), a.op.dk.row, keys, width, a.packs);
    store_rows<T, D>(sums.dv, {1, 1}, row_of<T>(a.op.dv, row, key_head), a.op.dv.row, keys, width, a.packs);
  }
}

// dq, the other way round: of this warp's share of `count` queries of a head from `first` on.
template <class T, int D, bool kWhole>
__device__ __forceinline__ void of_queries(const Backward& a, const Held<T, D>& held, int head, int first,
                                           int count) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int at_a_time = kWhole ? held.keys.count : a.key_capacity;
  for (int tile = warp; tile < (kWhole ? tiles_of(count) : warps); tile += warps) {
    const int queries = count - tile * kRows, place = tile * kRows + lane_of_warp() / 4;
    float dq[D / 8][4];
    clear<D>(dq);
    if (kWhole && a.keep) {
#pragma unroll 1
      for (int key = 0; key < held.keys.count; key += kRows) {
        uint32_t part[4];
        load_matrices_transposed(part, held.dscores() + key * held.dscores_stride() + tile * kRows +
                                           lane_place(held.dscores_stride()));
        const T* keys = held.k() + key * kStride<D> + lane_place(kStride<D>);
        add_product<T, D>(dq, {part[0], part[2], part[1], part[3]}, keys);
      }
    } else {
      const First<T, D> q(held.q() + tile * kRows * kStride<D>);
      const Second<T, D> dout(held.dout() + tile * kRows * kStride<D>);
      const float lse2[2] = {held.lse2()[place], held.lse2()[place + 8]};
      const float delta[2] = {held.delta()[place], held.delta()[place + 8]};
      for (int start = 0; start < held.keys.count; start += at_a_time) {
        const int keys = min(held.keys.count - start, at_a_time);
        if constexpr (!kWhole) {
          __syncthreads();  // the keys before are done with
          held.bring_keys(start, keys);
          copies_wait();
          __syncthreads();
        }
        if (queries <= 0) continue;
#pragma unroll 1
        for (int key = 0; key < keys; key += kRows)
          add_keys<T, D>(held, dq, q, dout, key, keys - key, lse2, delta, a.scale2);
      }
    }
    if (queries <= 0) continue;
    const int64_t row = held.queries.first + first + tile * kRows;
    store_rows<T, D>(dq, {a.scale, a.scale}, row_of<T>(a.op.dq, row, head), a.op.dq.row, queries,
                     static_cast<int>(a.op.width), a.packs);
  }
}

// The rows past the last sequence.
template <class T>
__device__ __forceinline__ void clear_the_rest(const Backward& a, int block, int64_t key_head) {
  const int width = static_cast<int>(a.op.width);
  clear_rows<T>(a.op.dk, key_head, a.cu_k[a.sequences], a.key_rows, width, block, a.blocks);
  clear_rows<T>(a.op.dv, key_head, a.cu_k[a.sequences], a.key_rows, width, block, a.blocks);
  for (int64_t head = key_head * a.op.groups; head < (key_head + 1) * a.op.groups; ++head)
    clear_rows<T>(a.op.dq, head, a.cu_q[a.sequences], a.op.query_rows, width, block, a.blocks);
}

// All of a sequence and head in one block, or kChunk keys or queries.
template <class T, int D, bool kWhole>
__global__ void __launch_bounds__(kWhole ? kMostWarps<D>* kWarp : kChunk / kRows * kWarp,
                                  kWhole ? kLeastBlocks<D> : D <= 32 ? 3 : 2)
    varlen_attention_backward_kernel(Backward a) {
  const int block = static_cast<int>(blockIdx.x) % a.blocks, rest = static_cast<int>(blockIdx.x) / a.blocks;
  const int groups = static_cast<int>(a.op.groups), key_heads = static_cast<int>(a.op.heads) / groups;
  const int sequence = rest / key_heads, key_head = rest % key_heads;
  if (sequence == a.sequences) return clear_the_rest<T>(a, block, key_head);
  const Held<T, D> held(a, sequence, key_head);
  if constexpr (kWhole) {
    held.bring_keys(0, held.keys.count);
    held.bring_queries(key_head, 0, held.queries.count);
    copies_wait();
    __syncthreads();
    of_keys<T, D, true>(a, held, 0, held.keys.count);
    __syncthreads();  // dscores
    of_queries<T, D, true>(a, held, key_head, 0, held.queries.count);
  } else if (block < a.key_blocks) {
    const int first = block * kChunk, count = min(held.keys.count - first, kChunk);
    if (count <= 0) return;
    held.bring_keys(first, count);
    copies_wait();
    __syncthreads();
    of_keys<T, D, false>(a, held, first, count);
  } else {
    const int query_blocks = (a.blocks - a.key_blocks) / groups, turn = block - a.key_blocks;
    const int head = key_head * groups + turn / query_blocks;
    const int first = turn % query_blocks * kChunk, count = min(held.queries.count - first, kChunk);
    if (count <= 0) return;
    held.bring_queries(head, first, count);
    copies_wait();
    __syncthreads();
    of_queries<T, D, false>(a, held, head, first, count);
  }
}

int64_t tiles(int64_t rows) { return std::max<int64_t>(1, (rows + kRows - 1) / kRows); }

// How a launch shares its work out; returns (warps, bytes of shared memory).
template <int D>
std::pair<int, size_t> plan(Backward& a, int64_t max_q, int64_t max_k, int64_t limit) {
  const auto bytes = [](int64_t queries, int64_t keys) {
    return 2 * (queries + keys) * kStride<D> * 2 + 2 * queries * static_cast<int64_t>(sizeof(float));
  };
  int64_t queries = tiles(max_q) * kRows, keys = tiles(max_k) * kRows, all = bytes(queries, keys);
  if (a.op.groups == 1 && all <= limit) {
    const int64_t with_dscores = all + keys * (queries + 8) * 2;
    a.keep = with_dscores <= (limit - 1024) / 2;  // two blocks still fit a processor
    if (a.keep) all = with_dscores;
    a.blocks = 1;
    a.key_blocks = 0;
  } else {
    a.key_blocks = static_cast<int>((tiles(max_k) * kRows + kChunk - 1) / kChunk);
    a.blocks = a.key_blocks + static_cast<int>((tiles(max_q) * kRows + kChunk - 1) / kChunk * a.op.groups);
    queries = keys = kChunk;
    all = bytes(queries, keys);
  }
  a.query_capacity = static_cast<int>(queries);
  a.key_capacity = static_cast<int>(keys);
  const int64_t most = std::max(queries, keys) / kRows, rounds = (most + kMostWarps<D> - 1) / kMostWarps<D>;
  return {static_cast<int>((most + rounds - 1) / rounds), static_cast<size_t>(all)};
}

void backward(Strides dout, Strides q, Strides k, Strides v, Address out, Address lse, Address dlse, Address cu_q,
              Address cu_k, Strides dq, Strides dk, Strides dv, int64_t batch, int64_t query_rows, int64_t key_rows,
              int64_t heads, int64_t key_heads, int64_t width, int64_t max_q, int64_t max_k, double scale, int dtype,
              int64_t shared_limit, int device, Address stream) {
  Backward args{};
  args.op = {head_rows(dout), head_rows(q), head_rows(k), head_rows(v), pointer(out), pointer(lse), pointer(dlse),
             head_rows(dq), head_rows(dk), head_rows(dv), query_rows, heads, heads / key_heads, width, scale,
             Dtype(dtype)};
  args.cu_q = int32s(cu_q);
  args.cu_k = int32s(cu_k);
  args.key_rows = key_rows;
  args.sequences = static_cast<int>(batch);
  args.scale = static_cast<float>(scale);
  args.scale2 = args.scale * kLog2e;
  args.packs = in_packs({pointer(out), heads * width, width}, width);
  for (const HeadRows& x : {args.op.dout, args.op.q, args.op.k, args.op.v, args.op.dq, args.op.dk, args.op.dv})
    args.packs = args.packs && in_packs(x, width);
  with_tile(args.op.dtype, width, [&](auto type, auto tile) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(tile)::value;
    const auto [warps, bytes] = plan<D>(args, max_q, max_k, shared_limit);
    const auto kernel = args.key_blocks == 0 ? varlen_attention_backward_kernel<T, D, true>
                                             : varlen_attention_backward_kernel<T, D, false>;
    launch("varlen_attention_backward_kernel", kernel, grid(args.blocks * key_heads * (batch + 1)), warps * kWarp,
           bytes, Stream{device, stream}, args);
  });
}

}  // namespace

void bind_varlen_attention_backward(pybind11::module_& module) {
  module.def("varlen_attention_backward", &backward, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace m3ae::cuda
