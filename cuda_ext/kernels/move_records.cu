// Copies records between places: gathers them into a buffer, scatters them from one. RECORD_BYTES.
//
// Every byte is read and written once, 16 at a time; memory bounds it.
#include "intrinsics.cuh"

// to_places, from_places: int64 byte offsets, multiples of 64; a block a record.
extern "C" __global__ void __launch_bounds__(128) move_records(u8* to, const i64* to_places, const u8* from, const i64* from_places) {
  uint4* target = (uint4*)(to + to_places[blockIdx.x]);
  const uint4* source = (const uint4*)(from + from_places[blockIdx.x]);
  for (int i = threadIdx.x; i < RECORD_BYTES / 16; i += blockDim.x) target[i] = source[i];
}
