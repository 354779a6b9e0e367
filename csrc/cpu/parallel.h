// Threads. We borrow torch's own OpenMP pool instead of bringing a second one: two pools of spinning workers on the same
// cores slow each other down. Python hands us the path of the libgomp that torch has loaded (use_openmp_library); where
// there is none, plain std::threads do the work.
#pragma once
#include <cstdint>
#include <type_traits>

namespace pds {

using TaskFunction = void (*)(void* context, int64_t task);

// Calls function(context, i) for i in [0, tasks) on up to num_threads() threads, in no particular order.
void parallel_tasks(int64_t tasks, TaskFunction function, void* context);

void set_num_threads(int threads);
int num_threads();
bool use_openmp_library(const char* path);   // false: the library cannot be opened or has no GOMP_parallel

template <typename F>
void parallel_for(int64_t tasks, F&& body) {
  using Body = std::remove_reference_t<F>;
  parallel_tasks(tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); },
                 const_cast<void*>(static_cast<const void*>(&body)));
}

// Calls body(begin, end) for ranges that cover [0, n), each at least `grain` long (but the last).
template <typename F>
void parallel_ranges(int64_t n, int64_t grain, F&& body) {
  if (n <= 0) return;
  const int64_t most = 4 * static_cast<int64_t>(num_threads());
  int64_t ranges = (n + grain - 1) / (grain > 0 ? grain : 1);
  if (ranges > most) ranges = most;
  parallel_for(ranges, [&](int64_t i) { body(n * i / ranges, n * (i + 1) / ranges); });
}

}  // namespace pds
