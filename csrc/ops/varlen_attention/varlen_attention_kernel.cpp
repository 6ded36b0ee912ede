// varlen_attention: one task (a sequence and a head). Pure: no threads, no allocation.
#include "ops/varlen_attention/varlen_attention.h"

#include <limits>

#include "cpu/gemm.h"
#include "cpu/whole_sum.h"

namespace m3ae::M3AE_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634;

// Hands out 64-byte aligned pieces of the workspace; workspace_bytes is the sum of them.
struct Arena {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

template <class T>
const T* head_rows(const HeadRows& x, int64_t row, int64_t head) { return as<T>(x.data) + row * x.row + head * x.head; }
template <class T>
T* head_rows_out(const HeadRows& x, int64_t row, int64_t head) { return as<T>(x.data) + row * x.row + head * x.head; }

// The head to come, for prefetching: the next of this task, or the first of a task that this thread may get next.
struct Upcoming {
  const AttentionTask* task;  // null: unknown
  int64_t head;
};

// A share (part of parts) of rows [first, first + count) of the head to come. A head's rows are too far apart for the
// hardware to see a pattern, and packing them would wait for memory row by row. (The backward pass works long enough on
// what it reads that this gains nothing there: measured.)
template <class T, int write = 0>
M3AE_INLINE void prefetch(const HeadRows& x, int64_t first, int64_t count, int64_t head, int64_t width, int64_t part,
                          int64_t parts) {
  for (int64_t r = count * part / parts; r < count * (part + 1) / parts; ++r) {
    const char* row = as<char>(x.data) + ((first + r) * x.row + head * x.head) * static_cast<int64_t>(sizeof(T));
    for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(T)); byte += 64)
      __builtin_prefetch(row + byte, write, 2);
  }
}

template <class V>
M3AE_INLINE int64_t lanes_for(int64_t n) { return round_up(n, V::width); }
// Rows of a matrix that is read down its columns: an odd number of vectors, lest a column fall in few cache sets.
template <class V>
M3AE_INLINE int64_t spread(int64_t lanes) { return (lanes / V::width | 1) * V::width; }

// to[d] = from[d] * factor
template <class V, class T>
M3AE_INLINE void write_row(const typename V::scalar* from, typename V::scalar factor, T* to, int64_t width) {
  for_lanes<V>(width, [&](int64_t d, int n) { store_rounded(V::load(from + d) * V::set(factor), to + d, n); });
}
template <class V, class T>
void write_zeros(T* to, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r)
    for_lanes<V>(width, [&](int64_t d, int n) { store_lanes(V::zero(), to + r * stride + d, n); });
}

// Weights are 2^((score - peak) * scale * log2 e): the difference comes first, and is exact where it matters, however
// large the scores are. It is taken of halves, which no two scores are too far apart for, and the factor makes up for it.
template <class Float>
M3AE_INLINE Float factor_of_halves(double scale) { return static_cast<Float>(2 * scale * kLog2e); }

// Where the scale is negative the lowest score weighs most: queries are negated, and scores are compared as ever.
template <class U>
void negate(U* units, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (Units<U>::depth == 2) units[i].low.bits ^= 0x8000u, units[i].high.bits ^= 0x8000u;
    else units[i] = -units[i];
  }
}

// What the softmax of each query has come to.
template <class Float>
struct Running {
  Float* largest;  // score, with the sign of the scale
  Float* total;    // of the weights
  Float* rescale;  // what sums from before the last block of keys must be multiplied with
  Float* partial;  // [rows][a vector]: scratch
};

// A score that passed the lowest number on its way is minus infinity: where the whole sum is above that, the key's weight
// is not 0 but unknown, and the score becomes NaN.
template <class T, class Float>
__attribute__((noinline)) void forget_lost_scores(Float* scores, int64_t ld, int64_t rows, int64_t keys, const T* q,
                                                  int64_t q_row, const T* k, int64_t k_row, int64_t width,
                                                  double scale) {
  constexpr Float infinity = std::numeric_limits<Float>::infinity();
  for (int64_t r = 0; r < rows; ++r) {
    Float* row = scores + r * ld;
    bool lost = false;  // one NaN, or an infinite score, is enough for a row
    for (int64_t j = 0; j < keys; ++j) lost = lost || !(row[j] < infinity);
    for (int64_t j = 0; j < keys && !lost; ++j) {
      if (row[j] != -infinity) continue;
      const double sum = whole_sum(0, width, [&](int64_t d) { return value_at(q + r * q_row + d); },
                                   [&](int64_t d) { return value_at(k + j * k_row + d); });
      lost = (scale < 0 ? -sum : sum) >= std::numeric_limits<Float>::lowest();
      if (lost) row[j] = std::numeric_limits<Float>::quiet_NaN();
    }
  }
}

