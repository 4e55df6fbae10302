// Rotates queries as int4's keys are rotated, so that their products are those of queries and keys. HEAD_DIM.
#include "rotate.cuh"

// out, x: float32 [rows, HEAD_DIM]; a warp a row.
extern "C" __global__ void __launch_bounds__(32) rotate(float* out, const float* x) {
  SHARED_MEMORY(shared);
  float* row = (float*)shared;
  const int lane = threadIdx.x;
  const i64 at = (i64)blockIdx.x * HEAD_DIM;
  for (int c = lane; c < HEAD_DIM; c += WARP) row[c] = x[at + c];
  __syncwarp();
  rotate_row(row, lane);
  for (int c = lane; c < HEAD_DIM; c += WARP) out[at + c] = row[c];
}
