#include "segment.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace gossamer::retrieval {
namespace {

[[noreturn]] void damaged(const char* what) {
  throw std::invalid_argument(std::string("the index is damaged (") + what + "): restore the file or build it again");
}

void expect(bool holds, const char* what) {
  if (!holds) damaged(what);
}

template <class T>
const T* section(const char* block, uint64_t bytes, uint64_t at, uint64_t count) {
  expect(at % 64 == 0 && at >= sizeof(Header) && at <= bytes && count <= (bytes - at) / sizeof(T),
         "section out of bounds");
  return reinterpret_cast<const T*>(block + at);
}

void check_column(const Segment& s, const Column& column) {
  const Header& h = *s.header;
  expect(column.first <= h.postings, "column out of bounds");
  expect(column.largest >= 0 && std::isfinite(column.largest), "column maximum");
  if (column.meta == flat) return expect(column.count <= (h.postings - column.first) / 2, "column out of bounds");
  expect(column.meta <= h.metas && h.ranges + 1 <= h.metas - column.meta, "column table");
  const Meta* meta = s.meta + column.meta;
  expect(meta[0].offset == 0 && meta[h.ranges].offset <= h.postings - column.first, "postings out of bounds");
  for (uint32_t r = 0; r < h.ranges; ++r) {
    expect(meta[r].offset <= meta[r + 1].offset && std::isfinite(meta[r].scale), "postings out of order");
    const uint32_t size = meta[r + 1].offset - meta[r].offset;
    expect(std::signbit(meta[r].scale) ? size == dense_words(s.docs_in(r)) : size <= range_docs, "postings of a range");
  }
}

}  // namespace

uint32_t Segment::find(uint32_t dim) const {
  const uint32_t n = header->columns;
  if (n == header->dim) return dim < n ? dim : flat;
  if (dim >= header->dim) return flat;
  // As many columns lie before it as dimensions, less those that are not in use.
  const uint32_t spare = header->dim - n;
  const uint32_t* found =
      std::lower_bound(columns + (dim > spare ? dim - spare : 0), columns + std::min(n, dim + 1), dim);
  return found != columns + n && *found == dim ? static_cast<uint32_t>(found - columns) : flat;
}

Segment open_segment(const void* memory, uint64_t bytes) {
  const char* block = static_cast<const char*>(memory);
  expect(bytes >= sizeof(Header) && reinterpret_cast<uintptr_t>(block) % 8 == 0, "too short");
  Segment s;
  s.header = reinterpret_cast<const Header*>(block);
  const Header& h = *s.header;
  expect(std::memcmp(h.magic, segment_magic, sizeof h.magic) == 0, "not a segment");
  if (h.version > segment_version)
    throw std::invalid_argument("a newer Gossamer wrote this index: upgrade gossamer to read it");
  expect(h.bytes == bytes && (h.flags & ~known_flags) == 0, "header");
  expect(h.docs <= max_segment_docs && h.ranges == (h.docs + range_docs - 1) / range_docs, "number of documents");
  expect(h.columns <= h.dim && ((h.flags & wide_columns) != 0) == (h.columns > 65536), "number of columns");
  s.columns = section<uint32_t>(block, bytes, h.columns_at, h.columns);
  s.table = section<Column>(block, bytes, h.table_at, h.columns);
  s.meta = section<Meta>(block, bytes, h.meta_at, h.metas);
  s.norms = section<float>(block, bytes, h.norms_at, h.ranges);
  s.postings = section<uint32_t>(block, bytes, h.postings_at, h.postings);
  if (s.exact()) {
    const bool small = h.flags & short_rows;
    s.rows = section<uint32_t>(block, bytes, h.rows_at, small ? h.docs / row_block + 1 : uint64_t{h.docs} + 1);
    if (small) s.steps = section<uint16_t>(block, bytes, h.rows_at + steps_at(h.docs), uint64_t{h.docs} + 1);
    s.data = section<uint32_t>(block, bytes, h.data_at, h.words);
    expect(s.row(0) == 0 && s.row(h.docs) == h.words, "rows");
    for (uint32_t i = 0; i < h.docs; ++i) expect(s.row(i) <= s.row(i + 1), "rows out of order");
  }
  if (h.flags & explicit_ids) s.ids = section<int64_t>(block, bytes, h.ids_at, h.docs);
  if (h.flags & short_ids) s.offsets = section<uint32_t>(block, bytes, h.ids_at, h.docs);
  if (h.flags & packed_ids) {
    s.low_ids = section<uint16_t>(block, bytes, h.ids_at, h.docs);
    s.high_ids = section<uint8_t>(block, bytes, h.ids_at + nibbles_at(h.docs), (uint64_t{h.docs} + 1) / 2);
  }
  for (uint32_t i = 0; i < h.columns; ++i) {
    expect(s.columns[i] < h.dim && (i == 0 || s.columns[i - 1] < s.columns[i]), "columns out of order");
    check_column(s, s.table[i]);
  }
  for (uint32_t r = 0; r < h.ranges; ++r) expect(s.norms[r] >= 0, "norms");
  return s;
}

void check_groups(const Segment& s, const Segment& centres, const uint32_t* starts, uint64_t count) {
  expect(s.exact() && count == uint64_t{centres.docs()} + 1, "number of groups");
  expect(starts[0] == 0 && starts[count - 1] == s.docs(), "groups out of bounds");
  for (uint64_t i = 1; i < count; ++i) expect(starts[i - 1] <= starts[i], "groups out of order");
}

}  // namespace gossamer::retrieval