// Rows of scores become weights, in place, as units. The reductions along a row end in one vector for each, and are
// finished for a vector of rows at once: one row at a time would wait for its own chain. forget_lost() looks after
// infinitely low scores.
template <class Unit, class Float, class ForgetLost>
void softmax_rows(Float* scores, int64_t ld, int64_t rows, int64_t keys, double scale, const Running<Float>& state,
                  const ForgetLost& forget_lost) {
  using V = typename Units<Unit>::V;
  const V half = V::set(Float(0.5)), factor = V::set(factor_of_halves<Float>(scale < 0 ? -scale : scale));
  const V lowest = V::set(-std::numeric_limits<Float>::infinity());
  V deepest = V::zero();
  const auto find_largest = [&] {
    for (int64_t r = 0; r < rows; ++r) {
      V most = lowest;
      for_lanes<V>(keys, [&](int64_t j, int n) {
        const V score = V::load(scores + r * ld + j);
        most = V::max(most, n == V::width ? score : score.first_or(n, lowest));
        const V depth = V::zero() - (n == V::width ? score : score.first_or(n, V::zero()));
        deepest = V::max(depth, deepest);  // in this order: NaN does not replace what was found before
      });
      most.store(state.partial + r * V::width);
    }
  };
  find_largest();
  if (!(deepest.sum() < std::numeric_limits<Float>::infinity())) forget_lost(), find_largest();
  for_lanes<V>(rows, [&](int64_t r, int n) {
    const V before = load_lanes<V>(state.largest + r, n);
    const V now = V::max(before, across<V>(state.partial + r * V::width, [](V x, V y) { return V::max(x, y); }));
    store_lanes(exp2((before * half - now * half) * factor), state.rescale + r, n);
    store_lanes(now, state.largest + r, n);
  });
  for (int64_t r = 0; r < rows; ++r) {
    const V shift = V::set(Float(-0.5) * state.largest[r]);
    V sum = V::zero();
    for_lanes<V>(keys, [&](int64_t j, int n) {
      V power = V::fma(V::load(scores + r * ld + j), half, shift) * factor;
      if (n != V::width) power = power.first_or(n, lowest);  // lanes past the last key weigh 0
      const V weight = exp2(power);
      sum = sum + weight;
      store_unit_elements(weight, reinterpret_cast<Unit*>(scores + r * ld) + j / Units<Unit>::depth);
    });
    sum.store(state.partial + r * V::width);
  }
  for_lanes<V>(rows, [&](int64_t r, int n) {
    const V sum = across<V>(state.partial + r * V::width, [](V x, V y) { return x + y; });
    const V before = load_lanes<V>(state.total + r, n), rescale = load_lanes<V>(state.rescale + r, n);
    store_lanes(V::fma(before, rescale, sum), state.total + r, n);
  });
}

