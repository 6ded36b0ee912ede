// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11):
// four random words that depend on counter and key alone, so every machine and every order of work draws the same.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace m3ae {

struct Philox4 {
  uint32_t x, y, z, w;
};

M3AE_HOST_DEVICE Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.x;
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter.z;
    counter = {static_cast<uint32_t>(b >> 32) ^ counter.y ^ key0, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter.w ^ key1, static_cast<uint32_t>(a)};
    key0 += 0x9E3779B9u;  // the golden ratio and sqrt(3) - 1
    key1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace m3ae
