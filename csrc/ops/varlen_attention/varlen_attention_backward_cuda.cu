// varlen_attention on a GPU, backward, in one launch and without atomics: no two warps add to one sum.
//
// Of a sequence and a key head, a warp owns sixteen keys and meets all queries (dk and dv stay in its registers), then
// it owns sixteen queries and meets all keys (dq). Where q, k, v and dout of the whole sequence fit shared memory, one
// block does both, takes several short sequences at once, and then the next of its turns (schedule.cuh); where the
// derivatives of the scores fit too, it keeps them for dq, else they are made twice. Where the rows do not fit, or
// several query heads share the keys, a block does kChunk keys or kChunk queries, and the other side comes kChunk rows
// at a time.
#include "cuda/bind.h"
#include "ops/varlen_attention/varlen_attention.cuh"

namespace m3ae::cuda {
namespace {

constexpr int kChunk = 64;
constexpr int kTogether = 6;  // tiles of several short sequences: more would leave a processor one block

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
  Lengths lengths;
  int64_t key_rows;
  int blocks, key_blocks;  // of a sequence and key head; of keys among them. Whole sequences: 1, 0
  int capacity;            // rows of each side in shared memory, at most
  int dscores_stride;      // of the derivatives of scores, kept from dk's turn to dq's; 0: not kept
  bool packs;
  float scale;
  Scale weigh;             // what makes scores weights
};

// What a block holds in shared memory of a sequence.
template <class T, int D>
struct Held {
  const Backward& a;
  Span queries, keys;  // the sequence's
  int key_head;
  int base;            // its first row in shared memory, of either side

  __device__ __forceinline__ T* k() const { return side(0); }
  __device__ __forceinline__ T* v() const { return side(1); }
  __device__ __forceinline__ T* q() const { return side(2); }
  __device__ __forceinline__ T* dout() const { return side(3); }
  // Of the queries: the peak, log2 of the total, and what a row of dscores loses to the softmax's normalization.
  __device__ __forceinline__ float* peak() const { return sums() + base; }
  __device__ __forceinline__ float* log_total() const { return peak() + a.capacity; }
  __device__ __forceinline__ float* delta() const { return peak() + 2 * a.capacity; }
  // [keys][dscores_stride], where kept.
  __device__ __forceinline__ T* dscores() const {
    return reinterpret_cast<T*>(sums() + 3 * a.capacity) + base * a.dscores_stride;
  }

  // Begins to bring sixteen keys from `first` on to `place`, or queries. By a warp.
  __device__ __forceinline__ void bring_keys(int first, int place) const {
    const int64_t row = keys.first + first;
    load_tile<D>(k() + place * kStride<D>, a.op.k, row, key_head, keys.count - first, width(), a.packs);
    load_tile<D>(v() + place * kStride<D>, a.op.v, row, key_head, keys.count - first, width(), a.packs);
  }
  __device__ __forceinline__ void bring_queries(int head, int first, int place) const {
    const int64_t row = queries.first + first;
    load_tile<D>(q() + place * kStride<D>, a.op.q, row, head, queries.count - first, width(), a.packs);
    load_tile<D>(dout() + place * kStride<D>, a.op.dout, row, head, queries.count - first, width(), a.packs);
    bring_sums(head, first, place);
  }
  // `count` of them, by the whole block.
  __device__ __forceinline__ void bring_chunk_of_keys(int first, int count) const {
    for (int row = warp_of_block() * kRows; row < count; row += warps_of_block() * kRows)
      bring_keys(first + row, row);
  }
  __device__ __forceinline__ void bring_chunk_of_queries(int head, int first, int count) const {
    for (int row = warp_of_block() * kRows; row < count; row += warps_of_block() * kRows)
      bring_queries(head, first + row, row);
  }

 private:
  __device__ __forceinline__ int width() const { return static_cast<int>(a.op.width); }
  __device__ __forceinline__ T* side(int i) const {
    return dynamic_shared<T>() + a.lengths.order / 2 + (i * a.capacity + base) * kStride<D>;
  }
  __device__ __forceinline__ float* sums() const {
    return reinterpret_cast<float*>(side(4) - base * kStride<D>);
  }

