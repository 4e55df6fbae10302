// Products of queries and keys: logits [ROWS, 64] in shared memory, before scale and softcap.
#pragma once
#include "queries.cuh"

// So that nothing spills on any architecture; 16 channels at the end want every group unrolled.
constexpr int UNROLLED_GROUPS = HEAD_DIM > 128 ? 1 : HEAD_DIM == 96 ? 2 : 4;
constexpr int LOGITS_STRIDE = BLOCK + 8;  // of float32, so that rows begin in different banks

// Columns 32 * half .. + 31 as four products of 8 columns; a lane has rows lane / 4 and + 8, columns lane % 4 * 2 and + 1.
struct Products {
  float sum[4][4];

  __device__ __forceinline__ Products() {
#pragma unroll
    for (int tile = 0; tile < 4; tile++)
      for (int i = 0; i < 4; i++) sum[tile][i] = 0;
  }

  // Channels 16 * step .. + 15 of all four tiles.
  __device__ __forceinline__ void add(const Queries& queries, int step, const u32 (&keys)[4][2], int lane) {
    for (int part = 0; part < 2; part++) {
      u32 a[4];
      load_matrices(a, queries.pair(part, lane % 16, 16 * step + lane / 16 * 8));
#pragma unroll
      for (int tile = 0; tile < 4; tile++) mma(sum[tile], a, keys[tile]);
    }
  }

  __device__ __forceinline__ void store(float* logits, int half, int lane) const {
#pragma unroll
    for (int tile = 0; tile < 4; tile++) {
      const int column = 32 * half + 8 * tile + lane % 4 * 2;
      *(float2*)(logits + lane / 4 * LOGITS_STRIDE + column) = float2{sum[tile][0], sum[tile][1]};
      *(float2*)(logits + (lane / 4 + 8) * LOGITS_STRIDE + column) = float2{sum[tile][2], sum[tile][3]};
    }
  }
};

__device__ __forceinline__ void exact_keys(u32 (&fragment)[4][2], const u8* keys, int half, int step, int lane) {
  for (int pair = 0; pair < 2; pair++) {
    const int token = 32 * half + 16 * pair;
    u32 r[4];
#if KEYS_BY_TOKEN
    load_matrices(r, keys + (token + lane / 16 * 8 + lane % 8) * Keys::STRIDE + 2 * (16 * step + lane / 8 % 2 * 8));
#else
    load_matrices_transposed(r, keys + (16 * step + lane % 16) * Keys::STRIDE + 2 * (token + lane / 16 * 8));
#endif
    for (int i = 0; i < 4; i++) fragment[2 * pair + i / 2][i % 2] = r[i];
  }
}

// The codes of four tokens in each of some rows of keys.
__device__ __forceinline__ u32 key_codes(const u8* keys, int row, int half, int lane) {
  return *(const u32*)(keys + row * Keys::STRIDE + 32 * half + lane / 4 * 4);
}

__device__ __forceinline__ void multiply_keys(Products& products, const Queries& queries, const u8* keys, int half, int lane) {
  u32 fragment[4][2];
  for (int step = 0; step < HEAD_DIM / 16; step++) {
    if (K_BITS == 16) exact_keys(fragment, keys, half, step, lane);
    else {
      u32 codes[4];
      for (int i = 0; i < 4; i++) codes[i] = key_codes(keys, 16 * step + lane % 4 * 2 + i % 2 + i / 2 * 8, half, lane);
#pragma unroll
      for (int tile = 0; tile < 4; tile++)
        for (int i = 0; i < 2; i++) fragment[tile][i] = signed_pair(codes[2 * i], codes[2 * i + 1], tile);
    }
    products.add(queries, step, fragment, lane);
  }
  if (K_BITS == 16) return;
  const u16* scales = (const u16*)(keys + Keys::SCALES);
#pragma unroll
  for (int tile = 0; tile < 4; tile++)
    for (int i = 0; i < 4; i++)
      products.sum[tile][i] *= widen(scales[token_of(32 * half + 8 * tile + lane % 4 * 2 + i % 2)]);
}

// sum over groups of scale * (q . codes) + minimum * (sum of q). Row 16 * group + i holds channels i of both halves of
// the group; of the last 16 of 80 channels the lower four bits of 8 rows are channels 0..7, the upper are 8..15.
__device__ __forceinline__ void multiply_keys4(Products& products, const Queries& queries, const u8* keys, int half, int lane) {
  const u32* scales = (const u32*)(keys + Keys::SCALES);
#pragma unroll UNROLLED_GROUPS
  for (int group = 0; group < GROUPS; group++) {
    const bool wide = group_width(group) == 32;
    Products part;
    u32 codes[4], fragment[4][2];
#pragma unroll
    for (int i = 0; i < (wide ? 4 : 2); i++)
      codes[i] = key_codes(keys, 16 * group + lane % 4 * 2 + i % 2 + i / 2 * 8, half, lane);
#pragma unroll
    for (int step = 0; step < (wide ? 2 : 1); step++) {
#pragma unroll
      for (int tile = 0; tile < 4; tile++)
        for (int i = 0; i < 2; i++) {
          const int first = wide ? 2 * i : 0;
          fragment[tile][i] = nibble_pair(codes[first], codes[first + 1], tile, wide ? step : i);
        }
      part.add(queries, 2 * group + step, fragment, lane);
    }
#pragma unroll
    for (int tile = 0; tile < 4; tile++)
      for (int i = 0; i < 4; i++) {
        const u32 scale = scales[group * BLOCK + token_of(32 * half + 8 * tile + lane % 4 * 2 + i % 2)];
        const float sum = queries.sums(lane / 4 + i / 2 * 8)[group];
        products.sum[tile][i] += low_half(scale) * part.sum[tile][i] + high_half(scale) * sum;
      }
  }
}

// float32 goes number by number: it is there to be compared with, not to be fast.
__device__ __forceinline__ void multiply_numbers(float* logits, const Queries& queries, const u8* keys, int lane) {
  constexpr int CHANNEL = KEYS_BY_TOKEN ? 4 : Keys::STRIDE, TOKEN = KEYS_BY_TOKEN ? Keys::STRIDE : 4;
  for (int token = lane; token < BLOCK; token += WARP)
    for (int row = 0; row < ROWS; row++) {
      float sum = 0;
      for (int c = 0; c < HEAD_DIM; c++) sum += queries.numbers(row)[c] * *(const float*)(keys + c * CHANNEL + token * TOKEN);
      logits[row * LOGITS_STRIDE + token] = sum;
    }
}

__device__ __forceinline__ void multiply(float* logits, const Queries& queries, const u8* keys, int lane) {
  if constexpr (TENSOR_CORES) {
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      Products products;
      if constexpr (K_BITS == 4) multiply_keys4(products, queries, keys, half, lane);
      else multiply_keys(products, queries, keys, half, lane);
      products.store(logits, half, lane);
    }
  } else {
    multiply_numbers(logits, queries, keys, lane);
  }
}
