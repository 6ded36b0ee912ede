// Which sequences a block takes, turn by turn: the longest first, several short ones together.
//
// Every block sorts the lengths for itself, in shared memory, so that nothing is launched or stored for it. A class is
// the sequences with the same number of tiles of sixteen rows (of queries or keys, whichever are more); where several
// fit a block's warps, a turn takes several. Turns are dealt to the blocks to and fro (0 1 2, 2 1 0, 0 1 2 ...): who
// had the longest has the shortest next.
#pragma once

#include "cuda/reduce.cuh"

namespace m3ae::cuda {

constexpr int kRows = 16;             // of a tile
constexpr int kClasses = 2 * kWarp;   // number k: of kClasses - 1 - k tiles; the first also of more
constexpr int kMostSorted = 1 << 13;  // sequences, two bytes each

__host__ __device__ __forceinline__ int tiles_of(int rows) { return (rows + kRows - 1) / kRows; }
__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int warps_of_block() { return static_cast<int>(blockDim.x) / kWarp; }
__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x % kWarp); }

// Rows of a sequence.
struct Span {
  int first, count;
};
__device__ __forceinline__ Span span(const int32_t* cu, int sequence) {
  return {cu[sequence], cu[sequence + 1] - cu[sequence]};
}

struct Lengths {
  const int32_t *cu_q, *cu_k;
  int sequences, heads;
  int longest;  // tiles of the longest sequence
  int pieces;   // turns that share the queries of one sequence, at most
  int order;    // bytes that the order takes, first of a block's dynamic shared memory; 0: every sequence is taken for
                // one of the longest, in the order that they have
};

struct Turn {
  int rank, count;  // its sequences: order(rank) to order(rank + count - 1); count 0: there are no more turns
  int tiles;        // of each, at most; several sequences together have no more than the block has warps
  int head, piece, pieces;
  int round;
};

class Schedule {
 public:
  // Writes to warps * kClasses words of shared memory behind the order, too.
  __device__ __forceinline__ explicit Schedule(const Lengths& a) : a_(a) {
    int* counts = reinterpret_cast<int*>(dynamic_shared<unsigned char>() + a.order);
    for (int i = static_cast<int>(threadIdx.x); i < warps_of_block() * kClasses; i += static_cast<int>(blockDim.x))
      counts[i] = 0;
    __syncthreads();
    if (a.order > 0)
      for_classes(counts, [](int, int) {});
    else if (threadIdx.x == 0)
      counts[kClasses - 1 - min(a.longest, kClasses - 1)] = a.sequences;
    __syncthreads();
    if (threadIdx.x < kWarp) number(counts);
    __syncthreads();
    if (a.order > 0)
      for_classes(counts, [&](int rank, int sequence) { order()[rank] = static_cast<uint16_t>(sequence); });
    __syncthreads();
  }

  __device__ __forceinline__ int order(int rank) const { return a_.order > 0 ? order()[rank] : rank; }

  // This block's turn in a round. By a whole warp.
  __device__ __forceinline__ Turn turn(int round) const {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int64_t number = int64_t{round} * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
    Turn turn{};
    turn.round = round;
    if (number >= table().turns[kClasses]) return turn;
    const int at = static_cast<int>(number), lane = lane_of_warp();
    const int k = __popc(__ballot_sync(kAllLanes, table().turns[lane] <= at)) +
                  __popc(__ballot_sync(kAllLanes, table().turns[lane + kWarp] <= at)) - 1;
    turn.pieces = pieces(k);
    const int place = at - table().turns[k], rest = place / turn.pieces, together = this->together(k);
    turn.piece = place % turn.pieces;
    turn.head = rest % a_.heads;
    turn.rank = table().first[k] + rest / a_.heads * together;
    turn.count = min(together, table().first[k + 1] - turn.rank);
    turn.tiles = k == 0 ? tiles(order(turn.rank)) : kClasses - 1 - k;
    return turn;
  }

