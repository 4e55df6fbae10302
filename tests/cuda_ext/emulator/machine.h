// What an emulated kernel and the machine that runs it know of each other.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace emulator {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;
constexpr size_t MOST_SHARED = 99 << 10;  // what a block may have on every architecture that is compiled for

struct Index {
  unsigned x, y, z;
};

struct Thread {
  Index index;
  int number, lane, warp;
};

enum class Collective { SYNC, SHUFFLE, BALLOT, MMA_BF16, MMA_F16, LDMATRIX, LDMATRIX_TRANS };

extern Thread* running;
extern Index block, block_size, grid_size;

// Ends the launch with a message; never returns to the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

unsigned char* shared_memory();
void sync_block(int line);

// All 32 lanes of a warp meet at one line. SHUFFLE: the value of lane `source`. BALLOT: bits of the values.
// MMA_: registers a[4], b[2], c[4], of which c changes. LDMATRIX: value is an address, registers r[4] are written.
uint64_t meet(Collective kind, int line, uint64_t value = 0, unsigned source = 0, uint32_t* registers = nullptr);

// cp.async: a copy lands some time between its issue and the wait of the thread that issued it.
void copy_async(void* shared, const void* global, int bytes, int source_bytes);
void commit_copies();
void wait_copies(int groups_left);

}  // namespace emulator
