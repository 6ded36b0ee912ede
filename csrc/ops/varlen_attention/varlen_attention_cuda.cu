// varlen_attention on a GPU, forward: a block takes a sequence and a head, several short sequences, or a piece of a
// long one's queries, and then the next of its turns (schedule.cuh); a warp takes sixteen queries. Keys and values wait
// in shared memory: all of a sequence's where two blocks then fit a processor, else some at a time; where there is room
// for it, the next turn's are on their way meanwhile. Scores stay in registers; the softmax is rescaled every kStep
// keys.
#include <cfloat>

#include "cuda/bind.h"
#include "ops/varlen_attention/varlen_attention.cuh"

namespace m3ae::cuda {
namespace {

constexpr int kStep = 32;   // keys between two looks at the largest score
template <int D>
constexpr int kMostWarps = D <= 64 ? 8 : 6;
constexpr int kLeastWarps = 4;  // to bring many keys for few queries
template <int D>
constexpr int kLeastBlocks = D <= 80 ? 2 : 1;  // that fit a processor: 128, 168 or 255 registers a thread
constexpr int64_t kTurns = 528;  // that keep a GPU busy: four for each of an H200's processors

struct Forward {
  VarlenAttention op;
  Lengths lengths;
  int capacity;  // tiles of keys in shared memory, at most
  int stages;    // 2: the next turn's rows come while this one's are worked on
  bool packs;
  Scale scale;
};

template <int D>
struct Softmax {
  float most[2], total[2];  // of rows g and g + 8: the largest score so far, this lane's share of the sum of weights
  float sums[D / 8][4];     // of weighted values
};

// Up to kStep keys more. keys, values: where this lane points in their tiles.
template <class T, int D>
__device__ __forceinline__ void add_keys(Softmax<D>& state, const Own<T, D, true>& queries, const T* keys,
                                         const T* values, int count, const Scale& scale) {
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
      score = key < count ? score * scale.direction : -INFINITY;
      higher[i % 4 / 2] = fmaxf(higher[i % 4 / 2], score);
    }
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    higher[row] = warp_max<4>(higher[row]);
    const float shrink = exp2_fast((state.most[row] - higher[row]) * scale.factor);
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
      score = exp2_fast((score - higher[i % 4 / 2]) * scale.factor);
      state.total[i % 4 / 2] += score;
    }
    uint32_t weights[4];
    as_left<T>(weights, scores[tile]);
    add_product<T, D>(state.sums, weights, values + tile * kRows * kStride<D>);
  }
}

// What op.py says of stats; without keys peak and total are 0.
__device__ __forceinline__ void store_stats(const VarlenAttention& op, int64_t head, int64_t row, float peak,
                                            float total) {
  float* to = static_cast<float*>(op.stats) + head * op.query_rows + row;
  to[0] = peak;
  to[op.heads * op.query_rows] = log2f(total);
}

// Ends the softmax of a warp's rows, of which `rows` are real, and stores them from query row `row` on.
template <class T, int D>
__device__ __forceinline__ void finish(const Forward& a, Softmax<D>& state, int64_t row, int64_t head, int rows,
                                       bool keyless) {
  float factors[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = warp_sum<4>(state.total[half]);
    factors[half] = keyless ? 0 : 1 / total;
    const int mine = lane_of_warp() / 4 + 8 * half;
    if (lane_of_warp() % 4 == 0 && mine < rows)
      store_stats(a.op, head, row + mine, keyless ? 0 : (a.scale.direction < 0 ? -2 : 2) * state.most[half], total);
  }
  const int width = static_cast<int>(a.op.width);
  const HeadRows out{a.op.out, a.op.heads * a.op.width, a.op.width};
  store_rows<T, D>(state.sums, factors, row_of<T>(out, row, head), out.row, rows, width, a.packs);
}

// The rows past the last sequence.
template <class T>
__device__ __forceinline__ void clear_the_rest(const Forward& a) {
  const int first = a.lengths.cu_q[a.lengths.sequences];
  if (first == a.op.query_rows) return;
  const HeadRows out{a.op.out, a.op.heads * a.op.width, a.op.width};
  for (int64_t head = 0; head < a.op.heads; ++head) {
    clear_rows<T>(out, head, first, a.op.query_rows, static_cast<int>(a.op.width));
    for (int64_t row = first + int64_t{blockIdx.x} * blockDim.x + threadIdx.x; row < a.op.query_rows;
         row += int64_t{gridDim.x} * blockDim.x)
      store_stats(a.op, head, row, 0, 0);
  }
}

// A block's shared memory: per stage the tiles of keys, of values, and a tile of queries a warp.
template <class T, int D>
class Tiles {
 public:
  static constexpr int kTile = kRows * kStride<D>;

