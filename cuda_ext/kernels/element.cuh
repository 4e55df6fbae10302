// Numbers of the compute dtype, of ELEMENT_BYTES: float32, or bfloat16 or, if FLOAT16, float16.
#pragma once
#include "numbers.cuh"

#if ELEMENT_BYTES == 4
typedef u32 Element;
__device__ __forceinline__ float number(Element bits) { return __uint_as_float(bits); }
#else
typedef u16 Element;
__device__ __forceinline__ float number(Element bits) { return low_half(bits); }
#endif
