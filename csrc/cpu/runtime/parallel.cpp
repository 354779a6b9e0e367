#include "cpu/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace pds {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<int> g_threads{1};
std::atomic<GompParallel> g_gomp{nullptr};
thread_local bool t_inside = false;   // a nested call runs serially, as OpenMP does by default

struct Job {
  TaskFunction function;
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
};

void drain(void* data) {
  Job& job = *static_cast<Job*>(data);
  t_inside = true;
  for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;) job.function(job.context, i);
  t_inside = false;
}

}  // namespace

void set_num_threads(int threads) { g_threads.store(std::max(1, threads)); }
int num_threads() { return g_threads.load(std::memory_order_relaxed); }

bool use_openmp_library(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return false;
  auto parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
  if (parallel == nullptr) return false;
  g_gomp.store(parallel);
  return true;
}

void parallel_tasks(int64_t tasks, TaskFunction function, void* context) {
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), tasks));
  if (threads <= 1 || t_inside) {
    for (int64_t i = 0; i < tasks; ++i) function(context, i);
    return;
  }
  Job job{function, context, tasks};
  if (GompParallel gomp = g_gomp.load(std::memory_order_relaxed)) {
    gomp(drain, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(drain, &job);
  drain(&job);
  for (auto& helper : helpers) helper.join();
}

}  // namespace pds