  __device__ __forceinline__ Tiles(const Forward& a, const Schedule& schedule) : a_(a), schedule_(schedule) {}

  __device__ __forceinline__ T* keys(int stage) const {
    return dynamic_shared<T>() + a_.lengths.order / 2 + stage * (2 * a_.capacity + warps_of_block()) * kTile;
  }
  __device__ __forceinline__ T* values(int stage) const { return keys(stage) + a_.capacity * kTile; }
  __device__ __forceinline__ T* queries(int stage) const {
    return values(stage) + (a_.capacity + warp_of_block()) * kTile;
  }

  // Begins to bring tiles of a turn's keys from `first` on, as many as fit, into the first tiles.
  __device__ __forceinline__ void bring_keys(const Turn& turn, int stage, int first) const {
    const int tiles = min(turn.count * turn.tiles - first, a_.capacity);
    const int64_t head = turn.head / a_.op.groups;
    for (int tile = warp_of_block(); tile < tiles; tile += warps_of_block()) {
      const int sequence = (first + tile) / turn.tiles, row = (first + tile - sequence * turn.tiles) * kRows;
      const Span span = of(a_.lengths.cu_k, turn, sequence);
      const auto bring = [&](T* to, const HeadRows& x) {
        load_tile<D>(to + tile * kTile, x, span.first + row, head, span.count - row, width(), a_.packs);
      };
      bring(keys(stage), a_.op.k);
      bring(values(stage), a_.op.v);
    }
  }
  // This warp's queries of a turn, where the block's start with tile `start`: sixteen, fewer or none.
  __device__ __forceinline__ Span queries_of(const Turn& turn, int start) const {
    const int sequence = mine(turn), row = (start + warp_of_block() - sequence * turn.tiles) * kRows;
    const Span all = of(a_.lengths.cu_q, turn, sequence);
    return {all.first + row, all.count - row};
  }
  __device__ __forceinline__ void bring_queries(const Turn& turn, int stage, int start) const {
    const Span span = queries_of(turn, start);
    load_tile<D>(queries(stage), a_.op.q, span.first, turn.head, span.count, width(), a_.packs);
  }
  // The first that a turn needs.
  __device__ __forceinline__ void bring(const Turn& turn, int stage) const {
    if (whole(turn)) bring_keys(turn, stage, 0);
    if (mine(turn) < turn.count) bring_queries(turn, stage, turn.piece * warps_of_block());
  }

  __device__ __forceinline__ bool whole(const Turn& turn) const { return turn.count * turn.tiles <= a_.capacity; }
  // The sequence of a turn that this warp works on.
  __device__ __forceinline__ static int mine(const Turn& turn) {
    return turn.count > 1 ? warp_of_block() / turn.tiles : 0;
  }
  __device__ __forceinline__ Span of(const int32_t* cu, const Turn& turn, int sequence) const {
    return span(cu, schedule_.order(turn.rank + sequence));
  }

 private:
  __device__ __forceinline__ int width() const { return static_cast<int>(a_.op.width); }

  const Forward& a_;
  const Schedule& schedule_;
};