template <class T>
void forward(const VarlenAttention& a, const AttentionTask& t, int64_t head, Upcoming next, void* workspace) {
  using U = Unit<T>;
  using V = typename Units<U>::V;
  using Float = typename V::scalar;
  constexpr int depth = Units<U>::depth;
  const int64_t width = a.width, steps = (width + depth - 1) / depth, lanes = lanes_for<V>(width);
  const int64_t row_units = lanes_for<V>(steps);
  const T* q = head_rows<T>(a.q, t.query, head);
  const T* k = head_rows<T>(a.k, t.key, head / a.groups);
  const T* v = head_rows<T>(a.v, t.key, head / a.groups);
  T* out = as<T>(a.out) + (t.query * a.heads + head) * width;
  Float* peak = as<Float>(a.stats) + head * a.query_rows + t.query;
  Float* log_total = peak + a.heads * a.query_rows;

  Arena arena{static_cast<char*>(workspace)};
  U* keys_t = arena.take<U>(steps * spread<V>(kKeyBlock));
  U* values = arena.take<U>(kKeyBlock / depth * lanes);
  U* queries = arena.take<U>(kRowBlock * row_units);
  constexpr int64_t least = round_up(kTileRows, kWholeRows<U>), most = kRowBlock / least * least;  // rows of scores
  Float* scores = arena.take<Float>(kScores + least * spread<V>(kKeyBlock));
  Float* sums = arena.take<Float>(kQueryBlock * lanes);
  Float* running = arena.take<Float>(3 * kQueryBlock);
  const Running<Float> all{running, running + kQueryBlock, running + 2 * kQueryBlock,
                           arena.take<Float>(kRowBlock * V::width)};

  if (t.keys == 0) {
    write_zeros<V>(out, a.heads * width, t.queries, width);
    for (int64_t i = 0; i < t.queries; ++i) peak[i] = 0, log_total[i] = -std::numeric_limits<Float>::infinity();
    return;
  }
  for (int64_t i = 0; i < t.queries; ++i) {
    all.largest[i] = std::numeric_limits<Float>::lowest();
    all.total[i] = 0;
  }
  const int64_t key_blocks = (t.keys + kKeyBlock - 1) / kKeyBlock;
  for (int64_t block = 0; block < key_blocks; ++block) {
    const int64_t key = share_begin<U>(t.keys, block, key_blocks);
    const int64_t keys = share_begin<U>(t.keys, block + 1, key_blocks) - key;
    const int64_t key_lanes = lanes_for<V>(keys), ld = spread<V>(key_lanes);
    const int64_t fit = kScores / ld / least * least;
    const int64_t row_block = fit < least ? least : fit < most ? fit : most;
    const int64_t row_blocks = (t.queries + row_block - 1) / row_block;
    pack_columns(k + key * a.k.row, a.k.row, keys, width, keys_t, ld);
    pack_steps(v + key * a.v.row, a.v.row, keys, width, values, lanes);
    for (int64_t rows_block = 0; rows_block < row_blocks; ++rows_block) {
      const int64_t row = share_begin<U>(t.queries, rows_block, row_blocks);
      const int64_t rows = share_begin<U>(t.queries, rows_block + 1, row_blocks) - row;
      const int64_t tile_rows = round_up(rows, kTileHeight<U>);  // what is behind the last row is used nowhere
      if (next.task && block == 0) {
        const AttentionTask& n = *next.task;
        prefetch<T>(a.q, n.query, n.queries, next.head, width, rows_block, row_blocks);
        prefetch<T>(a.k, n.key, n.keys, next.head / a.groups, width, rows_block, row_blocks);
        prefetch<T>(a.v, n.key, n.keys, next.head / a.groups, width, rows_block, row_blocks);
        prefetch<T, 1>({a.out, a.heads * width, width}, n.query, n.queries, next.head, width, rows_block, row_blocks);
      }
      Float* sum = key_blocks == 1 ? sums : sums + row * lanes;  // one block: its rows are finished at once
      pack_rows(q + row * a.q.row, a.q.row, rows, width, queries, row_units);
      if (a.scale < 0) negate(queries, rows * row_units);
      multiply<U>({queries, row_units, 1, keys_t, ld, scores, ld, steps, false}, tile_rows, key_lanes);
      const Running<Float> state{all.largest + row, all.total + row, all.rescale + row, all.partial};
      softmax_rows<U>(scores, ld, rows, keys, a.scale, state, [&] {
        forget_lost_scores(scores, ld, rows, keys, q + row * a.q.row, a.q.row, k + key * a.k.row, a.k.row, width,
                           a.scale);
      });
      for (int64_t i = 0; i < rows && block > 0; ++i)
        write_row<V>(sum + i * lanes, state.rescale[i], sum + i * lanes, lanes);
      const U* weights = reinterpret_cast<U*>(scores);
      multiply<U>({weights, ld, 1, values, lanes, sum, lanes, (keys + depth - 1) / depth, block > 0}, tile_rows, lanes);
      if (block + 1 < key_blocks) continue;
      for (int64_t i = 0; i < rows; ++i)
        write_row<V>(sum + i * lanes, 1 / state.total[i], out + (row + i) * a.heads * width, width);
      for (int64_t i = 0; i < rows; ++i) {
        peak[row + i] = a.scale < 0 ? -state.largest[i] : state.largest[i];
        log_total[row + i] = std::log2(state.total[i]);
      }
    }
  }
}