  // A barrier, after which now() is this block's turn: in shared memory, for registers are short where it is worked on.
  __device__ __forceinline__ void begin(int round) const {
    if (threadIdx.x < kWarp) keep(turn(round));
    __syncthreads();
  }
  __device__ __forceinline__ void next() const {
    if (threadIdx.x < kWarp) keep(turn(now().round + 1));
    __syncthreads();
  }
  __device__ __forceinline__ const Turn& now() const { return shared_turn(); }

  // Rounds end where the first block of one has no turn; blocks of the last may have none earlier.
  __device__ __forceinline__ bool has(int round) const {
    return int64_t{round} * gridDim.x < table().turns[kClasses];
  }

 private:
  struct Table {
    int first[kClasses + 1];  // rank of a class's first sequence
    int turns[kClasses + 1];  // before a class's first
  };

  __device__ __forceinline__ static Table& table() {
    __shared__ Table table;
    return table;
  }
  static_assert(sizeof(Table) + sizeof(Turn) <= kStaticShared);

  __device__ __forceinline__ static uint16_t* order() { return dynamic_shared<uint16_t>(); }
  __device__ __forceinline__ static void keep(const Turn& turn) {
    __syncwarp();  // all have read the one before
    if (threadIdx.x == 0) shared_turn() = turn;
  }
  __device__ __forceinline__ static Turn& shared_turn() {
    __shared__ Turn turn;
    return turn;
  }

  __device__ __forceinline__ int tiles(int sequence) const {
    return tiles_of(max(span(a_.cu_q, sequence).count, span(a_.cu_k, sequence).count));
  }
  __device__ __forceinline__ int together(int k) const { return max(1, warps_of_block() / max(1, kClasses - 1 - k)); }
  __device__ __forceinline__ int pieces(int k) const {
    return k == 0 ? a_.pieces : max(1, min(a_.pieces, (kClasses - 2 - k + warps_of_block()) / warps_of_block()));
  }

  // Counts a warp's share of the sequences by class: counts[warp][k] goes on by one for each, from where it stands, and
  // each(where it stood, sequence). Sequences keep their order in a class, so that all blocks agree.
  template <class Each>
  __device__ __forceinline__ void for_classes(int* counts, Each&& each) const {
    const int warp = warp_of_block(), lane = lane_of_warp();
    const int share = (a_.sequences + warps_of_block() - 1) / warps_of_block(), begin = warp * share;
    const int end = min(begin + share, a_.sequences);
    for (int start = begin; start < end; start += kWarp) {
      const int sequence = start + lane;
      const int k = sequence < end ? kClasses - 1 - min(tiles(sequence), kClasses - 1) : -1;
      const unsigned peers = __match_any_sync(kAllLanes, k);
      const int before = __popc(peers & ((1u << lane) - 1));
      int& count = counts[warp * kClasses + max(k, 0)];
      if (k >= 0) each(count + before, sequence);
      __syncwarp();
      if (k >= 0 && before == 0) count += __popc(peers);
      __syncwarp();
    }
  }

  // From how many sequences of a class each warp has to the ranks of the first of them, and the table. By one warp, two
  // classes a lane.
  __device__ __forceinline__ void number(int* counts) const {
    const int lane = lane_of_warp();
    int of[2] = {}, turns[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = 2 * lane + i;
      for (int w = 0; w < warps_of_block(); ++w) of[i] += counts[w * kClasses + k];
      const int groups = (of[i] + together(k) - 1) / together(k);
      turns[i] = k == kClasses - 1 ? 0 : groups * pieces(k) * a_.heads;  // without rows there is nothing to do
    }
    const int both = of[0] + of[1], turns_of_both = turns[0] + turns[1];
    int rank = warp_scan(both) - both, turn = warp_scan(turns_of_both) - turns_of_both;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = 2 * lane + i;
      table().first[k] = rank;
      table().turns[k] = turn;
      int next = rank;
      for (int w = 0; w < warps_of_block(); ++w) {
        const int mine = counts[w * kClasses + k];
        counts[w * kClasses + k] = next;
        next += mine;
      }
      rank += of[i];
      turn += turns[i];
      if (k < kClasses - 1) continue;
      table().first[kClasses] = rank;
      table().turns[kClasses] = turn;
    }
  }

  const Lengths& a_;
};

}  // namespace m3ae::cuda
