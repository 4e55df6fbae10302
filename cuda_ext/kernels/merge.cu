// Merges partial attentions: out = sum of out_p * exp(lse_p - lse), lse = log of the sum of exp(lse_p).
//
// A warp merges one row of one KV head; it reads every part once, and those bytes bound it. KV_HEADS, HEAD_DIM.
#include "numbers.cuh"

constexpr int PER_LANE = (HEAD_DIM + WARP - 1) / WARP;

// part_out: float32 [parts, KV_HEADS, M * group, HEAD_DIM], part_lse: float32 [parts, KV_HEADS, M * group], as
// attention leaves them. out: float32 [M, KV_HEADS * group, HEAD_DIM], lse: float32 [M, KV_HEADS * group]. A part
// with lse = -inf changes nothing; if all have, out = 0 and lse = -inf. Grid (M * group, KV_HEADS).
extern "C" __global__ void __launch_bounds__(32) merge(float* out, float* lse, const float* part_out, const float* part_lse, int parts, int group) {
  const int lane = threadIdx.x, row = blockIdx.x, rows = gridDim.x, head = blockIdx.y;
  const i64 to = (i64)(row / group * KV_HEADS + head) * group + row % group;
  float sum[PER_LANE] = {};
  float top = -INFINITE, total = 0;
  for (int part = 0; part < parts; part++) top = fmaxf(top, part_lse[((i64)part * KV_HEADS + head) * rows + row]);
  for (int part = 0; part < parts; part++) {
    const i64 from = ((i64)part * KV_HEADS + head) * rows + row;
    const float one = part_lse[from];
    if (one == -INFINITE) continue;
    const float weight = exp2_approximate((one - top) * LOG2_E);
    total += weight;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (lane + i * WARP < HEAD_DIM) sum[i] += weight * part_out[from * HEAD_DIM + lane + i * WARP];
  }
  const float inverse = total == 0 ? 0 : 1 / total;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++)
    if (lane + i * WARP < HEAD_DIM) out[to * HEAD_DIM + lane + i * WARP] = sum[i] * inverse;
  if (lane == 0) lse[to] = top + logf(total);
}