  // peak, log_total and delta = sum(dout * out) - dlse. Rows past the last weigh nothing. delta is the diagonal of
  // dout out^T, added up as dweights are: where one key has all the weight, out is its value, and dweights - delta is
  // exactly 0.
  __device__ __forceinline__ void bring_sums(int head, int first, int place) const {
    const HeadRows out{const_cast<void*>(a.op.out), a.op.heads * a.op.width, a.op.width};
    const int lane = here(lane_of_warp()), g = lane / 4, t = lane % 4, count = queries.count - first - g;
    const T* x = row_of<const T>(a.op.dout, queries.first + first + g, head);
    const T* y = row_of<const T>(out, queries.first + first + g, head);
    float sums[2][4] = {};
    const auto add = [&](int k, auto&& pair) {
      uint32_t left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i % 2 * 8, d = 16 * k + i / 2 * 8 + 2 * t, end = row < count ? width() : 0;
        left[i] = pair(x + row * a.op.dout.row + d, end - d);
        right[i] = pair(y + row * out.row + d, end - d);
      }
      mma<T>(sums[0], left, right[0], right[2]);
      mma<T>(sums[1], left, right[1], right[3]);
    };
    if (a.packs) {
#pragma unroll 2
      for (int k = 0; k < D / 16; ++k)
        add(k, [](const T* at, int left) { return left > 0 ? *reinterpret_cast<const uint32_t*>(at) : 0; });
    } else {
#pragma unroll 1
      for (int k = 0; k < D / 16; ++k)
        add(k, [](const T* at, int left) {
          return (left > 0 ? at[0].bits : 0u) | static_cast<uint32_t>(left > 1 ? at[1].bits : 0) << 16;
        });
    }
    if (t != g / 2) return;  // the diagonal is with others
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = g + 8 * half;
      const bool real = 8 * half < count;
      const int64_t at = int64_t{head} * a.op.query_rows + queries.first + first + r;
      const float* stats = static_cast<const float*>(a.op.stats) + at;
      const float sum = g % 2 == 0 ? sums[half][2 * half] : sums[half][2 * half + 1];
      peak()[place + r] = real ? stats[0] * a.weigh.direction : 0;
      log_total()[place + r] = real ? stats[a.op.heads * a.op.query_rows] : INFINITY;
      delta()[place + r] = real && a.op.dlse ? sum - static_cast<const float*>(a.op.dlse)[at] : sum;
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
                                            const Second<T, D>& v, int tile, int keys, int query, const Scale& scale) {
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
  const T* q = held.q() + query * kStride<D> + lane_place(kStride<D>);
  const int to_other = here(held.a.capacity);  // computed anew: registers are short
  const T* dout = q + to_other * kStride<D>;
  float weights[2][4], dscores[2][4];
  k.product(weights, q);
  v.product(dscores, dout);
  const float* peak = held.peak() + query + 2 * t;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int column = i / 4 * 8 + i % 2;
    float &weight = weights[i / 4][i % 4], &dscore = dscores[i / 4][i % 4];
    const float log_total = peak[to_other + column], delta = peak[2 * to_other + column];
    const float power = fmaf(fmaf(weight, scale.direction, -peak[column]), scale.factor, -log_total);
    weight = g + i % 4 / 2 * 8 < keys && log_total != INFINITY ? exp2_fast(power) : 0;  // a padded query's is infinite
    dscore = weight * (dscore - delta);
  }
  uint32_t left[4];
  as_left<T>(left, weights);
  add_product<T, D>(sums.dv, left, dout);
  as_left<T>(left, dscores);
  add_product<T, D>(sums.dk, left, q);
  const int stride = held.a.dscores_stride;
  if (stride == 0) return;
  T* kept = held.dscores() + (tile * kRows + g) * stride + query + 2 * t;
#pragma unroll
  for (int i = 0; i < 4; ++i) *reinterpret_cast<uint32_t*>(kept + i % 2 * 8 * stride + i / 2 * 8) = left[i];
}

// What sixteen keys from `key` on, of which `keys` are real, add to dq. peak, log_total, delta: of this lane's rows g and g + 8.
template <class T, int D>
__device__ __forceinline__ void add_keys(const Held<T, D>& held, float (&dq)[D / 8][4], const First<T, D>& q,
                                         const Second<T, D>& dout, int key, int keys, const float (&peak)[2],
                                         const float (&log_total)[2], const float (&delta)[2], const Scale& scale) {
  const int place = key * kStride<D> + lane_place(kStride<D>);
  float weights[2][4], dscores[2][4];
  q.product(weights, held.k() + place);
  dout.product(dscores, held.v() + place);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int column = i / 4 * 8 + lane_of_warp() % 4 * 2 + i % 2, row = i % 4 / 2;
    const float power = fmaf(fmaf(weights[i / 4][i % 4], scale.direction, -peak[row]), scale.factor, -log_total[row]);
    const float weight = column < keys ? exp2_fast(power) : 0;
    dscores[i / 4][i % 4] = weight * (dscores[i / 4][i % 4] - delta[row]);
  }
  uint32_t left[4];
  as_left<T>(left, dscores);
  add_product<T, D>(dq, left, held.k() + place);
}

