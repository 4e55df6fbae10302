// Device memory, and who touched which byte of it when.
#pragma once
#include "machine.h"

namespace emulator {

enum class Access { READ, WRITE, COPY_ISSUED, COPY_LANDED };

// Fails the launch if this access is out of bounds, misaligned (for `align`), or races with another.
void touch(const void* address, size_t bytes, size_t align, Access access);

void begin_launch(size_t shared_bytes);
void begin_block();
// After a barrier of the block, or of one warp, what came before is ordered before what follows.
void order_block();
void order_warp(int warp);

}  // namespace emulator
