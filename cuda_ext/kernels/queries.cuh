// The query rows of a tile in shared memory. Row r of a KV head is query r / group and its head r % group.
#pragma once
#include "tile.cuh"

constexpr int ROWS = 16;
constexpr bool TENSOR_CORES = K_BITS <= 16;
constexpr int QUERY_STRIDE = HEAD_DIM + 8;  // of 16 bits, so that rows begin in different banks

// Tensor cores take each number as two of 16 bits; keys of four bits also want the sums of each group's channels.
struct Queries {
  static constexpr int PART = TENSOR_CORES ? 2 * ROWS * QUERY_STRIDE : 4 * ROWS * HEAD_DIM;
  static constexpr int PARTS = TENSOR_CORES ? 2 : 1;
  static constexpr int SUMS = K_BITS == 4 ? 4 * ROWS * GROUPS : 0;
  static constexpr int BYTES = PART * PARTS + SUMS;
  u8* memory;

  __device__ __forceinline__ u32* pair(int part, int row, int channel) const {
    return (u32*)(memory + part * PART + 2 * (row * QUERY_STRIDE + channel));
  }
  __device__ __forceinline__ float* numbers(int row) const { return (float*)memory + row * HEAD_DIM; }
  __device__ __forceinline__ float* sums(int row) const {
    return (float*)(memory + PART * PARTS) + row * GROUPS;
  }

  // q: float32 [M, heads, HEAD_DIM], heads = kv_heads * group. Rows from `rows` on become zero.
  __device__ __forceinline__ void load(const float* q, int first_row, int rows, int head, int kv_heads, int group, int lane) const {
    for (int i = lane; i < ROWS * HEAD_DIM / 2; i += WARP) {
      const int r = i / (HEAD_DIM / 2), channel = i % (HEAD_DIM / 2) * 2, row = first_row + r;
      float2 x = {0, 0};
      if (row < rows) {
        const i64 at = (i64)(row / group * kv_heads + head) * group + row % group;
        x = *(const float2*)(q + at * HEAD_DIM + channel);
      }
      if (TENSOR_CORES) split(x.x, x.y, *pair(0, r, channel), *pair(1, r, channel));
      else *(float2*)(numbers(r) + channel) = x;
    }
    if (K_BITS != 4) return;
    __syncwarp();
    for (int i = lane; i < ROWS * GROUPS; i += WARP) {
      const int row = i / GROUPS, group = i % GROUPS;
      float sum = 0;
      for (int part = 0; part < 2; part++)
        for (int c = 0; c < group_width(group) / 2; c++) {
          const u32 both = pair(part, row, 32 * group)[c];
          sum += low_half(both) + high_half(both);
        }
      sums(row)[group] = sum;
    }
  }
};
