#include "build.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "../parallel.h"

namespace gossamer::retrieval {
namespace {

// Products of two such values, summed over any row, stay far inside float32.
constexpr float largest_value = 1e16f;

constexpr int64_t bytes_per_nonzero = 16;

uint32_t posting(uint32_t place, float value, float scale) {
  const auto impact = static_cast<int16_t>(std::lrint(double{value} / scale * impact_one));
  return place | static_cast<uint32_t>(static_cast<uint16_t>(impact)) << 16;
}

uint32_t magnitude(uint32_t posting) { return static_cast<uint32_t>(std::abs(static_cast<int>(posting) >> 16)); }

bool kept(const uint32_t* keep, uint32_t doc) { return keep == nullptr || (keep[doc / 32] >> (doc % 32) & 1) != 0; }

}  // namespace

Builder::Builder(Rows rows, uint32_t dim, bool keep_values, const int64_t* ids, int64_t first_id, int threads)
    : rows_(rows), ids_(ids), threads_(threads) {
  const int64_t nnz = rows.starts[rows.docs] - rows.starts[0];
  if (rows.docs > max_segment_docs || nnz > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("a segment holds up to 2^20 documents and 2^31 - 1 non-zeros");
  std::memcpy(header_.magic, segment_magic, sizeof header_.magic);
  header_.version = segment_version;
  header_.flags = keep_values ? has_values : 0u;
  header_.first_id = first_id;
  if (ids != nullptr && rows.docs > 0) {
    const auto [least, most] = std::minmax_element(ids, ids + rows.docs);
    const uint64_t span = static_cast<uint64_t>(*most) - static_cast<uint64_t>(*least);
    header_.flags |= span < 1u << 20 ? packed_ids : span <= 0xffffffffu ? short_ids : explicit_ids;
    header_.first_id = span <= 0xffffffffu ? *least : 0;
  }
  header_.nnz = static_cast<uint64_t>(nnz);
  header_.docs = static_cast<uint32_t>(rows.docs);
  header_.ranges = (header_.docs + range_docs - 1) / range_docs;
  header_.dim = dim;
  number_columns();
  measure();
  lay_out();
}

void Builder::number_columns() {
  const uint32_t* first = rows_.columns + rows_.starts[0];
  const uint32_t* last = rows_.columns + rows_.starts[rows_.docs];
  const bool small = header_.dim <= 4 * header_.nnz + 65536;
  if (small) {
    numbers_.assign(header_.dim, flat);
    for (const uint32_t* c = first; c != last; ++c) numbers_[*c] = 0;
    for (uint32_t d = 0; d < header_.dim; ++d)
      if (numbers_[d] == 0) columns_.push_back(d);
  } else {
    columns_.assign(first, last);
    std::sort(columns_.begin(), columns_.end());
    columns_.erase(std::unique(columns_.begin(), columns_.end()), columns_.end());
  }
  // Where most dimensions are in use, all of them are columns: no search finds a column.
  if (small && columns_.size() * 4 >= header_.dim) {
    columns_.resize(header_.dim);
    std::iota(columns_.begin(), columns_.end(), 0u);
  }
  if (small)
    for (uint32_t i = 0; i < columns_.size(); ++i) numbers_[columns_[i]] = i;
  header_.columns = static_cast<uint32_t>(columns_.size());
  if (header_.columns > 65536) header_.flags |= wide_columns;
}

uint32_t Builder::number(uint32_t dim) const {
  if (!numbers_.empty()) return numbers_[dim];
  return static_cast<uint32_t>(std::lower_bound(columns_.begin(), columns_.end(), dim) - columns_.begin());
}

void Builder::measure() {
  const uint32_t ranges = header_.ranges;
  table_.assign(header_.columns, Column{0, 0, 0, 0.0f, 0.0f});
  for (int64_t i = rows_.starts[0]; i < rows_.starts[rows_.docs]; ++i) {
    Column& column = table_[number(rows_.columns[i])];
    ++column.count;
    column.largest = std::max(column.largest, std::fabs(rows_.values[i]));
    column.mean += std::fabs(rows_.values[i]);
  }
  uint64_t metas = 0;
  for (Column& column : table_) {
    column.mean /= static_cast<float>(std::max(column.count, 1u));
    column.meta = column.count < flat_share * ranges ? flat : static_cast<uint32_t>(metas);
    if (column.meta != flat) metas += ranges + 1;
  }
  if (metas >= flat) throw std::invalid_argument("a segment has too many columns in use: build from smaller chunks");
  header_.metas = metas;
  meta_.assign(metas, Meta{0, 0.0f});
  norms_.assign(ranges, 0.0f);
  std::vector<uint32_t> longest(ranges, 0);
  parallel_rows(ranges, static_cast<int64_t>(header_.nnz) * bytes_per_nonzero, threads_,
                [&](int64_t begin, int64_t end) {
                  for (int64_t r = begin; r < end; ++r) {
                    const int64_t stop = std::min<int64_t>(rows_.docs, (r + 1) * range_docs);
                    for (int64_t doc = r * range_docs; doc < stop; ++doc) {
                      double square = 0;
                      for (int64_t i = rows_.starts[doc]; i < rows_.starts[doc + 1]; ++i) {
                        const float value = std::fabs(rows_.values[i]);
                        square += double{value} * value;
                        const uint32_t meta = table_[number(rows_.columns[i])].meta;
                        if (meta == flat) continue;
                        Meta& here = meta_[meta + static_cast<uint32_t>(r)];
                        ++here.offset;  // a count, until lay_out
                        here.scale = std::max(here.scale, value);
                      }
                      const auto norm = static_cast<float>(std::sqrt(square) * (1 + 1e-6));
                      norms_[static_cast<size_t>(r)] = std::max(norms_[static_cast<size_t>(r)], norm);
                      const auto length = static_cast<uint32_t>(rows_.starts[doc + 1] - rows_.starts[doc]);
                      longest[static_cast<size_t>(r)] = std::max(longest[static_cast<size_t>(r)], length);
                    }
                  }
                });
  for (uint32_t length : longest) header_.max_row = std::max(header_.max_row, length);
}

void Builder::lay_out() {
  const uint32_t ranges = header_.ranges;
  uint64_t words = 0;
  for (Column& column : table_) {
    column.first = words;
    if (column.meta == flat) {
      words += uint64_t{2} * column.count;
      continue;
    }
    uint32_t offset = 0;
    for (uint32_t r = 0; r < ranges; ++r) {
      Meta& here = meta_[column.meta + r];
      const uint32_t docs = std::min(range_docs, header_.docs - r * range_docs);
      const bool dense = here.offset * dense_share > docs && here.offset > 32;
      const uint32_t size = dense ? dense_words(docs) : here.offset;
      if (dense) here.scale = -here.scale;
      here.offset = offset;
      offset += size;
    }
    meta_[column.meta + ranges].offset = offset;
    words += offset;
  }
  header_.postings = words;
  const bool wide = header_.flags & wide_columns;
  if (header_.flags & has_values) {
    for (int64_t doc = 0; doc < rows_.docs; ++doc)
      header_.words += row_words(static_cast<uint64_t>(rows_.starts[doc + 1] - rows_.starts[doc]), wide);
    if (header_.words > 0xffffffffu) throw std::invalid_argument("a segment is too large: build from smaller chunks");
  }
  uint64_t at = aligned(sizeof(Header));
  const auto place = [&](uint64_t& section, uint64_t bytes) {
    section = at;
    at = aligned(at + bytes);
  };
  place(header_.columns_at, header_.columns * sizeof(uint32_t));
  place(header_.table_at, header_.columns * sizeof(Column));
  place(header_.meta_at, header_.metas * sizeof(Meta));
  place(header_.norms_at, ranges * sizeof(float));
  place(header_.postings_at, header_.postings * sizeof(uint32_t));
  if (header_.flags & has_values) {
    if (rows_are_short()) header_.flags |= short_rows;
    const uint64_t ends = uint64_t{header_.docs} + 1;
    place(header_.rows_at,
          header_.flags & short_rows ? steps_at(header_.docs) + ends * sizeof(uint16_t) : ends * sizeof(uint32_t));
    place(header_.data_at, header_.words * sizeof(uint32_t));
  }
  if (header_.flags & explicit_ids) place(header_.ids_at, header_.docs * sizeof(int64_t));
  if (header_.flags & short_ids) place(header_.ids_at, header_.docs * sizeof(uint32_t));
  if (header_.flags & packed_ids) place(header_.ids_at, nibbles_at(header_.docs) + (uint64_t{header_.docs} + 1) / 2);
  header_.bytes = at;
}

void Builder::write(char* block) const {
  const auto put = [&](uint64_t at, const void* from, uint64_t bytes) {
    if (bytes != 0) std::memcpy(block + at, from, bytes);
    std::memset(block + at + bytes, 0, aligned(at + bytes) - at - bytes);
  };
  put(0, &header_, sizeof header_);
  put(header_.columns_at, columns_.data(), columns_.size() * sizeof(uint32_t));
  put(header_.table_at, table_.data(), table_.size() * sizeof(Column));
  put(header_.meta_at, meta_.data(), meta_.size() * sizeof(Meta));
  put(header_.norms_at, norms_.data(), norms_.size() * sizeof(float));
  if (header_.flags & explicit_ids) put(header_.ids_at, ids_, header_.docs * sizeof(int64_t));
  if (header_.flags & short_ids) {
    std::vector<uint32_t> offsets(header_.docs);
    for (uint32_t i = 0; i < header_.docs; ++i) offsets[i] = static_cast<uint32_t>(ids_[i] - header_.first_id);
    put(header_.ids_at, offsets.data(), offsets.size() * sizeof(uint32_t));
  }
  if (header_.flags & packed_ids) write_packed_ids(block + header_.ids_at);
  auto* postings = reinterpret_cast<uint32_t*>(block + header_.postings_at);
  put(header_.postings_at + header_.postings * sizeof(uint32_t), nullptr, 0);
  write_postings(postings);
  write_flat(postings);
  sort_postings(postings);
  if (header_.flags & has_values) {
    const std::vector<uint32_t> starts = row_starts();
    write_rows(starts.data(), reinterpret_cast<uint32_t*>(block + header_.data_at));
    if (header_.flags & short_rows)
      write_short_rows(starts, block + header_.rows_at);
    else
      put(header_.rows_at, starts.data(), starts.size() * sizeof(uint32_t));
    put(header_.data_at + header_.words * sizeof(uint32_t), nullptr, 0);
  }
}

void Builder::write_postings(uint32_t* postings) const {
  std::vector<uint32_t> next(meta_.size());
  for (size_t i = 0; i < next.size(); ++i) next[i] = meta_[i].offset;
  const int64_t bytes = static_cast<int64_t>(header_.nnz) * bytes_per_nonzero;
  parallel_rows(header_.ranges, bytes, threads_, [&](int64_t begin, int64_t end) {
    for (auto r = static_cast<uint32_t>(begin); r < end; ++r) {
      const uint32_t docs = std::min(range_docs, header_.docs - r * range_docs);
      for (const Column& column : table_)
        if (column.meta != flat && std::signbit(meta_[column.meta + r].scale))
          std::memset(postings + column.first + meta_[column.meta + r].offset, 0, dense_words(docs) * sizeof(uint32_t));
      for (uint32_t place = 0; place < docs; ++place) {
        const int64_t doc = int64_t{r} * range_docs + place;
        for (int64_t i = rows_.starts[doc]; i < rows_.starts[doc + 1]; ++i) {
          const Column& column = table_[number(rows_.columns[i])];
          if (column.meta == flat) continue;
          const Meta& here = meta_[column.meta + r];
          const uint32_t word = posting(place, rows_.values[i], std::fabs(here.scale));
          if (std::signbit(here.scale))
            reinterpret_cast<uint16_t*>(postings + column.first + here.offset)[place] =
                static_cast<uint16_t>(word >> 16);
          else
            postings[column.first + next[column.meta + r]++] = word;
        }
      }
    }
  });
}

void Builder::write_flat(uint32_t* postings) const {
  std::vector<uint32_t> written(table_.size(), 0);
  bool any = false;
  for (const Column& column : table_) any = any || (column.meta == flat && column.count > 0);
  if (!any) return;
  for (int64_t doc = 0; doc < rows_.docs; ++doc)
    for (int64_t i = rows_.starts[doc]; i < rows_.starts[doc + 1]; ++i) {
      const uint32_t n = number(rows_.columns[i]);
      if (table_[n].meta != flat) continue;
      uint32_t* out = postings + table_[n].first + uint64_t{2} * written[n]++;
      out[0] = static_cast<uint32_t>(doc);
      std::memcpy(out + 1, rows_.values + i, sizeof(float));
    }
}

void Builder::sort_postings(uint32_t* postings) const {
  const int64_t bytes = static_cast<int64_t>(header_.nnz) * bytes_per_nonzero;
  parallel_rows(header_.columns, bytes, threads_, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Column& column = table_[static_cast<size_t>(c)];
      if (column.meta == flat) continue;
      for (uint32_t r = 0; r < header_.ranges; ++r) {
        const Meta* here = meta_.data() + column.meta + r;
        if (std::signbit(here[0].scale)) continue;
        std::sort(postings + column.first + here[0].offset, postings + column.first + here[1].offset,
                  [](uint32_t a, uint32_t b) {
                    const uint32_t x = magnitude(a), y = magnitude(b);
                    return x != y ? x > y : (a & 0xffff) < (b & 0xffff);
                  });
      }
    }
  });
}

