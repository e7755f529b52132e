// Fork-join over rows. Threads live for one call only, so a fork() between calls is safe and nothing idles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace gossamer {

// Below this much memory traffic a thread costs more than it saves.
constexpr int64_t bytes_per_thread = int64_t{1} << 19;

// body(begin, end) runs on contiguous, disjoint row ranges that cover [0, rows); it must not throw.
template <class Body>
void parallel_rows(int64_t rows, int64_t bytes, int threads, const Body& body) {
  const int64_t useful = std::min(rows, bytes / bytes_per_thread);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, useful));
  const auto part = [&](int64_t i) { body(rows * i / parts, rows * (i + 1) / parts); };
  std::vector<std::thread> workers;
  workers.reserve(static_cast<size_t>(parts - 1));
  for (int64_t i = 1; i < parts; ++i) {
    try {
      workers.emplace_back(part, i);
    } catch (const std::system_error&) {  // no more threads to be had: do the work here
      part(i);
    }
  }
  part(0);
  for (auto& worker : workers) worker.join();
}

}  // namespace gossamer
