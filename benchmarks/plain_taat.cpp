// The plain loop that bench_index.py compares with: column lists of (u32, f32), one float per document, a heap of k.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

extern "C" void plain_search(int64_t docs, const int64_t* starts, const uint32_t* ids, const float* values, int64_t queries,
                             const int64_t* q_starts, const int32_t* q_columns, const float* q_values, int64_t k,
                             float* acc, int64_t* out) {
  for (int64_t q = 0; q < queries; ++q) {
    std::memset(acc, 0, static_cast<size_t>(docs) * sizeof(float));
    for (int64_t t = q_starts[q]; t < q_starts[q + 1]; ++t) {
      const float w = q_values[t];
      for (int64_t p = starts[q_columns[t]], end = starts[q_columns[t] + 1]; p < end; ++p) acc[ids[p]] += w * values[p];
    }
    std::vector<std::pair<float, int64_t>> heap;
    float bar = 0;
    for (int64_t i = 0; i < docs; i += 64) {
      const int64_t end = std::min(docs, i + 64);
      float best = 0;
      for (int64_t j = i; j < end; ++j) best = std::max(best, acc[j]);  // a block at a time: the compiler vectorises it
      if (best <= bar) continue;
      for (int64_t j = i; j < end; ++j) {
        if (acc[j] <= bar) continue;
        heap.emplace_back(acc[j], j);
        std::push_heap(heap.begin(), heap.end(), std::greater<>());
        if (static_cast<int64_t>(heap.size()) <= k) continue;
        std::pop_heap(heap.begin(), heap.end(), std::greater<>());
        heap.pop_back();
        bar = heap.front().first;
      }
    }
    std::sort(heap.begin(), heap.end(), std::greater<>());
    for (int64_t i = 0; i < k; ++i) out[q * k + i] = i < static_cast<int64_t>(heap.size()) ? heap[i].second : -1;
  }
}