std::vector<uint32_t> Builder::row_starts() const {
  std::vector<uint32_t> starts{0};
  starts.reserve(static_cast<size_t>(rows_.docs) + 1);
  for (int64_t doc = 0; doc < rows_.docs; ++doc) {
    const auto length = static_cast<uint64_t>(rows_.starts[doc + 1] - rows_.starts[doc]);
    starts.push_back(starts.back() + static_cast<uint32_t>(row_words(length, header_.flags & wide_columns)));
  }
  return starts;
}

bool Builder::rows_are_short() const {
  const std::vector<uint32_t> starts = row_starts();
  for (size_t i = 0; i < starts.size(); ++i)
    if (starts[i] - starts[i / row_block * row_block] > 0xffff) return false;
  return true;
}

void Builder::write_short_rows(const std::vector<uint32_t>& starts, char* out) const {
  const uint64_t first = steps_at(header_.docs), bytes = first + starts.size() * sizeof(uint16_t);
  std::memset(out, 0, aligned(bytes));
  auto* rows = reinterpret_cast<uint32_t*>(out);
  auto* steps = reinterpret_cast<uint16_t*>(out + first);
  for (size_t i = 0; i < starts.size(); ++i) {
    rows[i / row_block] = starts[i / row_block * row_block];
    steps[i] = static_cast<uint16_t>(starts[i] - rows[i / row_block]);
  }
}