// dk and dv of a tile of keys, one of those in shared memory, which start with the sequence's key `first`; by a warp.
// kWhole: all queries lie there, too; else all warps of the block bring them, also those whose tile has none.
template <class T, int D, bool kWhole>
__device__ __forceinline__ void of_keys(const Backward& a, const Held<T, D>& held, int first, int tile) {
  const int keys = held.keys.count - first - tile * kRows;
  const First<T, D> k(held.k() + tile * kRows * kStride<D>);
  const Second<T, D> v(held.v() + tile * kRows * kStride<D>);
  KeySums<D> sums;
  clear<D>(sums.dk);
  clear<D>(sums.dv);
  const auto meet = [&](int queries) {
#pragma unroll 1
    for (int query = 0; query < queries; query += kRows)
      add_queries<T, D>(held, sums, k, v, tile, keys, query, a.weigh);
  };
  if constexpr (kWhole) {
    meet(held.queries.count);
  } else {
    const int groups = static_cast<int>(a.op.groups);
    for (int head = held.key_head * groups; head < (held.key_head + 1) * groups; ++head)
      for (int start = 0; start < held.queries.count; start += a.capacity) {
        const int queries = min(held.queries.count - start, a.capacity);
        __syncthreads();  // the queries before are done with
        held.bring_chunk_of_queries(head, start, queries);
        copies_wait();
        __syncthreads();
        if (keys > 0) meet(queries);
      }
  }
  if (keys <= 0) return;
  const int64_t row = held.keys.first + first + tile * kRows;
  const int width = static_cast<int>(a.op.width);
  store_rows<T, D>(sums.dk, {a.scale, a.scale}, row_of<T>(a.op.dk, row, held.key_head), a.op.dk.row, keys, width,
                   a.packs);
  store_rows<T, D>(sums.dv, {1, 1}, row_of<T>(a.op.dv, row, held.key_head), a.op.dv.row, keys, width, a.packs);
}

// dq, the other way round: of a tile of queries of a head.
template <class T, int D, bool kWhole>
__device__ __forceinline__ void of_queries(const Backward& a, const Held<T, D>& held, int head, int first, int tile) {
  const int queries = held.queries.count - first - tile * kRows;
  float dq[D / 8][4];
  clear<D>(dq);
  if (kWhole && a.dscores_stride > 0) {
#pragma unroll 1
    for (int key = 0; key < held.keys.count; key += kRows) {
      uint32_t part[4];
      load_matrices_transposed(part, held.dscores() + key * a.dscores_stride + tile * kRows +
                                         lane_place(a.dscores_stride));
      const T* keys = held.k() + key * kStride<D> + lane_place(kStride<D>);
      add_product<T, D>(dq, {part[0], part[2], part[1], part[3]}, keys);
    }
  } else {
    const First<T, D> q(held.q() + tile * kRows * kStride<D>);
    const Second<T, D> dout(held.dout() + tile * kRows * kStride<D>);
    const int place = tile * kRows + lane_of_warp() / 4;
    const float peak[2] = {held.peak()[place], held.peak()[place + 8]};
    const float log_total[2] = {held.log_total()[place], held.log_total()[place + 8]};
    const float delta[2] = {held.delta()[place], held.delta()[place + 8]};
    const auto meet = [&](int keys) {
#pragma unroll 1
      for (int key = 0; key < keys; key += kRows)
        add_keys<T, D>(held, dq, q, dout, key, keys - key, peak, log_total, delta, a.weigh);
    };
    if constexpr (kWhole) {
      meet(held.keys.count);
    } else {
      for (int start = 0; start < held.keys.count; start += a.capacity) {
        const int keys = min(held.keys.count - start, a.capacity);
        __syncthreads();  // the keys before are done with
        held.bring_chunk_of_keys(start, keys);
        copies_wait();
        __syncthreads();
        if (queries > 0) meet(keys);
      }
    }
  }
  if (queries <= 0) return;
  store_rows<T, D>(dq, {a.scale, a.scale}, row_of<T>(a.op.dq, held.queries.first + first + tile * kRows, head),
                   a.op.dq.row, queries, static_cast<int>(a.op.width), a.packs);
}

