// Small kernels, each right with bug = 0 and wrong in one way with another: what the emulator must tell apart.

#define ALL 0xffffffffu

// Sums 64 numbers. Bugs: 1 no barrier before the sum, 2 none within it, 3 one number too many,
// 4 one past the shared memory, 5 a barrier that not all threads reach, 6 threads that exit before it.
extern "C" __global__ void __launch_bounds__(64) total(float* out, const float* in, int bug) {
  SHARED_MEMORY(memory);
  float* s = (float*)memory;
  const int t = threadIdx.x;
  if (bug == 6 && t > 40) return;
  s[t + (bug == 4)] = in[t + (bug == 3)];
  if (bug != 1) __syncthreads();
  for (int span = 32; span; span /= 2) {
    if (t < span) s[t] += s[t + span];
    if (bug == 5) {
      if (t < span) __syncthreads();
    } else if (bug != 2) __syncthreads();
  }
  if (t == 0) *out = s[0];
}

// Reverses 64 numbers through async copies of 16 bytes. Bugs: 1 no wait, 2 the wait leaves one group, 3 no warp
// sync after it, 4 a misaligned source, 5 no commit, 6 the next copy overwrites what others still read.
extern "C" __global__ void __launch_bounds__(32) reverse(float* out, const float* in, int bug) {
  SHARED_MEMORY(memory);
  float* s = (float*)memory;
  const int t = threadIdx.x;
  for (int half = 0; half < 2; half++) {
    if (t < 8) copy_async16(s + 4 * t, in + 32 * half + 4 * t - (bug == 4), true);
    if (bug != 5) commit_copies();
    if (bug == 2) wait_copies<1>();
    else if (bug != 1) wait_copies<0>();
    if (bug != 3) __syncwarp();
    out[63 - 32 * half - t] = s[t];
    if (bug != 6) __syncwarp();
  }
  wait_copies<0>();
}

// Each warp finds its largest number. Bugs: 1 a diverged shuffle, 2 lanes that exit first, 3 all blocks write one
// byte, 4 a null pointer, 5 a misaligned vector, 6 lanes at different collectives, 7 an index outside of an array,
// 8 one outside of the last array of a struct, 9 a shift out of a word.
extern "C" __global__ void __launch_bounds__(32) largest(float* out, const float* in, int bug) {
  const int t = threadIdx.x;
  float x = in[blockIdx.x * 32 + t];
  if (bug == 2 && t > 20) return;
  if (bug == 4 && t == 3) x = *(const float*)(size_t)gridDim.x;
  if (bug == 5) x = ((const float2*)(in + 1))[t / 4].x;
  if (bug == 6 && t > 20) x += __ballot_sync(ALL, x > 0);
  float own[2] = {x, x};
  x = own[bug == 7 ? 2 : t % 2];
  const struct { float own[2]; } last = {{x, x}};
  x = last.own[bug == 8 ? 2 : t % 2];
  if (bug == 9) x = 1 << (t + 1);
  for (int bits = 16; bits; bits /= 2) {
    if (bug == 1 && t < 16) x = fmaxf(x, __shfl_xor_sync(ALL, x, bits));
    else x = fmaxf(x, __shfl_xor_sync(ALL, x, bits));
  }
  if (t == 0) out[bug == 3 ? 0 : blockIdx.x] = x;
}

// c [16, 8] = a [16, 16] b [16, 8], of 16 bits; b comes by rows or, transposed = 1, by columns.
extern "C" __global__ void __launch_bounds__(32) product(float* c, const uint4* a, const uint4* b, int transposed) {
  SHARED_MEMORY(memory);
  uint4* s = (uint4*)memory;
  const int t = threadIdx.x;
  s[t] = a[t];
  if (t < 16) s[32 + t] = b[t];
  __syncwarp();
  unsigned left[4], right[4];
  float sums[4] = {0, 0, 0, 0};
  load_matrices(left, s + (t & 15) * 2 + (t >> 4));
  if (transposed) load_matrices(right, s + 32 + (t & 7) * 2 + (t >> 3 & 1));
  else load_matrices_transposed(right, s + 32 + (t & 15));
  mma(sums, left, right);
  for (int i = 0; i < 4; i++) c[(t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = sums[i];
}

// Pairs of numbers as words of two of 16 bits, and float16 as float32.
extern "C" __global__ void __launch_bounds__(32) halves(unsigned* packed, float* widened, const float* x, const unsigned short* numbers) {
  const int at = blockIdx.x * 32 + threadIdx.x;
  packed[at] = pack(x[2 * at], x[2 * at + 1]);
  widened[at] = widen_f16(numbers[at]);
}

// A block writes what the next one reads: only with bug = 1.
extern "C" __global__ void __launch_bounds__(32) chain(float* data, int bug) {
  const int at = blockIdx.x * 32 + threadIdx.x;
  data[at] = bug && blockIdx.x ? data[at - 32] : 1;
}

// Bytes, halves and words of the same memory, by different threads. Bugs: 1 two write one half, 2 a byte of a word that
// another writes, 3 a word of which another writes a byte, 4 a byte that an async copy fills, 5 a word that other lanes
// read is written, 6 one that another warp reads, too, 7 a word of which its reader wrote a byte, 8 a byte that others read.
extern "C" __global__ void __launch_bounds__(64) words(unsigned* out, const unsigned* in, int bug) {
  SHARED_MEMORY(memory);
  unsigned* word = (unsigned*)memory;
  unsigned short* half = (unsigned short*)memory;
  const int t = threadIdx.x, next = (t + 1) % 64;
  half[bug == 1 ? t / 2 * 2 : t] = t;
  __syncthreads();
  unsigned x = word[t / 2];
  __syncthreads();
  memory[t] = t;
  __syncthreads();
  x += word[t / 4];
  __syncthreads();
  if (bug == 2) word[t] = t, x = memory[4 * next + 1];
  if (bug == 3) memory[4 * t + 1] = t, x = word[next];
  if (bug == 4 && t < 16) copy_async16(word + 4 * t, in + 4 * t, true);
  if (bug == 4) x = memory[4 * next + 1];
  if (bug > 4 && bug != 7 && (bug != 5 || t < 32)) x = bug == 8 ? memory[1] : word[0];
  if (bug == 6) __syncwarp();
  if (bug > 4 && t == 0) bug > 6 ? memory[1] = 1 : word[0] = 1;
  if (bug == 7) x = word[0];
  commit_copies();
  wait_copies<0>();
  out[t] = x;
}

// Bugs: a word that all blocks read is written by the last one, 1 without and 2 after reading it itself.
extern "C" __global__ void __launch_bounds__(32) read_by_all(unsigned* data, int bug) {
  const bool last = blockIdx.x == gridDim.x - 1;
  if (threadIdx.x == 0 && !(last && bug == 1)) data[1 + blockIdx.x] = data[0];
  if (threadIdx.x == 0 && last && bug) data[0] = 1;
}