// Queries of one block, packed for the four products that read them.
template <class U, class Float>
struct QueryBlock {
  U *q_t, *dout_t;  // [width][ld]: lanes are queries
  U *q, *dout;      // [queries][lanes]: contracted along the queries
  Float *minus_half_peak, *minus_log_total, *delta;
  int64_t count, ld;
};

// delta[i] = dout[i] . out[i], added up as products are: where one key has all the weight, out is its value, and
// dweight - delta is then exactly 0. room: for [width][ld] units.
template <class T, class U, class Float>
void multiply_rows(const T* out, int64_t stride, int64_t width, const QueryBlock<U, Float>& b, Float* room) {
  using V = typename Units<U>::V;
  const int64_t steps = (width + Units<U>::depth - 1) / Units<U>::depth;
  U* units = reinterpret_cast<U*>(room);
  if constexpr (kDenseLeft<U>) {  // tiles add up in an order of their own: the diagonals of their products
    const int64_t row_units = lanes_for<V>(steps);
    Float* square = room + V::width * row_units;
    for (int64_t i = 0; i < b.count; i += V::width) {
      const int64_t rows = b.count - i < V::width ? b.count - i : V::width;
      pack_rows(out + i * stride, stride, rows, width, units, row_units);
      multiply<U>({units, row_units, 1, b.dout_t + i, b.ld, square, V::width, steps, false}, V::width, V::width);
      for (int64_t r = 0; r < rows; ++r) b.delta[i + r] = square[r * (V::width + 1)];
    }
  } else {
    pack_columns(out, stride, b.count, width, units, b.ld);
    for (int64_t i = 0; i < b.count; i += V::width) {
      V sum = V::zero();
      for (int64_t s = 0; s < steps; ++s)
        sum = Units<U>::dot(Units<U>::load(units + s * b.ld + i), Units<U>::load(b.dout_t + s * b.ld + i), sum);
      sum.store(b.delta + i);
    }
  }
}

// delta = dout . out - dlse; lanes past the last query weigh 0.
template <class T, class U, class Float>
void pack_queries(const VarlenAttentionBackward& a, int64_t row, int64_t head, QueryBlock<U, Float>& b, int64_t lanes,
                  Float* room) {
  using V = typename Units<U>::V;
  const T* q = head_rows<T>(a.q, row, head);
  const T* dout = head_rows<T>(a.dout, row, head);
  const T* out = as<T>(a.out) + (row * a.heads + head) * a.width;
  const int64_t at = head * a.query_rows + row;
  const Float *peak = as<Float>(a.stats) + at, *log_total = peak + a.heads * a.query_rows;
  const Float* dlse = a.dlse ? as<Float>(a.dlse) + at : nullptr;
  b.ld = spread<V>(lanes_for<V>(b.count));
  pack_columns(q, a.q.row, b.count, a.width, b.q_t, b.ld);
  pack_columns(dout, a.dout.row, b.count, a.width, b.dout_t, b.ld);
  pack_steps(q, a.q.row, b.count, a.width, b.q, lanes);
  pack_steps(dout, a.dout.row, b.count, a.width, b.dout, lanes);
  multiply_rows(out, a.heads * a.width, a.width, b, room);
  for (int64_t i = 0; i < b.count; ++i) {
    if (dlse) b.delta[i] -= dlse[i];
    b.minus_half_peak[i] = Float(-0.5) * peak[i];
    b.minus_log_total[i] = -log_total[i];
  }
  for (int64_t i = b.count; i < b.ld; ++i) {
    b.delta[i] = b.minus_half_peak[i] = 0;
    b.minus_log_total[i] = -std::numeric_limits<Float>::infinity();
  }
}

