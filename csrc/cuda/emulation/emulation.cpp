#include "cuda/emulation/emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace pds {
namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kGuardBytes = 4096;   // more than a faulty kernel of the tests writes: the heap behind stays whole
constexpr size_t kMostShared = 99 << 10;   // of a block on sm_86, sm_89 and sm_120; others have more

struct Copy {
  uintptr_t target;
  const void* source;
  size_t bytes;
  bool valid;
};

struct Warp {
  const char* operation = nullptr;
  void* payload[32];
  int arrived = 0;
  uint64_t meetings = 0;
};

struct Thread {
  ucontext_t context;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  Index index;
  bool started = false, finished = false;
  const uint64_t* waits_for = nullptr;   // runs again when this is no longer waits_since
  uint64_t waits_since = 0;
  std::vector<Copy> copies;              // issued since the last commit
  std::vector<std::vector<Copy>> groups;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  size_t shared_bytes = 0;
  unsigned char* shared_start = nullptr;
  Index block, grid, size;
  const char* barrier = nullptr;
  unsigned at_barrier = 0;
  bool votes = false, outcome = false;
  uint64_t barriers = 0;
  const std::function<void()>* kernel = nullptr;
  Thread* running = nullptr;
  jmp_buf scheduler;
  std::string problem;
};

Machine machine;
Order order = Order::together;
int processor_count = 2;

void leave() {
  if (_setjmp(machine.running->at) == 0) _longjmp(machine.scheduler, 1);
}

void wait_for(const uint64_t& counter, uint64_t since) {
  machine.running->waits_for = &counter;
  machine.running->waits_since = since;
  leave();
}

void fiber() {
  for (;;) {
    (*machine.kernel)();
    machine.running->finished = true;
    leave();
  }
}

// Runs `thread` until it waits or ends; false: it still waits.
bool resume(Thread& thread) {
  if (thread.finished || (thread.waits_for != nullptr && *thread.waits_for == thread.waits_since)) return false;
  thread.waits_for = nullptr;
  machine.running = &thread;
  if (_setjmp(machine.scheduler) == 0) {
    if (thread.started) _longjmp(thread.at, 1);
    thread.started = true;
    setcontext(&thread.context);
  }
  return true;
}

// The lanes in turn, the last one first where the last warp is ahead.
bool resume_warp(unsigned warp) {
  bool moved = false;
  const unsigned size = static_cast<unsigned>(machine.threads.size()), first = warp * 32, end = std::min(size, first + 32);
  for (unsigned i = first; i < end && machine.problem.empty(); ++i)
    moved |= resume(machine.threads[order == Order::last_ahead ? first + end - 1 - i : i]);
  return moved;
}

void run_block() {
  const unsigned warps = static_cast<unsigned>(machine.warps.size());
  for (bool moved = true; moved && machine.problem.empty();) {
    moved = false;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned warp = order == Order::last_ahead ? warps - 1 - i : i;
      while (resume_warp(warp)) {
        moved = true;
        if (order == Order::together || !machine.problem.empty()) break;
      }
    }
  }
  if (!machine.problem.empty()) return;
  for (const Thread& thread : machine.threads) {
    if (thread.finished) continue;
    const Warp& warp = machine.warps[thread.index.x / 32];
    const char* where = thread.waits_for == &machine.barriers ? machine.barrier : warp.operation;
    machine.problem = "thread " + std::to_string(thread.index.x) + " of block " + std::to_string(machine.block.x) +
                      " waits in " + where + " for threads that ended or wait elsewhere";
    return;
  }
}

void prepare_block(unsigned block) {
  machine.block = {block, 0, 0};
  std::memset(machine.shared.data(), 0xFF, machine.shared.size());
  for (Thread& thread : machine.threads) {
    thread.finished = false;
    thread.waits_for = nullptr;
    thread.copies.clear();
    thread.groups.clear();
  }
  for (Warp& warp : machine.warps) warp.arrived = 0;
  machine.at_barrier = 0;
  machine.votes = false;
}

void check_guard() {
  const unsigned char* end = machine.shared_start + machine.shared_bytes;
  if (std::any_of(end, end + kGuardBytes, [](unsigned char byte) { return byte != 0xFF; }))
    machine.problem = "a kernel wrote behind its shared memory";
}

