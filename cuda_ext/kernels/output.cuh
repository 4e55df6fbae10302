// Weighted sums of values: a lane has rows lane / 4 and + 8 and a quarter of the channels, as products leave them.
#pragma once
#include "softmax.cuh"

struct Output {
  float sum[HEAD_DIM / 8][4];
  float minima[4];  // weights times minima of four bits: rows as above, groups lane % 4 * 2 and + 1

  __device__ __forceinline__ Output() {
#pragma unroll
    for (int tile = 0; tile < HEAD_DIM / 8; tile++)
      for (int i = 0; i < 4; i++) sum[tile][i] = 0;
    for (int i = 0; i < 4; i++) minima[i] = 0;
  }

  // fade: of this lane's row of the softmax.
  __device__ __forceinline__ void shrink(float fade, int lane) {
    const float factor[2] = {__shfl_sync(ALL, fade, lane / 4 * 2), __shfl_sync(ALL, fade, (lane / 4 + 8) * 2)};
#pragma unroll
    for (int tile = 0; tile < HEAD_DIM / 8; tile++)
      for (int i = 0; i < 4; i++) sum[tile][i] *= factor[i / 2];
    if (V_BITS == 4)
      for (int i = 0; i < 4; i++) minima[i] *= factor[i / 2];
  }

  // seen: of this lane's row of the softmax.
  __device__ __forceinline__ void add(const float* weights, const u8* values, u64 seen, int lane) {
    if constexpr (TENSOR_CORES) {
#pragma unroll 1
      for (int step = 0; step < BLOCK / 16; step++) add_step(weights, values, step, lane);
    } else {
      add_numbers(weights, values, seen, lane);
    }
  }

  // Every channel times its total's inverse, minima included; total: of this lane's row of the softmax.
  __device__ __forceinline__ void finish(float total, int lane) {
    if (V_BITS == 4) add_minima(lane);
    shrink(total == 0 ? 0 : 1 / total, lane);
  }

 private:
  // Sixteen columns of the weights.
  __device__ __forceinline__ void add_step(const float* weights, const u8* values, int step, int lane) {
    float2 weight[4];  // as the registers of a: both rows, then both rows 8 columns on
#pragma unroll
    for (int i = 0; i < 4; i++)
      weight[i] = *(const float2*)(weights + (lane / 4 + i % 2 * 8) * LOGITS_STRIDE + 16 * step + lane % 4 * 2 + i / 2 * 8);
    if constexpr (V_BITS == 16) add_exact(weight, values, step, lane);
    else add_codes(weight, values, step, lane);
  }

  // float32 goes number by number, to the rows that see it.
  __device__ __forceinline__ void add_numbers(const float* weights, const u8* values, u64 seen, int lane) {
    const u64 mine[2] = {__shfl_sync(ALL, seen, lane / 4 * 2), __shfl_sync(ALL, seen, (lane / 4 + 8) * 2)};
#pragma unroll 1
    for (int token = 0; token < BLOCK; token++) {
      const float* row = (const float*)(values + value_row(token));
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (!(mine[half] >> token & 1)) continue;
        const float weight = weights[(lane / 4 + 8 * half) * LOGITS_STRIDE + token];
#pragma unroll
        for (int tile = 0; tile < HEAD_DIM / 8; tile++)
          for (int i = 0; i < 2; i++) sum[tile][2 * half + i] += weight * row[channel_of(tile, lane % 4 * 2 + i)];
      }
    }
  }

  __device__ __forceinline__ void multiply(int tile, const u32 (&weights)[2][4], const u32* values) {
    for (int part = 0; part < 2; part++) mma(sum[tile], weights[part], values);
  }

  __device__ __forceinline__ void add_exact(const float2* weight, const u8* values, int step, int lane) {
    u32 a[2][4];
    for (int i = 0; i < 4; i++) split(weight[i].x, weight[i].y, a[0][i], a[1][i]);
#pragma unroll
    for (int pair = 0; pair < HEAD_DIM / 16; pair++) {
      u32 r[4];
      load_matrices_transposed(r, values + value_row(16 * step + lane % 16) + 2 * (16 * pair + lane / 16 * 8));
      multiply(2 * pair, a, r);
      multiply(2 * pair + 1, a, r + 2);
    }
  }

  // Weights times scales are one factor, codes the other; of int8 a token has one scale, of four bits each group has.
  __device__ __forceinline__ void add_codes(const float2* weight, const u8* values, int step, int lane) {
    const u8* scales = values + Values::SCALES;
    int column[4];
    for (int i = 0; i < 4; i++) column[i] = 16 * step + lane % 4 * 2 + i % 2 + i / 2 * 8;
    u32 a[2][4];
    if (V_BITS == 4) multiply_minima(weight, scales, column, lane);
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
      if (V_BITS == 4 || group == 0) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float scale[2];
          for (int j = 0; j < 2; j++) {
            const int token = token_of(column[i / 2 * 2 + j]);
            scale[j] = widen(((const u16*)scales)[V_BITS == 4 ? (token * GROUPS + group) * 2 : token]);
          }
          split(weight[i].x * scale[0], weight[i].y * scale[1], a[0][i], a[1][i]);
        }
      }
      u32 codes[4];
      for (int i = 0; i < 4; i++) codes[i] = value_codes(values + value_row(column[i]), group, lane);
#pragma unroll
      for (int tile = 0; tile < group_width(group) / 8; tile++) {
        u32 b[2];
        for (int i = 0; i < 2; i++) b[i] = value_pair(codes[2 * i], codes[2 * i + 1], tile, group);
        multiply(4 * group + tile, a, b);
      }
    }
  }

  // What this lane needs of a group of a row: a column of each tile.
  __device__ __forceinline__ static u32 value_codes(const u8* row, int group, int lane) {
    const bool wide = group_width(group) == 32;
    if (V_BITS == 8) return wide ? ((const u32*)(row + 32 * group))[lane / 4] : ((const u16*)(row + 32 * group))[lane / 4];
    return wide ? ((const u16*)(row + 16 * group))[lane / 4] : row[16 * group + lane / 4];
  }

  __device__ __forceinline__ static u32 value_pair(u32 first, u32 second, int tile, int group) {
    if (V_BITS == 8) return signed_pair(first, second, tile);
    const bool wide = group_width(group) == 32;
    return nibble_pair(first, second, wide ? tile % 2 : 0, wide ? tile / 2 : tile);
  }

  // The minima of up to eight groups are the columns of one more product.
  __device__ __forceinline__ void multiply_minima(const float2* weight, const u8* scales, const int* column, int lane) {
    const int group = lane / 4;
    u32 a[2][4], b[2] = {0, 0};
    for (int i = 0; i < 4; i++) split(weight[i].x, weight[i].y, a[0][i], a[1][i]);
    if (group < GROUPS)
#pragma unroll
      for (int i = 0; i < 4; i++)
        b[i / 2] |= (u32)((const u16*)scales)[(token_of(column[i]) * GROUPS + group) * 2 + 1] << i % 2 * 16;
    for (int part = 0; part < 2; part++) mma(minima, a[part], b);
  }

  __device__ __forceinline__ void add_minima(int lane) {
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float minimum = __shfl_sync(ALL, minima[2 * half + group % 2], lane / 4 * 4 + group / 2);
#pragma unroll
        for (int tile = 4 * group; tile < 4 * group + group_width(group) / 8; tile++)
          for (int i = 0; i < 2; i++) sum[tile][2 * half + i] += minimum;
      }
  }
};