// The rows past the last sequence.
template <class T>
__device__ __forceinline__ void clear_the_rest(const Backward& a) {
  const int width = static_cast<int>(a.op.width), sequences = a.lengths.sequences;
  const int queries = a.lengths.cu_q[sequences], keys = a.lengths.cu_k[sequences];
  if (queries == a.op.query_rows && keys == a.key_rows) return;
  for (int64_t head = 0; head < a.op.heads; ++head) {
    clear_rows<T>(a.op.dq, head, queries, a.op.query_rows, width);
    if (head % a.op.groups != 0) continue;
    clear_rows<T>(a.op.dk, head / a.op.groups, keys, a.key_rows, width);
    clear_rows<T>(a.op.dv, head / a.op.groups, keys, a.key_rows, width);
  }
}

// Whole sequences, of as many query heads as key heads.
template <class T, int D>
__device__ __forceinline__ void take_turns(const Backward& a) {
  const Schedule schedule(a.lengths);
  const int warp = warp_of_block(), warps = warps_of_block();
  const Turn& turn = schedule.now();
  for (schedule.begin(0); schedule.has(turn.round); schedule.next()) {
    const auto each_tile = [&](auto&& function) {  // of this warp: (the tile's sequence, its tile there)
      const int tiles = min(turn.tiles, a.lengths.longest);  // never past the memory, whatever the caller said of it
      for (int tile = warp; tile < turn.count * tiles; tile += warps) {
        const int number = tile / tiles, sequence = schedule.order(turn.rank + number);
        Held<T, D> held{a, span(a.lengths.cu_q, sequence), span(a.lengths.cu_k, sequence), turn.head,
                        number * tiles * kRows};
        held.queries.count = min(held.queries.count, tiles * kRows);
        held.keys.count = min(held.keys.count, tiles * kRows);
        function(held, tile - number * tiles);
      }
    };
    each_tile([&](const Held<T, D>& held, int tile) {
      held.bring_keys(tile * kRows, tile * kRows);
      held.bring_queries(turn.head, tile * kRows, tile * kRows);
    });
    copies_wait();
    __syncthreads();
    each_tile([&](const Held<T, D>& held, int tile) {
      if (tile * kRows < held.keys.count) of_keys<T, D, true>(a, held, 0, tile);
    });
    __syncthreads();  // dscores
    each_tile([&](const Held<T, D>& held, int tile) {
      if (tile * kRows < held.queries.count) of_queries<T, D, true>(a, held, turn.head, 0, tile);
    });
    __syncthreads();  // its tiles are done with
  }
}

// kChunk keys or queries of a sequence, by a block.
template <class T, int D>
__device__ __forceinline__ void take_chunk(const Backward& a) {
  const int block = static_cast<int>(blockIdx.x) % a.blocks, rest = static_cast<int>(blockIdx.x) / a.blocks;
  const int groups = static_cast<int>(a.op.groups), key_heads = static_cast<int>(a.op.heads) / groups;
  const int sequence = rest / key_heads, tile = warp_of_block();
  if (sequence >= a.lengths.sequences) return;
  const Held<T, D> held{a, span(a.lengths.cu_q, sequence), span(a.lengths.cu_k, sequence), rest % key_heads, 0};
  const bool keys = block < a.key_blocks;
  const int query_blocks = (a.blocks - a.key_blocks) / groups, turn = block - a.key_blocks;
  const int first = (keys ? block : turn % query_blocks) * kChunk;
  const int count = min((keys ? held.keys.count : held.queries.count) - first, kChunk);
  if (count <= 0) return;
  if (keys) {
    held.bring_chunk_of_keys(first, count);
    copies_wait();
    __syncthreads();
    of_keys<T, D, false>(a, held, first, tile);
  } else {
    const int head = held.key_head * groups + turn / query_blocks;
    held.bring_chunk_of_queries(head, first, count);
    copies_wait();
    __syncthreads();
    of_queries<T, D, false>(a, held, head, first, tile);
  }
}

template <class T, int D, bool kWhole>
__global__ void __launch_bounds__(kWhole ? kMostWarps<D>* kWarp : kChunk / kRows * kWarp,
                                  kWhole ? kLeastBlocks<D> : D <= 32 ? 4 : 2)
    varlen_attention_backward_kernel(const __grid_constant__ Backward a) {
  clear_the_rest<T>(a);
  if constexpr (kWhole) take_turns<T, D>(a);
  else take_chunk<T, D>(a);
}

