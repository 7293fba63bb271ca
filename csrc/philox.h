// Philox4x32-10 (Salmon et al., SC 2011), for the CPU and the GPU, and the words that it draws for tensor elements.
#pragma once

#include <cstdint>

// Always inlined, so that no instruction set's copy of a function is linked into the code of another.
#ifdef __CUDACC__
#define ESAM_HOST_DEVICE __host__ __device__ __forceinline__
#define ESAM_UNROLL _Pragma("unroll")
#else
#define ESAM_HOST_DEVICE __attribute__((always_inline)) inline
#define ESAM_UNROLL _Pragma("GCC unroll 10")
#endif

namespace esam {

// What a counter is drawn for, numbered as in reference.py.
enum class Stream : uint32_t { kElement = 1, kRounding = 2 };

// Everything random that an operator needs: reference.py's ElementMask without its lists.
struct ElementMask {
  uint64_t seed;
  uint32_t step;
  bool present;        // whether there are bits at all: without them sums round to nearest
  uint64_t threshold;  // an element is kept iff its word is below this; 2^32 keeps all

  ESAM_HOST_DEVICE bool masked() const { return present && threshold < (uint64_t{1} << 32); }
};

// Four words for the group of elements 4 * group, ..., 4 * group + 3 of one tensor.
ESAM_HOST_DEVICE void element_words(const ElementMask& mask, Stream stream, uint32_t tensor_id, uint64_t group,
                                    uint32_t (&words)[4]) {
  uint32_t c0 = static_cast<uint32_t>(group);
  uint32_t c1 = static_cast<uint32_t>(group >> 32) | (static_cast<uint32_t>(stream) << 24);
  uint32_t c2 = tensor_id;
  uint32_t c3 = mask.step;
  uint32_t k0 = static_cast<uint32_t>(mask.seed);
  uint32_t k1 = static_cast<uint32_t>(mask.seed >> 32);
  ESAM_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53u;
    const uint64_t p1 = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace esam