// Rows of scores and of dweights (keys x queries) become weights p and dscores p (dp - delta), in place, as units of
// `a` along the queries; pairs[r / 2] also holds dscores as units along the keys.
template <class U, class Float>
M3AE_INLINE void score_gradients(Float* scores, Float* dweights, U* pairs, int64_t rows, const QueryBlock<U, Float>& b,
                                 double scale) {
  using V = typename Units<U>::V;
  constexpr int depth = Units<U>::depth;
  const V half = V::set(Float(0.5)), factor = V::set(factor_of_halves<Float>(scale));
  const int64_t lanes = lanes_for<V>(b.count);
  for (int64_t r = 0; r < rows; r += depth) {
    for (int64_t i = 0; i < lanes; i += V::width) {
      const V shift = V::load(b.minus_half_peak + i), share = V::load(b.minus_log_total + i);
      const V delta = V::load(b.delta + i);
      V dscores[depth];
      for (int e = 0; e < depth; ++e) {
        if (r + e >= rows) {  // the partner of the last key of an odd number
          dscores[e] = V::zero();
          continue;
        }
        Float *score = scores + (r + e) * b.ld, *dweight = dweights + (r + e) * b.ld;
        const V weight = Units<U>::exp2(V::fma(V::fma(V::load(score + i), half, shift), factor, share));
        dscores[e] = weight * (V::load(dweight + i) - delta);
        store_unit_elements(weight, reinterpret_cast<U*>(score) + i / depth);
        store_unit_elements(dscores[e], reinterpret_cast<U*>(dweight) + i / depth);
      }
      if constexpr (depth == 2) store_pairs(dscores[0], dscores[1], pairs + r / 2 * b.ld + i);
    }
  }
  (void)pairs;
}