void Builder::write_packed_ids(char* out) const {
  const uint64_t first = nibbles_at(header_.docs), bytes = first + (uint64_t{header_.docs} + 1) / 2;
  std::memset(out, 0, aligned(bytes));
  auto* low = reinterpret_cast<uint16_t*>(out);
  auto* high = reinterpret_cast<uint8_t*>(out + first);
  for (uint32_t i = 0; i < header_.docs; ++i) {
    const auto offset = static_cast<uint32_t>(ids_[i] - header_.first_id);
    low[i] = static_cast<uint16_t>(offset);
    high[i / 2] = static_cast<uint8_t>(high[i / 2] | (offset >> 16) << (i % 2 * 4));
  }
}

void Builder::write_rows(const uint32_t* starts, uint32_t* data) const {
  const bool wide = header_.flags & wide_columns;
  const int64_t bytes = static_cast<int64_t>(header_.nnz) * bytes_per_nonzero;
  parallel_rows(rows_.docs, bytes, threads_, [&](int64_t begin, int64_t end) {
    for (int64_t doc = begin; doc < end; ++doc) {
      const int64_t first = rows_.starts[doc], length = rows_.starts[doc + 1] - first;
      uint32_t* row = data + starts[doc];
      if (starts[doc + 1] != starts[doc]) row[row_words(static_cast<uint64_t>(length), wide) - length - 1] = 0;
      for (int64_t i = 0; i < length; ++i) {
        const uint32_t n = number(rows_.columns[first + i]);
        if (wide)
          row[i] = n;
        else
          reinterpret_cast<uint16_t*>(row)[i] = static_cast<uint16_t>(n);
      }
      if (length > 0)
        std::memcpy(data + starts[doc + 1] - length, rows_.values + first, static_cast<size_t>(length) * sizeof(float));
    }
  });
}

