// What the logits of a block can be, from its summary: an upper bound, and the logit of its mean key.
//
// bound = scale * sum over channels of max(q * key minimum, q * key maximum) (Tang et al. 2024, section 3.2). A warp is a
// block of the grid (blocks, KV_HEADS); it reads 6 * HEAD_DIM bytes, and its sums over lanes bound it. KV_HEADS, HEAD_DIM,
// SUMMARY: offset in a record.
#include "numbers.cuh"

constexpr int PER_LANE = (HEAD_DIM + WARP - 1) / WARP;

__device__ __forceinline__ float sum_of_lanes(float x) {
  for (int bits = 1; bits < WARP; bits *= 2) x += __shfl_xor_sync(ALL, x, bits);
  return x;
}

__device__ __forceinline__ float capped(float logit, float softcap) {
  return softcap == 0 ? logit : softcap * (1 - __fdividef(2, exp2_approximate(2 * LOG2_E / softcap * logit) + 1));
}

// bounds, means: float32 [KV_HEADS, M * group, blocks]. q: float32 [M, KV_HEADS * group, HEAD_DIM], not rotated: summaries
// never are. places: int64 [blocks], as attention takes them.
extern "C" __global__ void __launch_bounds__(32) block_scores(
    float* bounds, float* means, const float* q, const u8* pool, const i64* places, int queries, int group, float scale,
    float softcap) {
  const int lane = threadIdx.x, block = blockIdx.x, blocks = gridDim.x, head = blockIdx.y, rows = queries * group;
  const u16* summary = (const u16*)(pool + places[block] + SUMMARY) + head * HEAD_DIM;
  float least[PER_LANE], most[PER_LANE], mean[PER_LANE];
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    const int channel = lane + i * WARP;
    const bool there = channel < HEAD_DIM;
    least[i] = there ? widen(summary[channel]) : 0;
    most[i] = there ? widen(summary[KV_HEADS * HEAD_DIM + channel]) : 0;
    mean[i] = there ? widen(summary[2 * KV_HEADS * HEAD_DIM + channel]) : 0;
  }
  for (int row = 0; row < rows; row++) {
    const float* numbers = q + ((i64)(row / group * KV_HEADS + head) * group + row % group) * HEAD_DIM;
    float bound = 0, middle = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      const float x = lane + i * WARP < HEAD_DIM ? numbers[lane + i * WARP] : 0;
      bound += fmaxf(x * least[i], x * most[i]);
      middle += x * mean[i];
    }
    bound = sum_of_lanes(bound);
    middle = sum_of_lanes(middle);
    if (lane != 0) continue;
    const i64 to = ((i64)head * rows + row) * blocks + block;
    bounds[to] = capped(scale * bound, softcap);
    means[to] = capped(scale * middle, softcap);
  }
}