template <class T>
void backward(const VarlenAttentionBackward& a, const AttentionTask& t, int64_t key_head, void* workspace) {
  using U = Unit<T>;
  using V = typename Units<U>::V;
  using Float = typename V::scalar;
  constexpr int depth = Units<U>::depth;
  const int64_t width = a.width, steps = (width + depth - 1) / depth, lanes = lanes_for<V>(width);
  const int64_t row_units = lanes_for<V>(steps);
  const int64_t most_lanes = spread<V>(kGradQueryBlock), key_rows = round_up(t.keys, kTileHeight<U>);
  constexpr int64_t row_block = round_up(kGradRowBlock, kWholeRows<U>);
  const T* k = head_rows<T>(a.k, t.key, key_head);
  const T* v = head_rows<T>(a.v, t.key, key_head);
  T* dk = head_rows_out<T>(a.dk, t.key, key_head);
  T* dv = head_rows_out<T>(a.dv, t.key, key_head);

  Arena arena{static_cast<char*>(workspace)};
  QueryBlock<U, Float> b{};
  b.q_t = arena.take<U>(steps * most_lanes);
  b.dout_t = arena.take<U>(steps * most_lanes);
  b.q = arena.take<U>(kGradQueryBlock / depth * lanes);
  b.dout = arena.take<U>(kGradQueryBlock / depth * lanes);
  b.minus_half_peak = arena.take<Float>(most_lanes);
  b.minus_log_total = arena.take<Float>(most_lanes);
  b.delta = arena.take<Float>(most_lanes);
  U* k_rows = arena.take<U>(kGradKeyBlock * row_units);
  U* v_rows = arena.take<U>(kGradKeyBlock * row_units);
  U* k_steps = arena.take<U>((kGradKeyBlock + 1) / depth * lanes);
  Float* scores = arena.take<Float>(row_block * most_lanes);
  Float* dscores = arena.take<Float>((depth == 1 ? kGradKeyBlock : row_block) * most_lanes);
  U* dscore_pairs = arena.take<U>(depth == 1 ? 0 : kGradKeyBlock / depth * most_lanes);
  Float* dq_sum = arena.take<Float>(most_lanes * lanes);
  Float* dk_sum = arena.take<Float>(key_rows * lanes);
  Float* dv_sum = arena.take<Float>(key_rows * lanes);

  const Float scale = static_cast<Float>(a.scale);
  const int64_t query_blocks = (t.queries + kGradQueryBlock - 1) / kGradQueryBlock;
  const int64_t key_blocks = (t.keys + kGradKeyBlock - 1) / kGradKeyBlock;
  bool accumulate = false;
  for (int64_t head = key_head * a.groups; head < (key_head + 1) * a.groups; ++head) {
    if (t.keys == 0) write_zeros<V>(head_rows_out<T>(a.dq, t.query, head), a.dq.row, t.queries, width);
    for (int64_t query_block = 0; query_block < query_blocks && t.keys > 0; ++query_block) {
      const int64_t first = t.queries * query_block / query_blocks;
      b.count = t.queries * (query_block + 1) / query_blocks - first;
      pack_queries<T>(a, t.query + first, head, b, lanes, dq_sum);
      const int64_t query_steps = (b.count + depth - 1) / depth, query_lanes = lanes_for<V>(b.count);
      for (int64_t block = 0; block < key_blocks; ++block) {
        const int64_t key = share_begin<U>(t.keys, block, key_blocks);
        const int64_t keys = share_begin<U>(t.keys, block + 1, key_blocks) - key;
        pack_rows(k + key * a.k.row, a.k.row, keys, width, k_rows, row_units);
        pack_rows(v + key * a.v.row, a.v.row, keys, width, v_rows, row_units);
        if (depth > 1) pack_steps(k + key * a.k.row, a.k.row, keys, width, k_steps, lanes);
        for (int64_t r = 0; r < keys; r += row_block) {
          const int64_t rows = keys - r < row_block ? keys - r : row_block;
          const int64_t tile_rows = round_up(rows, kTileHeight<U>);
          Float* dscore_rows = depth == 1 ? dscores + r * b.ld : dscores;  // pairs: kept in dscore_pairs instead
          multiply<U>({k_rows + r * row_units, row_units, 1, b.q_t, b.ld, scores, b.ld, steps, false}, tile_rows,
                      query_lanes);
          multiply<U>({v_rows + r * row_units, row_units, 1, b.dout_t, b.ld, dscore_rows, b.ld, steps, false},
                      tile_rows, query_lanes);
          score_gradients<U>(scores, dscore_rows, dscore_pairs + r / depth * b.ld, rows, b, a.scale);
          Float *dv_rows = dv_sum + (key + r) * lanes, *dk_rows = dk_sum + (key + r) * lanes;
          multiply<U>({reinterpret_cast<U*>(scores), b.ld, 1, b.dout, lanes, dv_rows, lanes, query_steps, accumulate},
                      tile_rows, lanes);
          multiply<U>({reinterpret_cast<U*>(dscore_rows), b.ld, 1, b.q, lanes, dk_rows, lanes, query_steps, accumulate},
                      tile_rows, lanes);
        }
        const U* along_keys = depth == 1 ? reinterpret_cast<U*>(dscores) : dscore_pairs;
        multiply<U>({along_keys, 1, b.ld, depth == 1 ? k_rows : k_steps, lanes, dq_sum, lanes,
                     (keys + depth - 1) / depth, block > 0}, round_up(b.count, kTileHeight<U>), lanes);
      }
      accumulate = true;
      T* dq = head_rows_out<T>(a.dq, t.query + first, head);
      for (int64_t i = 0; i < b.count; ++i) write_row<V>(dq_sum + i * lanes, scale, dq + i * a.dq.row, width);
    }
  }
  if (!accumulate) {  // no queries
    write_zeros<V>(dk, a.dk.row, t.keys, width);
    write_zeros<V>(dv, a.dv.row, t.keys, width);
    return;
  }
  for (int64_t j = 0; j < t.keys; ++j) {
    write_row<V>(dk_sum + j * lanes, scale, dk + j * a.dk.row, width);
    write_row<V>(dv_sum + j * lanes, Float(1), dv + j * a.dv.row, width);
  }
}

}  // namespace

void varlen_attention(const VarlenAttention& a, const AttentionTask& t, const AttentionTask* next, void* workspace) {
  with_element(a.dtype, [&](auto element) {
    const Multiplying<Unit<decltype(element)>> multiplying;
    for (int64_t head = t.head; head < t.head + t.heads; ++head) {
      const bool last = head + 1 == t.head + t.heads;
      const Upcoming upcoming = last ? Upcoming{next, next ? next->head : 0} : Upcoming{&t, head + 1};
      forward<decltype(element)>(a, t, head, upcoming, workspace);
    }
  });
}

void varlen_attention_backward(const VarlenAttentionBackward& a, const AttentionTask& t, void* workspace) {
  with_element(a.dtype, [&](auto element) {
    const Multiplying<Unit<decltype(element)>> multiplying;
    for (int64_t head = t.head; head < t.head + t.heads; ++head) backward<decltype(element)>(a, t, head, workspace);
  });
}

}  // namespace m3ae::M3AE_ISA
