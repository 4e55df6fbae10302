// A libcuda.so.1 for machines without a GPU: every function of it is one that a test gives.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace {

constexpr int MOST = 128, NOT_FOUND = 500;

struct Function {
  const char* name;
  void* code;
};

Function functions[MOST];
int count;

}  // namespace

extern "C" {

// The name must stay where it is.
void fake_provide(const char* name, void* code) {
  for (int i = 0; i < count; i++)
    if (!strcmp(functions[i].name, name)) {
      functions[i].code = code;
      return;
    }
  if (count < MOST) functions[count++] = {name, code};
}

int cuGetProcAddress_v2(const char* name, void** code, int, uint64_t, int* found) {
  *code = !strcmp(name, "cuGetProcAddress") ? (void*)cuGetProcAddress_v2 : nullptr;
  for (int i = 0; i < count; i++)
    if (!strcmp(functions[i].name, name)) *code = functions[i].code;
  if (found) *found = *code ? 0 : 1;
  return *code ? 0 : NOT_FOUND;
}

// NVRTC looks for a driver and asks it for tables; one whose first word, its size, is 8 has no entries.
int cuGetExportTable(const void** table, const void*) {
  static const uint64_t none[] = {8};
  *table = none;
  return 0;
}
}