// How a launch shares its work out; returns (warps, bytes of shared memory).
template <int D>
std::pair<int, size_t> plan(Backward& a, int64_t max_q, int64_t max_k, int64_t limit) {
  const int64_t order = a.lengths.order, half = half_shared(limit);
  const int64_t queries = tiles_of(static_cast<int>(max_q)), keys = tiles_of(static_cast<int>(max_k));
  const int64_t longest = std::max<int64_t>(std::max(queries, keys), 1);
  const int64_t together = std::max<int64_t>(1, kTogether / longest), capacity = longest * together * kRows;
  const auto bytes = [](int64_t rows) { return rows * (4 * kStride<D> * 2 + 3 * static_cast<int64_t>(sizeof(float))); };
  a.blocks = 1;
  a.key_blocks = 0;
  if (a.op.groups == 1 && bytes(capacity) + order <= most_shared(limit)) {
    a.lengths.longest = static_cast<int>(longest);
    a.capacity = static_cast<int>(capacity);
    const int64_t stride = longest * kRows + 8, kept = capacity * stride * 2;
    a.dscores_stride = bytes(capacity) + kept + order <= half ? static_cast<int>(stride) : 0;
    const int64_t most = longest * together, rounds = (most + kMostWarps<D> - 1) / kMostWarps<D>;
    return {static_cast<int>((most + rounds - 1) / rounds),
            static_cast<size_t>(bytes(capacity) + order + (a.dscores_stride > 0 ? kept : 0))};
  }
  a.lengths.order = 0;  // blocks are not dealt turns
  a.capacity = kChunk;
  a.key_blocks = static_cast<int>((std::max<int64_t>(keys, 1) * kRows + kChunk - 1) / kChunk);
  a.blocks = a.key_blocks +
             static_cast<int>((std::max<int64_t>(queries, 1) * kRows + kChunk - 1) / kChunk * a.op.groups);
  return {kChunk / kRows, static_cast<size_t>(bytes(kChunk))};
}

void backward(const Tensor& dout, const Tensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& out, const Tensor& stats, const Tensor& cu_q, const Tensor& cu_k, int64_t max_q,
              int64_t max_k, int64_t shared_limit, std::optional<double> scale, const Tensor& dq, const Tensor& dk,
              const Tensor& dv) {
  Backward args{};
  args.op = varlen_attention_arguments(dout, dlse, q, k, v, out, stats, scale, dq, dk, dv);
  const int64_t batch = cu_q.size(0) - 1, key_rows = k.size(0), key_heads = k.size(1), heads = args.op.heads;
  const int64_t width = args.op.width;
  max_q = std::min(max_q, args.op.query_rows);  // a caller may know no better than that a sequence is not longer
  max_k = std::min(max_k, key_rows);
  args.lengths = lengths(cu_q, cu_k, heads, max_q, args.op.query_rows, max_k, key_rows);
  args.key_rows = key_rows;
  args.scale = static_cast<float>(args.op.scale);
  args.weigh = Scale(args.op.scale);
  args.packs = in_packs({const_cast<void*>(args.op.out), heads * width, width}, width);
  for (const HeadRows& x : {args.op.dout, args.op.q, args.op.k, args.op.v, args.op.dq, args.op.dk, args.op.dv})
    args.packs = args.packs && in_packs(x, width);
  with_tile(args.op.dtype, width, [&](auto type, auto tile) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(tile)::value;
    const auto [warps, bytes] = plan<D>(args, max_q, max_k, shared_limit);
    const Stream on = stream_of(q);
    if (args.key_blocks == 0)
      return launch_turns("varlen_attention_backward_kernel", varlen_attention_backward_kernel<T, D, true>,
                          args.lengths, warps, bytes, on, args);
    launch("varlen_attention_backward_kernel", varlen_attention_backward_kernel<T, D, false>,
           grid(std::max<int64_t>(1, args.blocks * key_heads * batch)), warps * kWarp, bytes, on, args);
  });
}

}  // namespace

void bind_varlen_attention_backward(pybind11::module_& module) {
  bind(module, "varlen_attention_backward", backward, {"dout", "dlse", "q", "k", "v", "out", "stats", "cu_q", "cu_k",
       "max_q", "max_k", "shared_limit", "scale", "dq", "dk", "dv"});
}

}  // namespace m3ae::cuda
