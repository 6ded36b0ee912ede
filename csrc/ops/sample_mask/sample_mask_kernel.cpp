// sample_mask: samples [begin, end). Pure: no threads, no allocation.
#include "ops/sample_mask/sample_mask.h"

#include "cpu/vec.h"
#include "philox.h"

namespace m3ae::M3AE_ISA {
namespace {

// words[position] for whole blocks. One counter gives four positions; the compiler vectorizes over counters.
void draw(const SampleMask& a, int64_t sample_id, int64_t blocks, uint32_t* words) {
  constexpr int counters = kSampleMaskBlock / 4;
  const uint32_t key0 = static_cast<uint32_t>(a.seed), key1 = static_cast<uint32_t>(a.seed >> 32);
  const uint32_t id = static_cast<uint32_t>(sample_id);
  const uint32_t stream = a.stream | static_cast<uint32_t>(sample_id >> 32) << 8;
  for (int64_t block = 0; block < blocks; ++block) {
    const uint32_t first = static_cast<uint32_t>(block) * counters;
    uint32_t* out = words + block * kSampleMaskBlock;
    for (uint32_t j = 0; j < counters; ++j) {
      const Philox4 four = philox4x32({first + j, id, stream, a.step}, key0, key1);
      out[4 * j] = four.x;
      out[4 * j + 1] = four.y;
      out[4 * j + 2] = four.z;
      out[4 * j + 3] = four.w;
    }
  }
}

int64_t count_below(const uint32_t* words, int64_t padded, uint32_t limit) {
  uint32_t count = 0;  // as wide as a word, so that vectors of both match
  for (int64_t i = 0; i < padded; ++i) count += words[i] < limit;
  return count;
}

// The words to keep: those below `limit`, and the first `ties` of those equal to it.
struct Selection {
  uint32_t limit;
  int64_t ties;
};

// Bisection by counting, until `keep` words lie below a limit: about log2(padded) passes over words in the cache.
// Only where equal words straddle the limit does it run all 32.
Selection select(const uint32_t* words, int64_t padded, int64_t keep) {
  uint64_t low = 0, high = uint64_t{1} << 32;
  int64_t below_low = 0;  // never more than keep
  while (below_low != keep && high - low > 1) {
    const uint64_t middle = (low + high) / 2;
    const int64_t below = count_below(words, padded, static_cast<uint32_t>(middle));
    if (below <= keep) {
      low = middle;
      below_low = below;
    } else {
      high = middle;
    }
  }
  return {static_cast<uint32_t>(low), keep - below_low};
}

void split(const uint32_t* words, int64_t length, Selection selection, int32_t* ids_keep, int32_t* ids_mask) {
  for (int64_t i = 0; i < length; ++i) {
    const bool tie = words[i] == selection.limit && selection.ties > 0;
    selection.ties -= tie;
    const bool keep = words[i] < selection.limit || tie;
    *(keep ? ids_keep : ids_mask) = static_cast<int32_t>(i);
    ids_keep += keep;
    ids_mask += !keep;
  }
}

}  // namespace

void sample_mask(const SampleMask& a, uint32_t* words, int64_t begin, int64_t end) {
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t length = a.cu[sample + 1] - a.cu[sample];
    const int64_t keep = a.cu_keep[sample + 1] - a.cu_keep[sample];
    const int64_t blocks = (length + kSampleMaskBlock - 1) / kSampleMaskBlock, padded = blocks * kSampleMaskBlock;
    draw(a, a.sample_ids[sample], blocks, words);
    for (int64_t i = length; i < padded; ++i) words[i] = 0xffffffffu;  // below no limit
    split(words, length, select(words, padded, keep), a.ids_keep + a.cu_keep[sample],
          a.ids_mask + a.cu[sample] - a.cu_keep[sample]);
  }
}

}  // namespace m3ae::M3AE_ISA
