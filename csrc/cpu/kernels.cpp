// Compiled once per instruction set, with ESAM_KERNELS naming the table to define. Everything else has internal
// linkage, so that no function of one instruction set is linked into another's code. Loops are plain, for the compiler
// to vectorize, over blocks that stay in the first-level cache; sums keep one order on every machine.
#include "kernels.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "../numerics.h"

namespace esam::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // elements
constexpr int64_t kLanes = 32;    // partial sums that run side by side

template <typename T>
using Compute = typename ComputeType<T>::type;

// The elements in the compute type C: where they are, or converted into the buffer.
template <typename C, typename T>
const C* load(const T* source, int64_t count, C* buffer) {
  if constexpr (std::is_same_v<T, C>) {
    return source;
  } else {
    for (int64_t j = 0; j < count; ++j) buffer[j] = widen(source[j]);
    return buffer;
  }
}

// The words of one block's elements.
class Words {
 public:
  Words(const ElementMask& mask, Stream stream, const Operand& operand, int64_t begin, int64_t count) {
    const uint64_t first = static_cast<uint64_t>(operand.offset + begin);
    skipped_ = first % 4;
    const int64_t groups = (skipped_ + count + 3) / 4;
    for (int64_t i = 0; i < groups; ++i) {
      element_words(mask, stream, operand.id, first / 4 + i, words_[i]);
    }
  }

  const uint32_t* data() const { return words_[0] + skipped_; }

 private:
  uint32_t words_[kBlock / 4 + 1][4];
  int64_t skipped_;
};

// A copy past the caches, whose lines are not fetched only to be overwritten; finish_streams() completes it.
void stream(void* target, const void* source, int64_t bytes) {
  int64_t streamed = 0;
#ifdef __SSE2__
  if (reinterpret_cast<uintptr_t>(target) % sizeof(__m128i) == 0) {
    for (; streamed + static_cast<int64_t>(sizeof(__m128i)) <= bytes; streamed += sizeof(__m128i)) {
      const void* from = static_cast<const char*>(source) + streamed;
      void* to = static_cast<char*>(target) + streamed;
      _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
    }
  }
#endif
  memcpy(static_cast<char*>(target) + streamed, static_cast<const char*>(source) + streamed, bytes - streamed);
}

// Before another thread is told that the copies are there.
void finish_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// x <- m * x
template <typename C>
void apply_mask(const ElementMask& mask, const Operand& operand, int64_t begin, int64_t count, const C* x, C* result) {
  const Words drawn(mask, Stream::kElement, operand, begin, count);
  const uint32_t* words = drawn.data();
  const uint32_t threshold = static_cast<uint32_t>(mask.threshold);
  // A product, as in the reference: a gradient that is not finite makes the norm so even where it is masked.
  for (int64_t j = 0; j < count; ++j) result[j] = x[j] * static_cast<C>(words[j] < threshold ? 1 : 0);
}

template <typename P, typename G>
double squared_norm(const Operand& operand, int64_t begin, int64_t end, bool adaptive, const ElementMask& mask) {
  using C = Compute<P>;
  const P* param = static_cast<const P*>(operand.param);
  const G* grad = static_cast<const G*>(operand.grad);
  alignas(64) C buffer[kBlock], weights[kBlock];
  double sums[kLanes] = {};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    const C* x = load(grad + i, count, buffer);
    if (adaptive) {
      const C* w = load(param + i, count, weights);
      for (int64_t j = 0; j < count; ++j) buffer[j] = x[j] * w[j];
      x = buffer;
    }
    if (mask.masked()) {
      apply_mask(mask, operand, i, count, x, buffer);
      x = buffer;
    }
    C lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += x[j + lane] * x[j + lane];
    }
    for (int64_t lane = 0; j + lane < count; ++lane) lanes[lane] += x[j + lane] * x[j + lane];
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += lanes[lane];
  }
  double sum = 0;
  for (double lane : sums) sum += lane;
  return sum;
}

template <typename P, typename G>
void perturb(const Operand& operand, int64_t begin, int64_t end, double norm, bool adaptive, const ElementMask& mask,
             bool streaming) {
  using C = Compute<P>;
  P* param = static_cast<P*>(operand.param);
  P* backup = static_cast<P*>(operand.backup);
  const G* grad = static_cast<const G*>(operand.grad);
  const C scale = static_cast<C>(operand.coefficient) / (static_cast<C>(norm) + static_cast<C>(kEps));
  const bool moves = std::isfinite(static_cast<C>(norm));
  alignas(64) C buffer[kBlock], weights[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    if (backup == nullptr) {
      if (!moves) return;
    } else if (streaming) {
      stream(backup + i, param + i, count * sizeof(P));
    } else {
      memcpy(backup + i, param + i, count * sizeof(P));
    }
    if (!moves) continue;
    const C* x = load(grad + i, count, buffer);
    const C* w = load(param + i, count, weights);
    if (adaptive) {
      for (int64_t j = 0; j < count; ++j) buffer[j] = w[j] * w[j] * x[j];
      x = buffer;
    }
    if (mask.masked()) {
      apply_mask(mask, operand, i, count, x, buffer);
      x = buffer;
    }
    if constexpr (std::is_same_v<P, C>) {
      for (int64_t j = 0; j < count; ++j) param[i + j] = std::fma(scale, x[j], param[i + j]);
    } else {
      for (int64_t j = 0; j < count; ++j) weights[j] = std::fma(scale, x[j], w[j]);
      if (mask.present) {
        const Words drawn(mask, Stream::kRounding, operand, i, count);
        const uint32_t* words = drawn.data();
        for (int64_t j = 0; j < count; ++j) weights[j] = round_stochastically<P>(weights[j], words[j]);
      }
      for (int64_t j = 0; j < count; ++j) narrow(weights[j], param[i + j]);
    }
  }
  if (streaming) finish_streams();
}

// Calls function(P{}, G{}) for the types of a tensor and of its gradient.
template <typename F>
auto dispatch(const Operand& operand, F function) {
  const bool wider_grad = operand.grad_dtype != operand.dtype;
  switch (operand.dtype) {
    case DType::kDouble:
      return function(double{}, double{});
    case DType::kBFloat16:
      return wider_grad ? function(BFloat16{}, float{}) : function(BFloat16{}, BFloat16{});
    case DType::kHalf:
      return wider_grad ? function(Half{}, float{}) : function(Half{}, Half{});
    default:
      return function(float{}, float{});
  }
}

double squared_norm_any(const Operand& operand, int64_t begin, int64_t end, bool adaptive, const ElementMask& mask) {
  return dispatch(operand, [&](auto p, auto g) {
    return squared_norm<decltype(p), decltype(g)>(operand, begin, end, adaptive, mask);
  });
}

void perturb_any(const Operand& operand, int64_t begin, int64_t end, double norm, bool adaptive,
                 const ElementMask& mask, bool streaming) {
  dispatch(operand, [&](auto p, auto g) {
    perturb<decltype(p), decltype(g)>(operand, begin, end, norm, adaptive, mask, streaming);
  });
}

void stream_any(void* target, const void* source, int64_t bytes) {
  stream(target, source, bytes);
  finish_streams();
}

}  // namespace

const Kernels ESAM_KERNELS = {squared_norm_any, perturb_any, stream_any};

}  // namespace esam::cpu