// A turn whose first rows lie in shared memory. By all warps of the block: where not all keys fit, they bring them
// together.
template <class T, int D>
__device__ __forceinline__ void take_turn(const Forward& a, const Tiles<T, D>& tiles, const Turn& turn, int stage) {
  const int warps = warps_of_block(), sequence = tiles.mine(turn);
  if (sequence >= turn.count) return;  // of several sequences, which lie here whole
  const int keys = tiles.of(a.lengths.cu_k, turn, sequence).count;
  const int end = turn.count > 1 ? 1 : tiles_of(tiles.of(a.lengths.cu_q, turn, sequence).count);
  for (int start = turn.piece * warps; start < end; start += turn.pieces * warps) {
    if (start > turn.piece * warps) {
      tiles.bring_queries(turn, stage, start);
      copies_wait();
      __syncwarp();
    }
    const bool none = tiles.queries_of(turn, start).count <= 0;
    const Own<T, D, true> own(tiles.queries(stage));
    Softmax<D> state{{-FLT_MAX, -FLT_MAX}, {0, 0}, {}};
    for (int first = 0; first < keys; first += a.capacity * kRows) {
      if (!tiles.whole(turn)) {
        __syncthreads();  // the keys before are done with
        tiles.bring_keys(turn, stage, first / kRows);
        copies_wait();
        __syncthreads();
      }
      if (none) continue;
      const int count = min(keys - first, a.capacity * kRows);
      const int base = sequence * turn.tiles * Tiles<T, D>::kTile + lane_place(kStride<D>);
#pragma unroll 1
      for (int key = 0; key < count; key += kStep) {
        const int place = base + key * kStride<D>;
        add_keys<T, D>(state, own, tiles.keys(stage) + place, tiles.values(stage) + place, count - key, a.scale);
      }
    }
    const Span queries = tiles.queries_of(turn, here(start));
    if (!none) finish<T, D>(a, state, queries.first, turn.head, min(queries.count, kRows), keys == 0);
    __syncwarp();  // the tile of queries is done with
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kMostWarps<D>* kWarp, kLeastBlocks<D>)
    varlen_attention_kernel(const __grid_constant__ Forward a) {
  const Schedule schedule(a.lengths);
  const Tiles<T, D> tiles(a, schedule);
  clear_the_rest<T>(a);
  tiles.bring(schedule.turn(0), 0);
  copies_end();
  for (int round = 0; schedule.has(round); ++round) {
    const int stage = a.stages == 2 ? round % 2 : 0;
    if (a.stages == 2) {
      tiles.bring(schedule.turn(round + 1), 1 - stage);
      copies_end();
      copies_wait_but_last();
    } else {
      copies_wait();
    }
    schedule.begin(round);
    take_turn<T, D>(a, tiles, schedule.now(), stage);
    __syncthreads();  // its tiles are done with
    if (a.stages == 1) tiles.bring(schedule.turn(round + 1), 0);
  }
}

// How a launch shares its work out; returns (warps, bytes of shared memory).
template <int D>
std::pair<int, size_t> plan(Forward& a, int64_t max_q, int64_t max_k, int64_t limit) {
  const int64_t half = half_shared(limit), order = a.lengths.order;
  const auto bytes = [&](int64_t tiles, int64_t warps) {
    return order + a.stages * (2 * tiles + warps) * kRows * kStride<D> * int64_t{2};
  };
  a.stages = 1;
  int most = kMostWarps<D>;
  while (most > 1 && bytes(most, most) > most_shared(limit)) --most;
  const int queries = std::max(1, tiles_of(static_cast<int>(max_q)));
  const int longest = std::max(queries, tiles_of(static_cast<int>(max_k))), rounds = (queries + most - 1) / most;
  int warps = (queries + rounds - 1) / rounds;
  if (longest <= most) warps = most / longest * longest;
  else warps = std::max(warps, std::min(most, kLeastWarps));
  const int64_t heads = std::max<int64_t>(1, a.lengths.sequences * a.op.heads);
  a.capacity = std::max(warps, longest);
  const bool whole = bytes(a.capacity, warps) <= half;
  if (!whole) a.capacity = warps;
  a.lengths.longest = longest;
  a.lengths.pieces = whole ? static_cast<int>(std::min<int64_t>(rounds, (kTurns - 1) / heads + 1)) : rounds;
  a.stages = 2;
  if (bytes(a.capacity, warps) > half) a.stages = 1;
  return {warps, static_cast<size_t>(bytes(a.capacity, warps))};
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k, int64_t max_q,
             int64_t max_k, int64_t shared_limit, std::optional<double> scale, const Tensor& out, const Tensor& stats) {
  Forward args{};
  args.op = varlen_attention_arguments(q, k, v, scale, out, stats);
  const int64_t key_rows = k.size(0), heads = args.op.heads, width = args.op.width;
  max_q = std::min(max_q, args.op.query_rows);  // a caller may know no better than that a sequence is not longer
  max_k = std::min(max_k, key_rows);
  args.lengths = lengths(cu_q, cu_k, heads, max_q, args.op.query_rows, max_k, key_rows);
  args.scale = Scale(args.op.scale);
  args.packs = in_packs(args.op.q, width) && in_packs(args.op.k, width) && in_packs(args.op.v, width) &&
               in_packs({args.op.out, heads * width, width}, width);
  with_tile(args.op.dtype, width, [&](auto type, auto tile) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(tile)::value;
    const auto [warps, bytes] = plan<D>(args, max_q, max_k, shared_limit);
    launch_turns("varlen_attention_kernel", varlen_attention_kernel<T, D>, args.lengths, warps, bytes,
                 stream_of(q), args);
  });
}

}  // namespace

void bind_varlen_attention_backward(pybind11::module_& module);  // varlen_attention_backward_cuda.cu

void bind_varlen_attention(pybind11::module_& module) {
  bind(module, "varlen_attention", forward, {"q", "k", "v", "cu_q", "cu_k", "max_q", "max_k", "shared_limit", "scale",
       "out", "stats"});
  bind_varlen_attention_backward(module);
}

}  // namespace m3ae::cuda
