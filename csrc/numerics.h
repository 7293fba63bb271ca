// Types, and rounding to the ones below float32, for the CPU and the GPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace esam {

constexpr double kEps = 1e-12;  // added to the norm, as in the authors' code

// bf16 and fp16 as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The type that arithmetic on T runs in: float64 for float64, float32 for everything narrower.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

template <typename To, typename From>
ESAM_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

ESAM_HOST_DEVICE float widen(BFloat16 x) {
  return bit_cast<float>(uint32_t{x.bits} << 16);
}

ESAM_HOST_DEVICE float widen(Half x) {
  const uint32_t magnitude = x.bits & 0x7FFFu;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(0x3F000000u | magnitude) - 0.5f);
  const uint32_t not_finite = (magnitude << 13) | 0x7F800000u;
  return bit_cast<float>(sign | (magnitude < 0x0400u ? subnormal : magnitude < 0x7C00u ? normal : not_finite));
}

// To nearest, ties to even.
ESAM_HOST_DEVICE void narrow(float x, BFloat16& result) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  result.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

ESAM_HOST_DEVICE void narrow(float x, Half& result) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = ((magnitude + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t not_nan = magnitude < 0x47800000u ? finite : 0x7C00u;
  result.bits = static_cast<uint16_t>(sign | (magnitude > 0x7F800000u ? 0x7E00u : not_nan));
}

// What stochastic rounding needs to know of a type.
template <typename T>
struct Rounding;
template <>
struct Rounding<BFloat16> {
  static constexpr int kDroppedBits = 16;
  static constexpr uint32_t kMax = 0x7F7F0000u;
  static constexpr float kSmallestNormal = 0;  // float32's exponents: its subnormals need no care
};
template <>
struct Rounding<Half> {
  static constexpr int kDroppedBits = 13;
  static constexpr uint32_t kMax = 0x477FE000u;
  static constexpr float kSmallestNormal = 0x1p-14f;
};

// One of x's two neighbours in T, as a float32: random low bits are added below the last bit that is kept, and the rest
// is cut off. Saturates at the largest finite number; infinities and NaN stay as they are.
template <typename T>
ESAM_HOST_DEVICE float round_stochastically(float x, uint32_t word) {
  constexpr uint32_t low_bits = (1u << Rounding<T>::kDroppedBits) - 1;
  const uint32_t sign = bit_cast<uint32_t>(x) & 0x80000000u;
  const uint32_t magnitude = bit_cast<uint32_t>(x) & 0x7FFFFFFFu;
  // T's subnormals, all one spacing apart, are lifted into the binade of that spacing, and round there like the rest.
  const float lift = bit_cast<float>(magnitude) < Rounding<T>::kSmallestNormal ? Rounding<T>::kSmallestNormal : 0.0f;
  const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>(magnitude) + lift) + (word & low_bits);
  const uint32_t rounded = bit_cast<uint32_t>(bit_cast<float>(sum & ~low_bits) - lift);
  const uint32_t saturated = rounded < Rounding<T>::kMax ? rounded : Rounding<T>::kMax;
  return magnitude < 0x7F800000u ? bit_cast<float>(saturated | sign) : x;
}

// A key that orders as the number does, as an unsigned integer: every NaN largest, and both zeros one.
ESAM_HOST_DEVICE uint32_t order_key(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f);
  return x != x ? UINT32_MAX : bits >> 31 ? ~bits : bits | (1u << 31);
}
ESAM_HOST_DEVICE uint64_t order_key(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x + 0.0);
  return x != x ? UINT64_MAX : bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

}  // namespace esam
