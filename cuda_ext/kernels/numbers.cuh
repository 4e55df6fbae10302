// bfloat16, float16 and codes as numbers. FLOAT16: numbers of 16 bits are float16, not bfloat16; scales never
// are.
#pragma once
#include "intrinsics.cuh"

constexpr int WARP = 32;
constexpr u32 ALL = 0xffffffff;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fc00000)

__device__ __forceinline__ float widen(u32 bf16) { return __uint_as_float(bf16 << 16); }
#if FLOAT16
constexpr u32 EXPONENT = 0x7c00;
__device__ __forceinline__ float low_half(u32 pair) { return widen_f16((u16)pair); }
#else
constexpr u32 EXPONENT = 0x7f80;
__device__ __forceinline__ float low_half(u32 pair) { return widen(pair); }
#endif
__device__ __forceinline__ float high_half(u32 pair) { return low_half(pair >> 16); }

// Two numbers as the sum of two halves each: of bfloat16 16 bits of their mantissas are left; of float16 22, down to
// 2^-25, and none beyond 65504.
__device__ __forceinline__ void split(float a, float b, u32& upper, u32& rest) {
  upper = pack(a, b);
  rest = pack(a - low_half(upper), b - high_half(upper));
}

// The signed bytes `byte` of two words as two bfloat16: 128 + the seven lower bits, less 128 or, if negative, 256.
__device__ __forceinline__ u32 signed_pair(u32 first, u32 second, int byte) {
  const u32 both = __byte_perm(first, second, byte | (byte + 4) << 8);
  return add_bf16x2((both & 0x007f007f) | 0x43004300, (both & 0x00800080) | 0xc300c300);
}

// Four bits, the lower or the upper ones, of the bytes `byte` of two words as two bfloat16.
__device__ __forceinline__ u32 nibble_pair(u32 first, u32 second, int byte, bool upper) {
  const u32 both = __byte_perm(first, second, byte | (byte + 4) << 8);
  return add_bf16x2(((upper ? both >> 4 : both) & 0x000f000f) | 0x43004300, 0xc300c300);
}
