// A segment: an immutable run of documents, one block of bytes that is the same in memory and in a file.
//
//   header | columns u32 | table Column | meta Meta | norms f32 | postings u32 | rows | data u32 | ids
//
// Documents are cut into ranges of 16,384, whose int16 accumulators fit the first-level cache. Columns in use are
// numbered in ascending order. A column's postings lie range after range; a posting is the document's place in its
// range (low 16 bits) and its impact as a share of the largest |value| of that column and range, in 1 / 32767 (high 16
// bits). Within a range they are in descending order of |impact|. A column held by more than a quarter of a range is
// there a row of int16 impacts instead. A rare column is flat: pairs of (document, float32 value) in ascending order of
// document. Where documents' rows begin is u32, or u32 for every 64th and u16 from there on (short_rows). Ids count up,
// or are i64 (explicit_ids), or beyond the first id u32 (short_ids) or 20 bits: u16, then nibbles (packed_ids).
// Every section starts on a multiple of 64 bytes. Integers are little-endian.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace gossamer::retrieval {

constexpr uint32_t range_docs = 16384;
constexpr uint32_t dense_share = 4;  // a row where more than 1 / 4 of a range holds the column
constexpr uint32_t flat_share = 4;   // flat where there are fewer than 4 postings a range
constexpr uint32_t max_segment_docs = 1u << 20;
constexpr float impact_one = 32767.0f;
constexpr uint32_t flat = 0xffffffffu;
constexpr uint32_t segment_version = 3;  // 3: short rows, packed ids
constexpr char segment_magic[8] = {'G', 'O', 'S', 'S', 'E', 'G', '0', '1'};

constexpr uint32_t row_block = 64;  // documents whose rows are counted from the first one's
enum Flag : uint32_t {
  has_values = 1,
  wide_columns = 2,
  explicit_ids = 4,
  short_ids = 8,
  short_rows = 16,
  packed_ids = 32,
  known_flags = 63
};

struct Header {
  char magic[8];
  uint32_t version, flags;
  uint64_t bytes, nnz;
  uint32_t docs, ranges, columns, dim;
  uint32_t max_row, reserved;
  int64_t first_id;
  uint64_t columns_at, table_at, meta_at, metas, norms_at, postings_at, postings, rows_at, data_at, words, ids_at;
};

struct Column {
  uint64_t first;  // of its postings, in words
  uint32_t count;  // documents that hold it
  uint32_t meta;   // first of its ranges + 1 entries, or `flat`
  float largest;   // |value|
  float mean;      // |value|; 0 in files of before it was kept
};

struct Meta {
  uint32_t offset;  // in words from Column::first
  float scale;      // |value| of impact 32767; negative: a dense row
};

struct Segment {
  const Header* header = nullptr;
  const uint32_t* columns = nullptr;
  const Column* table = nullptr;
  const Meta* meta = nullptr;
  const float* norms = nullptr;  // largest |document| of each range, rounded up
  const uint32_t* postings = nullptr;
  const uint32_t* rows = nullptr;   // docs + 1 in words of data, or every 64th
  const uint16_t* steps = nullptr;  // docs + 1 from there, where rows are short
  const uint32_t* data = nullptr;   // a document's columns, then its float32 values
  const int64_t* ids = nullptr;
  const uint32_t* offsets = nullptr;  // of ids from the first, where they are short
  const uint16_t* low_ids = nullptr;  // where they are packed
  const uint8_t* high_ids = nullptr;

  uint32_t docs() const { return header->docs; }
  bool exact() const { return header->flags & has_values; }
  bool wide() const { return header->flags & wide_columns; }
  int64_t id(uint32_t doc) const {
    if (ids != nullptr) return ids[doc];
    if (low_ids == nullptr) return header->first_id + (offsets != nullptr ? offsets[doc] : doc);
    return header->first_id + (low_ids[doc] | (high_ids[doc / 2] >> (doc % 2 * 4) & 15u) << 16);
  }
  bool running_ids() const { return ids == nullptr && offsets == nullptr && low_ids == nullptr; }
  uint32_t row(uint32_t doc) const { return steps != nullptr ? rows[doc / row_block] + steps[doc] : rows[doc]; }
  const float* values(uint32_t doc) const {
    return reinterpret_cast<const float*>(data + row(doc + 1)) - row_length(doc);
  }
  void prefetch_row(uint32_t doc) const {
    if (steps == nullptr) return __builtin_prefetch(rows + doc);
    __builtin_prefetch(rows + doc / row_block);
    __builtin_prefetch(steps + doc);
  }
  uint32_t docs_in(uint32_t range) const {
    const uint32_t left = header->docs - range * range_docs;
    return left < range_docs ? left : range_docs;
  }
  uint32_t row_length(uint32_t doc) const {
    const uint32_t size = row(doc + 1) - row(doc);
    return wide() ? size / 2 : size * 2 / 3;
  }
  // Place of a dimension among the columns in use, or `flat` if no document holds it.
  uint32_t find(uint32_t dim) const;
};

// Words that a dense row of `docs` documents takes: kernels step by 32 documents.
constexpr uint32_t dense_words(uint32_t docs) { return (docs + 31) / 32 * 16; }
// Words of a document with `length` non-zeros.
constexpr uint64_t row_words(uint64_t length, bool wide) { return wide ? length * 2 : length + (length + 1) / 2; }
constexpr uint64_t aligned(uint64_t bytes) { return (bytes + 63) / 64 * 64; }
// Bytes from the start of short rows to their steps, and of packed ids to their nibbles.
constexpr uint64_t steps_at(uint64_t docs) { return aligned((docs / row_block + 1) * sizeof(uint32_t)); }
constexpr uint64_t nibbles_at(uint64_t docs) { return aligned(docs * sizeof(uint16_t)); }

// Checks everything that search relies on, so that no damaged block makes it read or write out of bounds.
// Throws std::invalid_argument.
Segment open_segment(const void* block, uint64_t bytes);

// Whether `count` starts cut the documents of a segment into as many groups as there are centres, and have values to
// score. Throws std::invalid_argument.
void check_groups(const Segment& s, const Segment& centres, const uint32_t* starts, uint64_t count);

}  // namespace gossamer::retrieval
