// float16 as a GPU widens and rounds it, in the bits of float32.
#pragma once
#include <stdint.h>
#include <string.h>

namespace emulator {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline float widen_half(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16, rest = (half & 0x7fff) << 13;
  if ((half & 0x7c00) == 0x7c00) return of_bits(sign | rest | 0x7f800000);
  return of_bits(sign | bits_of(of_bits(rest) * 0x1p112f));
}

inline uint32_t nearest_half(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, bits = bits_of(x) & 0x7fffffff;
  if (x != x) return 0x7fff;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  // Neighbours of 0.5 are as far apart as subnormal numbers are.
  if (bits < 0x38800000) return sign | (bits_of(of_bits(bits) + 0.5f) - 0x3f000000);
  return sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
}

}  // namespace emulator
