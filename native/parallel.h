// Fork-join over parts of a job. The threads are those of the OpenMP runtime that the process already has (torch's), so
// that nothing fights over cores; without one, and in a forked child, threads that live for one call only.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace gossamer {

// How many parts are worth making of a job with this much memory traffic; 1 inside somebody else's parallel region.
int64_t parts_for(int64_t bytes, int threads);

// part(data, i) once for every i in [0, parts); it must not throw.
void run_parts(int64_t parts, void (*part)(const void* data, int64_t i), const void* data);

// member(data, i, n) once in each of n threads at the same time, 1 <= n <= wanted: they may wait for one another.
void run_team(int wanted, void (*member)(const void* data, int i, int n), const void* data);

// The runtime whose threads run_parts uses now: "openmp" or "threads".
const char* threads_of();

template <class Body>
void parallel_parts(int64_t parts, const Body& body) {
  run_parts(parts, [](const void* data, int64_t i) { (*static_cast<const Body*>(data))(i); }, &body);
}

template <class Body>
void parallel_team(int wanted, const Body& body) {
  run_team(wanted, [](const void* data, int i, int n) { (*static_cast<const Body*>(data))(i, n); }, &body);
}

// body(begin, end) runs on contiguous, disjoint row ranges that cover [0, rows); it must not throw.
template <class Body>
void parallel_rows(int64_t rows, int64_t bytes, int threads, const Body& body) {
  const int64_t parts = std::max<int64_t>(1, std::min(rows, parts_for(bytes, threads)));
  parallel_parts(parts, [&](int64_t i) { body(rows * i / parts, rows * (i + 1) / parts); });
}

// body(begin, end) runs on row ranges that are disjoint and cover [cut(0), cut(parts)): part i is [cut(i), cut(i + 1)),
// worked off `step` rows at a time from its front, and whoever is done with one goes on with the others'. A core that is
// held up then holds up nobody else; what a thread reads stays in one piece.
template <class Cut, class Body>
void parallel_steps(int64_t parts, int64_t step, const Cut& cut, const Body& body) {
  struct alignas(64) Front {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const std::unique_ptr<Front[]> fronts(new Front[static_cast<size_t>(parts)]);
  for (int64_t i = 0; i < parts; ++i) fronts[i].next = cut(i), fronts[i].end = cut(i + 1);
  parallel_parts(parts, [&](int64_t i) {
    for (int64_t p = 0; p < parts; ++p) {
      Front& front = fronts[(i + p) % parts];
      for (int64_t at; (at = front.next.fetch_add(step)) < front.end;) body(at, std::min(front.end, at + step));
    }
  });
}

}  // namespace gossamer
