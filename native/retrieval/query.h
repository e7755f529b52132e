// A query as search sees it: the columns of a segment that it asks for, and its weights by column.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "build.h"
#include "kernels.h"
#include "segment.h"

namespace gossamer::retrieval {

struct Query {
  const uint32_t* dims;
  const float* weights;
  uint32_t length;
};

inline Query query_of(const Rows& rows, int64_t i) {
  const int64_t first = rows.starts[i];
  return {rows.columns + first, rows.values + first, static_cast<uint32_t>(rows.starts[i + 1] - first)};
}

// A column of a segment that a query asks for.
struct Term {
  float weight;
  const Column* entry;
  const uint32_t* postings;
  const Meta* meta;  // nullptr: flat
  uint32_t next;     // flat: the first pair of the range to come
};

inline uint32_t word(const uint32_t* pairs, uint32_t i) { return pairs[2 * uint64_t{i}]; }

inline float flat_value(const uint32_t* pairs, uint32_t i) {
  float value;
  std::memcpy(&value, pairs + 2 * uint64_t{i} + 1, sizeof value);
  return value;
}

// Always inline: GCC takes a function that only prefetches for one without effect, and drops calls of it.
inline __attribute__((always_inline)) void prefetch(const void* from, const void* to, int64_t most) {
  const char* p = static_cast<const char*>(from);
  const char* end = std::min(static_cast<const char*>(to), p + most);
  for (; p < end; p += 64) __builtin_prefetch(p, 0, 3);
}

// Fetches rows of documents before they are scored one after the other.
class Ahead {
 public:
  template <class DocAt>
  Ahead(const Segment& s, size_t docs, const DocAt& doc_at) : s_(s), docs_(docs) {
    for (size_t i = 0; i < std::min(docs, far); ++i) s.prefetch_row(doc_at(i));
    for (size_t i = 0; i < std::min(docs, near); ++i) row(doc_at(i));
  }
  // Before document i is scored.
  template <class DocAt>
  void fetch(size_t i, const DocAt& doc_at) const {
    if (i + far < docs_) s_.prefetch_row(doc_at(i + far));
    if (i + near < docs_) row(doc_at(i + near));
  }

 private:
  static constexpr size_t far = 32, near = 12;
  void row(uint32_t doc) const { prefetch(s_.data + s_.row(doc), s_.data + s_.row(doc + 1), 4096); }
  const Segment& s_;
  const size_t docs_;
};

// The first pair of a flat column that lies in a range or after it.
inline uint32_t flat_start(const uint32_t* pairs, uint32_t count, uint32_t range) {
  uint32_t low = 0, high = count;
  while (low < high) {
    const uint32_t mid = (low + high) / 2;
    if (word(pairs, mid) < range * range_docs)
      low = mid + 1;
    else
      high = mid;
  }
  return low;
}

// Three passes, so that what they look up is fetched side by side.
inline std::vector<Term> terms_of(const Segment& s, const Query& query, uint32_t first_range) {
  std::vector<Term> terms;
  terms.reserve(query.length);
  for (uint32_t i = 0; i < query.length; ++i) {
    const uint32_t column = s.find(query.dims[i]);
    if (column == flat) continue;
    const Column* entry = s.table + column;
    __builtin_prefetch(entry);
    terms.push_back({query.weights[i], entry, nullptr, nullptr, 0});
  }
  terms.erase(std::remove_if(terms.begin(), terms.end(), [](const Term& t) { return t.entry->count == 0; }),
              terms.end());
  for (const Term& t : terms)
    if (t.entry->meta != flat)
      prefetch(s.meta + t.entry->meta + first_range, s.meta + t.entry->meta + s.header->ranges, 256);
  for (Term& t : terms) {
    t.postings = s.postings + t.entry->first;
    if (t.entry->meta != flat)
      t.meta = s.meta + t.entry->meta;
    else
      t.next = flat_start(t.postings, t.entry->count, first_range);
  }
  // Flat ones first, they are never left out; then by weight, so that the last ones can be.
  std::sort(terms.begin(), terms.end(), [](const Term& a, const Term& b) {
    return (a.meta == nullptr) != (b.meta == nullptr) ? a.meta == nullptr : std::fabs(a.weight) > std::fabs(b.weight);
  });
  return terms;
}

constexpr uint32_t scores_at_once = 64;

// The weights of a query by column, for as long as this lives.
class Table {
 public:
  Table(const Segment& s, const Query& query, std::vector<float>& table) : table_(table) {
    const size_t size = std::max<size_t>(65536, size_t{s.header->columns} + 1);
    if (table_.size() < size) table_.resize(size, 0.0f);
    for (uint32_t i = 0; i < query.length; ++i) {
      const uint32_t column = s.find(query.dims[i]);
      if (column == flat) continue;
      table_[column] = query.weights[i];
      set_.push_back(column);
    }
  }
  ~Table() {
    for (uint32_t column : set_) table_[column] = 0.0f;
  }
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  float score(const Segment& s, uint32_t doc) const {
    const uint32_t* row = s.data + s.row(doc);
    const uint32_t length = s.row_length(doc);
    const float* values = s.values(doc);
    if (s.wide()) {
      const uint32_t columns = s.header->columns;
      return sum(length, values, [=](uint32_t i) { return std::min(row[i], columns); });
    }
    const auto* narrow = reinterpret_cast<const uint16_t*>(row);
    return sum(length, values, [=](uint32_t i) { return narrow[i]; });
  }

  // The same of documents begin to end, `scores_at_once` at most, added up in any order.
  void score(const Segment& s, uint32_t begin, uint32_t end, float* scores) const {
    if (!s.wide()) {
      uint32_t rows[scores_at_once + 1];
      for (uint32_t doc = begin; doc <= end; ++doc) rows[doc - begin] = s.row(doc);
      return kernels().score(table_.data(), rows, s.data, end - begin, scores);
    }
    for (uint32_t doc = begin; doc < end; ++doc) scores[doc - begin] = score(s, doc);
  }

 private:
  // In order, but only products that are there wait for the sum before them.
  template <class ColumnAt>
  float sum(uint32_t length, const float* values, ColumnAt column) const {
    constexpr uint32_t most = 128;
    float products[most], total = 0;
    for (uint32_t first = 0; first < length; first += most) {
      const uint32_t end = std::min(length, first + most);
      uint32_t n = 0;
      for (uint32_t i = first; i < end; ++i) {
        const float weight = table_[column(i)];
        products[n] = weight * values[i];
        n += weight != 0.0f;
      }
      for (uint32_t i = 0; i < n; ++i) total += products[i];
    }
    return total;
  }

  std::vector<float>& table_;
  std::vector<uint32_t> set_;
};

}  // namespace gossamer::retrieval
