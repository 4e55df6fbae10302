// The rotation of int4's keys (offload/FORMAT.md): Walsh-Hadamard transforms of blocks of channels.
#pragma once
#include "numbers.cuh"

// One number to the power of two that fits: 80 = 64 + 16, 96 = 64 + 32, others are one block.
__device__ __forceinline__ int rotated_block(int channels) {
  int size = 1;
  while (2 * size <= channels) size *= 2;
  return size;
}

// The float32 nearest 1 / sqrt(size).
__device__ __forceinline__ float rotated_factor(int size) {
  float factor = 1;
  for (; size >= 4; size /= 4) factor *= 0.5f;
  return size == 2 ? factor * 0.707106781f : factor;
}

// x: float32 [HEAD_DIM] in shared memory, by one warp; every lane may read it afterwards.
__device__ __forceinline__ void rotate_row(float* x, int lane) {
  for (int first = 0, size; first < HEAD_DIM; first += size) {
    size = rotated_block(HEAD_DIM - first);
    for (int span = 1; span < size; span *= 2) {
      for (int i = lane; i < size / 2; i += WARP) {
        float* a = x + first + i / span * 2 * span + i % span;
        const float sum = a[0] + a[span], difference = a[0] - a[span];
        a[0] = sum;
        a[span] = difference;
      }
      __syncwarp();
    }
    const float factor = rotated_factor(size);
    for (int i = lane; i < size; i += WARP) {
      const float y = x[first + i] * factor;
      x[first + i] = y == y ? y : NOT_A_NUMBER;
    }
    __syncwarp();
  }
}
