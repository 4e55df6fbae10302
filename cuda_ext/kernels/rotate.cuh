// The rotation of int4's keys (offload/FORMAT.md): Walsh-Hadamard transforms of blocks of channels.
#pragma once
#include "numbers.cuh"

// Of so many channels the first block: 80 = 64 + 16, 96 = 64 + 32, others are one.
__device__ __forceinline__ int rotated_block(int channels) { return 1 << (31 - __clz(channels)); }

// The float32 nearest 1 / sqrt(size), where size is a power of two.
__device__ __forceinline__ float rotated_factor(int size) {
  float factor = 1;
  for (; size >= 4; size /= 4) factor *= 0.5f;
  return size == 2 ? factor * 0.707106781f : factor;
}

// x: float32 [HEAD_DIM] in shared memory, by one warp; what other lanes than c % 32 read of it needs a sync.
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
  }
}
