// From compressed rows to a segment, in two steps so that the caller owns the memory: plan, then write.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "segment.h"

namespace gossamer::retrieval {

// Rows whose columns ascend; every value is finite and not zero (see `tidy`).
struct Rows {
  int64_t docs;
  const int64_t* starts;  // docs + 1
  const uint32_t* columns;
  const float* values;
};

class Builder {
 public:
  // ids: docs of them, or nullptr for first_id, first_id + 1, ...  Throws std::invalid_argument.
  Builder(Rows rows, uint32_t dim, bool keep_values, const int64_t* ids, int64_t first_id, int threads);
  uint64_t bytes() const { return header_.bytes; }
  void write(char* block) const;  // 64-byte aligned, bytes() long

 private:
  void number_columns();
  void measure();
  void lay_out();
  uint32_t number(uint32_t dim) const;
  void write_postings(uint32_t* postings) const;
  void write_flat(uint32_t* postings) const;
  void sort_postings(uint32_t* postings) const;
  std::vector<uint32_t> row_starts() const;
  bool rows_are_short() const;
  void write_short_rows(const std::vector<uint32_t>& starts, char* out) const;
  void write_packed_ids(char* out) const;
  void write_rows(const uint32_t* starts, uint32_t* data) const;

  Rows rows_;
  const int64_t* ids_;
  int threads_;
  Header header_{};
  std::vector<uint32_t> columns_;  // dimensions in use, ascending
  std::vector<uint32_t> numbers_;  // dimension -> column; empty where that would be much larger than the rows
  std::vector<Column> table_;
  std::vector<Meta> meta_;
  std::vector<float> norms_;
};

// What is wrong with rows as a caller gave them; `row` is the first row with that fault.
enum class Fault : int { none, starts, negative, too_large, duplicate, not_finite, too_big };
struct Finding {
  Fault fault = Fault::none;
  int64_t row = 0;
  int64_t kept = 0;  // non-zeros
};

// Sorts each row by column and drops zeros. Index is int32_t or int64_t; columns and values have room for all of them.
template <class Index>
Finding tidy(int64_t docs, const int64_t* starts, const Index* columns, const float* values, int64_t nnz, int64_t dim,
             int64_t* starts_out, uint32_t* columns_out, float* values_out);

// The documents of `keep` (one bit each; nullptr: all) as rows again. Exact values where the segment has them, else
// impacts times their scale. count_rows: non-zeros of each kept document; extract_rows: starts is their exclusive sum.
void count_rows(const Segment& s, const uint32_t* keep, int64_t* lengths);
void extract_rows(const Segment& s, const uint32_t* keep, const int64_t* starts, uint32_t* columns, float* values);

}  // namespace gossamer::retrieval
