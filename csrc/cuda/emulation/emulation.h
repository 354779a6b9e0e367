// Runs CUDA kernels on the host: the .cu files are compiled as C++ against the headers of this folder, which stand in for
// CUDA's. Blocks run one after another; the threads of a block are fibers, which change over where the device would make
// them meet (barriers, shuffles, ldmatrix, mma.sync). A test guard, not a fast path; nothing of it is in the package.
//
// Stricter than a device where that finds mistakes: shared memory starts as NaN; an asynchronous copy lands at the wait
// that must see it and not before; the lanes of a warp must meet in the same operation; matrix loads and copies are
// checked for alignment and bounds; and set_order chooses which warps run ahead of the others.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace pds {
namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum class Order { together, first_ahead, last_ahead };

void set_order(Order order);
void set_processors(int count);   // that the device seems to have
int processors();
void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);

// Of the thread that runs.
Index thread_index();
Index block_index();
Index block_size();
Index grid_size();
unsigned char* shared_memory();
void check_shared(uintptr_t address, size_t bytes, const char* what);
[[noreturn]] void fail(const std::string& problem);

// All lanes of the warp meet; the last one calls combine(payloads of the 32 lanes).
void meet_warp(const char* operation, void* payload, const std::function<void(void**)>& combine);
bool meet_block(const char* operation, bool vote);   // whether any thread voted

void copy_async(uintptr_t target, const void* source, size_t bytes, bool valid);   // or zeros
void commit_copies();
void wait_copies(size_t groups_left);

template <typename T>
T shuffle(T value, int source_lane) {
  struct Lane {
    T value;
    int source;
    T result;
  } lane{value, source_lane, value};
  meet_warp("shuffle", &lane, [](void** lanes) {
    for (int i = 0; i < 32; ++i) {
      Lane& to = *static_cast<Lane*>(lanes[i]);
      to.result = static_cast<Lane*>(lanes[to.source & 31])->value;
    }
  });
  return lane.result;
}

}  // namespace emulation
}  // namespace pds