void prepare_threads(unsigned threads) {
  machine.threads = std::vector<Thread>(threads);
  machine.warps = std::vector<Warp>((threads + 31) / 32);
  for (unsigned i = 0; i < threads; ++i) {
    Thread& thread = machine.threads[i];
    thread.index = {i, 0, 0};
    thread.stack.reset(new char[kStackBytes]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &fiber, 0);
  }
}

}  // namespace

void set_order(Order value) { order = value; }
void set_processors(int count) { processor_count = count; }
int processors() { return processor_count; }

void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % 32 != 0 || blocks == 0) throw std::runtime_error("a launch needs whole warps and at least one block");
  if (shared_bytes > kMostShared) throw std::runtime_error("a launch asks for more shared memory than sm_86 has");
  prepare_threads(threads);
  machine.shared.assign(shared_bytes + 128 + kGuardBytes, 0xFF);
  const uintptr_t start = (reinterpret_cast<uintptr_t>(machine.shared.data()) + 127) & ~uintptr_t{127};
  machine.shared_start = reinterpret_cast<unsigned char*>(start);
  machine.shared_bytes = shared_bytes;
  machine.grid = {blocks, 1, 1};
  machine.size = {threads, 1, 1};
  machine.kernel = &kernel;
  machine.problem.clear();
  for (unsigned block = 0; block < blocks && machine.problem.empty(); ++block) {
    prepare_block(block);
    run_block();
    check_guard();
  }
  if (!machine.problem.empty()) throw std::runtime_error("CUDA emulation: " + machine.problem);
}

Index thread_index() { return machine.running->index; }
Index block_index() { return machine.block; }
Index block_size() { return machine.size; }
Index grid_size() { return machine.grid; }
unsigned char* shared_memory() { return machine.shared_start; }

void fail(const std::string& problem) {
  machine.problem = problem + " (thread " + std::to_string(machine.running->index.x) + " of block " +
                    std::to_string(machine.block.x) + ")";
  leave();
  std::abort();   // the scheduler does not come back after a problem
}

void check_shared(uintptr_t address, size_t bytes, const char* what) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(machine.shared_start);
  if (address % bytes != 0) fail(std::string(what) + " at a shared address that is not aligned");
  if (address < start || address + bytes > start + machine.shared_bytes) fail(std::string(what) + " outside shared memory");
}

void meet_warp(const char* operation, void* payload, const std::function<void(void**)>& combine) {
  Warp& warp = machine.warps[machine.running->index.x / 32];
  if (warp.arrived == 0) warp.operation = operation;
  if (std::strcmp(warp.operation, operation) != 0)
    fail(std::string("the lanes of a warp are in different operations, ") + warp.operation + " and " + operation);
  warp.payload[machine.running->index.x % 32] = payload;
  if (++warp.arrived < 32) return wait_for(warp.meetings, warp.meetings);
  combine(warp.payload);
  warp.arrived = 0;
  ++warp.meetings;
}

bool meet_block(const char* operation, bool vote) {
  if (machine.at_barrier == 0) machine.barrier = operation;
  if (std::strcmp(machine.barrier, operation) != 0) fail("the threads of a block are at different barriers");
  machine.votes |= vote;
  if (++machine.at_barrier < machine.threads.size()) {
    wait_for(machine.barriers, machine.barriers);
    return machine.outcome;
  }
  machine.outcome = machine.votes;
  machine.votes = false;
  machine.at_barrier = 0;
  ++machine.barriers;
  return machine.outcome;
}

void copy_async(uintptr_t target, const void* source, size_t bytes, bool valid) {
  check_shared(target, bytes, "cp.async");
  if (reinterpret_cast<uintptr_t>(source) % bytes != 0) fail("cp.async from an address that is not aligned");
  machine.running->copies.push_back({target, source, bytes, valid});
  std::memset(reinterpret_cast<void*>(target), 0xFF, bytes);   // until it lands, whoever reads it gets NaN
}

void commit_copies() {
  machine.running->groups.push_back(std::move(machine.running->copies));
  machine.running->copies.clear();
}

void wait_copies(size_t groups_left) {
  auto& groups = machine.running->groups;
  while (groups.size() > groups_left) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) std::memcpy(reinterpret_cast<void*>(copy.target), copy.source, copy.bytes);
      else std::memset(reinterpret_cast<void*>(copy.target), 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emulation
}  // namespace pds
