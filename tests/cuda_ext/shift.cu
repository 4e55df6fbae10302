#include "intrinsics.cuh"

// out[i] = in[i] + by, i < count: what the contract of a device launches.
extern "C" __global__ void __launch_bounds__(32) shift(float* out, const float* in, int count, float by) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  if (i < count) out[i] = in[i] + by;
}

// out[i] = in[i] turned round within each block of threads, through more than 48 KB of shared memory.
extern "C" __global__ void __launch_bounds__(32) turn(float* out, const float* in) {
  SHARED_MEMORY(memory);
  float* far = (float*)memory + 15000;
  far[threadIdx.x] = in[blockIdx.x * 32 + threadIdx.x];
  __syncwarp();
  out[blockIdx.x * 32 + threadIdx.x] = far[31 - threadIdx.x];
}
