#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace gossamer {
namespace {

// Below this much memory traffic a thread costs more than it saves: one that waits, and one that is made for the call.
constexpr int64_t bytes_per_team_thread = int64_t{1} << 15;
constexpr int64_t bytes_per_new_thread = int64_t{1} << 19;

// GOMP_parallel is what GCC compiles `#pragma omp parallel` into; LLVM's and Intel's runtimes export it as well.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*thread)();
  int (*team)();
  int (*in_parallel)();
};

std::atomic<bool> forked{false};

template <class F>
void look_up(F*& function, const char* name) {
  function = reinterpret_cast<F*>(dlsym(RTLD_DEFAULT, name));
}

OpenMp find() {
  OpenMp found{};
  look_up(found.parallel, "GOMP_parallel");
  look_up(found.thread, "omp_get_thread_num");
  look_up(found.team, "omp_get_num_threads");
  look_up(found.in_parallel, "omp_in_parallel");
  if (!found.thread || !found.team || !found.in_parallel) found.parallel = nullptr;
  // A forked child inherits the runtime's books but not its threads: the next parallel region would wait for ever.
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  return found;
}

const OpenMp& openmp() {
  static const OpenMp found = find();
  return found;
}

bool usable() { return openmp().parallel && !forked; }

struct Job {
  int64_t parts;
  void (*part)(const void*, int64_t);
  const void* data;
};

// The team may be smaller than what was asked for.
void team_member(void* pointer) {
  const Job& job = *static_cast<const Job*>(pointer);
  for (int64_t i = openmp().thread(); i < job.parts; i += openmp().team()) job.part(job.data, i);
}

void run_in_new_threads(const Job& job) {
  std::vector<std::thread> workers;
  workers.reserve(static_cast<size_t>(job.parts - 1));
  for (int64_t i = 1; i < job.parts; ++i) {
    try {
      workers.emplace_back(job.part, job.data, i);
    } catch (const std::system_error&) {  // no more threads to be had: do the work here
      job.part(job.data, i);
    }
  }
  job.part(job.data, 0);
  for (auto& worker : workers) worker.join();
}

struct Team {
  void (*member)(const void*, int, int);
  const void* data;
  std::atomic<int> size{0};  // 0 while threads are still being made
};

void join_team(Team* team, int i) {
  while (team->size == 0) std::this_thread::yield();
  team->member(team->data, i, team->size);
}

}  // namespace

const char* threads_of() { return usable() ? "openmp" : "threads"; }

int64_t parts_for(int64_t bytes, int threads) {
  if (usable() && openmp().in_parallel()) return 1;
  const int64_t useful = bytes / (usable() ? bytes_per_team_thread : bytes_per_new_thread);
  return std::max<int64_t>(1, std::min<int64_t>(threads, useful));
}

void run_parts(int64_t parts, void (*part)(const void*, int64_t), const void* data) {
  Job job{parts, part, data};
  if (parts == 1)
    part(data, 0);
  else if (usable())
    openmp().parallel(team_member, &job, static_cast<unsigned>(parts), 0);
  else
    run_in_new_threads(job);
}

void run_team(int wanted, void (*member)(const void*, int, int), const void* data) {
  Team team{member, data};
  if (usable() && wanted > 1) {
    const auto start = [](void* pointer) {
      const Team& t = *static_cast<const Team*>(pointer);
      t.member(t.data, openmp().thread(), openmp().team());
    };
    return openmp().parallel(start, &team, static_cast<unsigned>(wanted), 0);
  }
  std::vector<std::thread> workers;
  try {
    while (static_cast<int>(workers.size()) + 1 < wanted)
      workers.emplace_back(join_team, &team, static_cast<int>(workers.size()) + 1);
  } catch (const std::system_error&) {  // no more threads to be had
  }
  team.size = static_cast<int>(workers.size()) + 1;
  member(data, 0, team.size);
  for (auto& worker : workers) worker.join();
}

}  // namespace gossamer