template <class Index>
Finding tidy(int64_t docs, const int64_t* starts, const Index* columns, const float* values, int64_t nnz, int64_t dim,
             int64_t* starts_out, uint32_t* columns_out, float* values_out) {
  if (starts[0] < 0 || starts[docs] > nnz) return {Fault::starts, 0, 0};
  std::vector<std::pair<uint32_t, float>> row;
  int64_t out = 0;
  for (int64_t doc = 0; doc < docs; ++doc) {
    if (starts[doc + 1] < starts[doc] || starts[doc + 1] > nnz) return {Fault::starts, doc, 0};
    starts_out[doc] = out;
    const int64_t first = out;
    bool ascending = true;
    for (int64_t i = starts[doc]; i < starts[doc + 1]; ++i) {
      if (columns[i] < 0) return {Fault::negative, doc, 0};
      if (columns[i] >= dim) return {Fault::too_large, doc, 0};
      if (!std::isfinite(values[i])) return {Fault::not_finite, doc, 0};
      if (std::fabs(values[i]) > largest_value) return {Fault::too_big, doc, 0};
      if (i > starts[doc] && columns[i] <= columns[i - 1]) ascending = false;
      columns_out[out] = static_cast<uint32_t>(columns[i]);
      values_out[out++] = values[i];
    }
    if (!ascending) {
      row.clear();
      for (int64_t i = first; i < out; ++i) row.emplace_back(columns_out[i], values_out[i]);
      std::sort(row.begin(), row.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
      for (size_t i = 0; i < row.size(); ++i) {
        if (i > 0 && row[i].first == row[i - 1].first) return {Fault::duplicate, doc, 0};
        columns_out[first + static_cast<int64_t>(i)] = row[i].first;
        values_out[first + static_cast<int64_t>(i)] = row[i].second;
      }
    }
    int64_t to = first;
    for (int64_t i = first; i < out; ++i)
      if (values_out[i] != 0.0f) {
        columns_out[to] = columns_out[i];
        values_out[to++] = values_out[i];
      }
    out = to;
  }
  starts_out[docs] = out;
  return {Fault::none, 0, out};
}

template Finding tidy(int64_t, const int64_t*, const int32_t*, const float*, int64_t, int64_t, int64_t*, uint32_t*,
                      float*);
template Finding tidy(int64_t, const int64_t*, const int64_t*, const float*, int64_t, int64_t, int64_t*, uint32_t*,
                      float*);

namespace {

// Calls body(doc, column's dimension, value) for every posting, columns ascending.
template <class Body>
void each_posting(const Segment& s, const Body& body) {
  for (uint32_t c = 0; c < s.header->columns; ++c) {
    const Column& column = s.table[c];
    const uint32_t* words = s.postings + column.first;
    if (column.meta == flat) {
      for (uint32_t i = 0; i < column.count; ++i) {
        float value;
        std::memcpy(&value, words + 2 * i + 1, sizeof value);
        if (words[2 * i] < s.docs() && value != 0.0f) body(words[2 * i], s.columns[c], value);
      }
      continue;
    }
    for (uint32_t r = 0; r < s.header->ranges; ++r) {
      const Meta* here = s.meta + column.meta + r;
      const float unit = std::fabs(here->scale) / impact_one;
      const uint32_t base = r * range_docs, docs = s.docs_in(r);
      const auto* row = reinterpret_cast<const int16_t*>(words + here[0].offset);
      if (std::signbit(here->scale)) {
        for (uint32_t i = 0; i < docs; ++i)
          if (row[i] != 0) body(base + i, s.columns[c], row[i] * unit);
        continue;
      }
      for (uint32_t i = here[0].offset; i < here[1].offset; ++i) {
        const int impact = static_cast<int>(words[i]) >> 16;
        if ((words[i] & 0xffff) < docs && impact != 0) body(base + (words[i] & 0xffff), s.columns[c], impact * unit);
      }
    }
  }
}

}  // namespace

void count_rows(const Segment& s, const uint32_t* keep, int64_t* lengths) {
  std::vector<int64_t> all(s.docs(), 0);
  if (s.exact())
    for (uint32_t doc = 0; doc < s.docs(); ++doc) all[doc] = s.row_length(doc);
  else
    each_posting(s, [&](uint32_t doc, uint32_t, float) { ++all[doc]; });
  for (uint32_t doc = 0; doc < s.docs(); ++doc)
    if (kept(keep, doc)) *lengths++ = all[doc];
}

void extract_rows(const Segment& s, const uint32_t* keep, const int64_t* starts, uint32_t* columns, float* values) {
  if (s.exact()) {
    for (uint32_t doc = 0; doc < s.docs(); ++doc) {
      if (!kept(keep, doc)) continue;
      const uint32_t* row = s.data + s.row(doc);
      const uint32_t length = s.row_length(doc);
      const int64_t first = *starts++;
      for (uint32_t i = 0; i < length; ++i) {
        const uint32_t n = s.wide() ? row[i] : reinterpret_cast<const uint16_t*>(row)[i];
        columns[first + i] = n < s.header->columns ? s.columns[n] : 0;
      }
      if (length > 0) std::memcpy(values + first, s.values(doc), length * sizeof(float));
    }
    return;
  }
  std::vector<int64_t> next(s.docs(), -1);
  for (uint32_t doc = 0; doc < s.docs(); ++doc)
    if (kept(keep, doc)) next[doc] = *starts++;
  each_posting(s, [&](uint32_t doc, uint32_t dim, float value) {
    if (next[doc] < 0) return;
    columns[next[doc]] = dim;
    values[next[doc]++] = value;
  });
}

}  // namespace gossamer::retrieval
