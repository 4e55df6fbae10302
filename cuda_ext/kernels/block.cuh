// What a block of 64 tokens is made of. HEAD_DIM.
#pragma once
#include "numbers.cuh"

constexpr int BLOCK = 64;
constexpr int GROUPS = (HEAD_DIM + 31) / 32;

// A group of channels shares the scale of four bits; a head_dim of 80 ends in a group of 16.
__device__ __forceinline__ int group_width(int group) { return min(32, HEAD_DIM - 32 * group); }
