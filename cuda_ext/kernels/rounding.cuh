// float32 to bfloat16 as offload/FORMAT.md rounds, and numbers in an order that NaN cannot hide in.
#pragma once
#include "numbers.cuh"

constexpr u16 BF16_NAN = 0x7fc0;

__device__ __forceinline__ u16 bf16_of(float x, u32 bits) { return x == x ? (u16)(bits >> 16) : BF16_NAN; }

// The least bfloat16 >= x, the largest <= x.
__device__ __forceinline__ u16 bf16_up(float x) {
  const u32 bits = __float_as_uint(x);
  return bf16_of(x, bits + (bits >> 31 ? 0 : 0xffff));
}
__device__ __forceinline__ u16 bf16_down(float x) {
  const u32 bits = __float_as_uint(x);
  return bf16_of(x, bits + (bits >> 31 ? 0xffff : 0));
}

// Bits of a float32 as an integer that sorts the same, -0 before +0, NaN outside of the infinities; its own inverse.
__device__ __forceinline__ int ordered(int bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// Least and largest of some numbers; both NaN if one number is.
struct Bounds {
  int least = 0x7fffffff, most = -0x7fffffff - 1;

  __device__ __forceinline__ void add(float x) {
    least = min(least, ordered(__float_as_int(x)));
    most = max(most, ordered(__float_as_int(x)));
  }
  __device__ __forceinline__ float low() const { return checked(__int_as_float(ordered(least))); }
  __device__ __forceinline__ float high() const { return checked(__int_as_float(ordered(most))); }

 private:
  __device__ __forceinline__ float checked(float x) const {
    const float low = __int_as_float(ordered(least)), high = __int_as_float(ordered(most));
    return low == low && high == high ? x : NOT_A_NUMBER;
  }
};
