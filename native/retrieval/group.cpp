#include "group.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "../parallel.h"
#include "query.h"
#include "segment.h"

namespace gossamer::retrieval {
namespace {

constexpr double energy = 0.98;      // of a document's squared length that the values looked at hold
constexpr double first_look = 0.9;   // the same of the values that choose a few centres to look at closely
constexpr float near_enough = 0.5f;  // of the best, by those values
constexpr uint32_t most_looked_at = 64;
constexpr size_t most_first = 24;       // of those values
constexpr int64_t sample_a_group = 14;  // documents that a centre is learnt from
// Each step adds a share of the centres: documents drawn from the share of the sample that fits the others worst.
struct Step {
  double centres, pool;
};
constexpr Step steps[] = {{0.6, 1.0}, {0.4, 0.5}, {0.3, 0.3}, {0.25, 0.2}, {0.2, 0.15}, {0, 0}, {0, 0}};
constexpr uint32_t most_centres = 65536, largest_group = 4;
constexpr int64_t work_a_document = 1 << 16;  // bytes, for parallel_rows

struct Matrix {
  std::vector<int64_t> starts{0};
  std::vector<uint32_t> columns;
  std::vector<float> values;
  std::vector<float> light;  // documents: values below this come second
  int64_t docs() const { return static_cast<int64_t>(starts.size()) - 1; }
  Rows rows() const { return {docs(), starts.data(), columns.data(), values.data()}; }
};

// Dimensions in use, ascending: scratch memory is as long as this, not as the dimension.
std::vector<uint32_t> used(const Rows& rows, uint32_t dim) {
  const uint32_t *first = rows.columns + rows.starts[0], *last = rows.columns + rows.starts[rows.docs];
  std::vector<uint32_t> found;
  if (dim <= 1u << 27) {
    std::vector<bool> seen(dim, false);
    for (const uint32_t* c = first; c != last; ++c) seen[*c] = true;
    for (uint32_t d = 0; d < dim; ++d)
      if (seen[d]) found.push_back(d);
  } else {
    found.assign(first, last);
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
  }
  return found;
}

// Keeps the `most` largest |values| of pairs, or fewer that hold enough of the energy; then by column.
void thin(std::vector<std::pair<uint32_t, float>>& row, size_t most, double enough) {
  std::sort(row.begin(), row.end(),
            [](const auto& a, const auto& b) { return std::fabs(a.second) > std::fabs(b.second); });
  double total = 0, held = 0;
  for (const auto& [column, value] : row) total += double{value} * value;
  size_t n = 0;
  while (n < row.size() && n < most && held < enough * total) {
    held += double{row[n].second} * row[n].second;
    ++n;
  }
  row.resize(n);
  std::sort(row.begin(), row.end());
}

// Documents of unit length, without their light values, columns numbered by place in `dims`.
Matrix heavy(const Rows& rows, uint32_t dim, const std::vector<uint32_t>& dims) {
  std::vector<uint32_t> number;
  if (dim <= 1u << 27) {
    number.assign(dim, 0);
    for (size_t i = 0; i < dims.size(); ++i) number[dims[i]] = static_cast<uint32_t>(i);
  }
  Matrix out;
  out.starts.reserve(static_cast<size_t>(rows.docs) + 1);
  std::vector<std::pair<uint32_t, float>> row;
  for (int64_t doc = 0; doc < rows.docs; ++doc) {
    row.clear();
    for (int64_t i = rows.starts[doc]; i < rows.starts[doc + 1]; ++i) {
      const uint32_t dim_i = rows.columns[i];
      const uint32_t n = number.empty()
                             ? static_cast<uint32_t>(std::lower_bound(dims.begin(), dims.end(), dim_i) - dims.begin())
                             : number[dim_i];
      row.emplace_back(n, rows.values[i]);
    }
    thin(row, row.size(), energy);
    double square = 0;
    for (const auto& [column, value] : row) square += double{value} * value;
    const auto scale = static_cast<float>(square > 0 ? 1 / std::sqrt(square) : 0);
    for (const auto& [column, value] : row) {
      out.columns.push_back(column);
      out.values.push_back(value * scale);
    }
    out.starts.push_back(static_cast<int64_t>(out.columns.size()));
    thin(row, most_first, first_look);
    float light = row.empty() ? 0.0f : std::fabs(row[0].second);
    for (const auto& [column, value] : row) light = std::min(light, std::fabs(value));
    out.light.push_back(light * scale);
  }
  return out;
}

// What a thread needs to compare documents with centres.
struct Bench {
  std::vector<int16_t> sums = std::vector<int16_t>(accumulators + 32);
  std::vector<uint16_t> places = std::vector<uint16_t>(range_docs);
  std::vector<int16_t> maxima = std::vector<int16_t>(groups);
  std::vector<float> weights = std::vector<float>(65536, 0.0f);

  int16_t* acc() { return reinterpret_cast<int16_t*>((reinterpret_cast<uintptr_t>(sums.data()) + 63) / 64 * 64); }
};

// Centres as an inverted index, and the nearest of them to a document.
class Centres {
 public:
  Centres(const Matrix& centres, uint32_t dims, int threads) {
    const Builder builder(centres.rows(), std::max(dims, 1u), true, nullptr, 0, threads);
    memory_.resize(builder.bytes() / 8 + 8);
    const auto at = (reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64;
    builder.write(reinterpret_cast<char*>(at));
    segment_ = open_segment(reinterpret_cast<const void*>(at), builder.bytes());
  }

  // Likeness is at most 1. The heaviest values choose some centres, which all values are compared with.
  std::pair<uint32_t, float> nearest(const Matrix& docs, int64_t doc, Bench& bench) const {
    std::pair<uint32_t, float> best{0, -1.0f};
    const auto first = static_cast<size_t>(docs.starts[static_cast<size_t>(doc)]);
    const auto last = static_cast<size_t>(docs.starts[static_cast<size_t>(doc) + 1]);
    const float light = docs.light[static_cast<size_t>(doc)];
    const Table table(segment_,
                      {docs.columns.data() + first, docs.values.data() + first, static_cast<uint32_t>(last - first)},
                      bench.weights);
    int16_t* acc = bench.acc();
    for (uint32_t r = 0; r < segment_.header->ranges; ++r) {
      const uint32_t n = segment_.docs_in(r), padded = (n + 31) / 32 * 32;
      std::memset(acc, 0, padded * sizeof(int16_t));
      for (size_t i = first; i < last; ++i)
        if (std::fabs(docs.values[i]) >= light) add(acc, docs.columns[i], docs.values[i], r);
      for (uint32_t i = n; i < padded; ++i) acc[i] = -32768;
      kernels().maxima(acc, padded, bench.maxima.data());
      const auto enough = bench.maxima.begin() + std::min<int64_t>(most_looked_at, groups) - 1;
      std::nth_element(bench.maxima.begin(), enough, bench.maxima.end(), std::greater<>());
      const int16_t top = *std::max_element(bench.maxima.begin(), enough + 1);
      const auto least = static_cast<int16_t>(std::max<float>({near_enough * top, float(*enough), 1.0f}));
      if (top < least) continue;
      const uint32_t found = kernels().collect(acc, padded, least, bench.places.data());
      for (uint32_t i = 0; i < found; ++i) {
        const uint32_t centre = r * range_docs + bench.places[i];
        float likeness = 0;
        table.score(segment_, centre, centre + 1, &likeness);
        if (likeness > best.second) best = {centre, likeness};
      }
    }
    return best;
  }

 private:
  static constexpr float one = 30000.0f;  // rounding has room above it

  void add(int16_t* acc, uint32_t column, float value, uint32_t r) const {
    const uint32_t found = segment_.find(column);
    if (found == retrieval::flat) return;
    const Column& entry = segment_.table[found];
    const uint32_t* postings = segment_.postings + entry.first;
    if (entry.meta == flat) {
      for (uint32_t i = 0; i < entry.count; ++i)
        if (word(postings, i) / range_docs == r) {
          int16_t& sum = acc[word(postings, i) % range_docs];
          sum = static_cast<int16_t>(sum + std::lrint(value * flat_value(postings, i) * one));
        }
      return;
    }
    const Meta* here = segment_.meta + entry.meta + r;
    const auto weight = static_cast<int16_t>(std::lrint(value * std::fabs(here->scale) * one));
    const uint32_t count = here[1].offset - here[0].offset;
    if (weight == 0 || count == 0) return;
    if (std::signbit(here->scale))
      kernels().dense(acc, reinterpret_cast<const int16_t*>(postings + here->offset), count * 2, weight);
    else
      kernels().scatter(acc, postings + here->offset, count, weight, 0, nullptr, nullptr);
  }

  std::vector<uint64_t> memory_;
  Segment segment_;
};

struct Fit {
  std::vector<uint32_t> centre;
  std::vector<float> likeness;
};

// chosen: documents to look at, nullptr: all.
void fit(const Matrix& docs, const std::vector<uint32_t>* chosen, const Centres& centres, int threads, Fit& best) {
  const auto n = chosen != nullptr ? static_cast<int64_t>(chosen->size()) : docs.docs();
  parallel_rows(n, n * work_a_document, threads, [&](int64_t begin, int64_t end) {
    Bench bench;
    for (int64_t i = begin; i < end; ++i) {
      const auto at = static_cast<size_t>(i);
      const auto [centre, likeness] = centres.nearest(docs, chosen != nullptr ? (*chosen)[at] : i, bench);
      best.likeness[at] = likeness;
      best.centre[at] = centre;
    }
  });
}

struct Members {
  std::vector<uint32_t> order, starts;
};

// chosen: as for fit; order holds documents.
Members members(const std::vector<uint32_t>& centre, const std::vector<uint32_t>* chosen, uint32_t centres) {
  Members out{std::vector<uint32_t>(centre.size()), std::vector<uint32_t>(centres + 1, 0)};
  for (uint32_t c : centre) ++out.starts[c + 1];
  std::partial_sum(out.starts.begin(), out.starts.end(), out.starts.begin());
  std::vector<uint32_t> next(out.starts.begin(), out.starts.end() - 1);
  for (size_t i = 0; i < centre.size(); ++i)
    out.order[next[centre[i]]++] = chosen != nullptr ? (*chosen)[i] : static_cast<uint32_t>(i);
  return out;
}

// Without the groups of one: a centre that nothing else is near to is better spent elsewhere.
Members popular(const Members& groups) {
  Members out{{}, {0}};
  for (size_t g = 0; g + 1 < groups.starts.size(); ++g) {
    const auto first = groups.order.begin() + groups.starts[g], last = groups.order.begin() + groups.starts[g + 1];
    if (last - first < 2) continue;
    out.order.insert(out.order.end(), first, last);
    out.starts.push_back(static_cast<uint32_t>(out.order.size()));
  }
  return out.order.empty() ? groups : out;
}

// The mean of each group, its `most` largest values, of unit length.
Matrix means(const Matrix& docs, const Members& groups, uint32_t dims, uint32_t most, int threads) {
  const auto n = static_cast<int64_t>(groups.starts.size()) - 1;
  std::vector<std::vector<std::pair<uint32_t, float>>> rows(static_cast<size_t>(n));
  parallel_rows(n, n * work_a_document, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(dims, 0.0f);
    std::vector<bool> seen(dims, false);
    for (int64_t g = begin; g < end; ++g) {
      auto& row = rows[static_cast<size_t>(g)];
      for (uint32_t i = groups.starts[static_cast<size_t>(g)]; i < groups.starts[static_cast<size_t>(g) + 1]; ++i) {
        const uint32_t doc = groups.order[i];
        for (int64_t j = docs.starts[doc]; j < docs.starts[doc + 1]; ++j) {
          const uint32_t c = docs.columns[static_cast<size_t>(j)];
          if (!seen[c]) row.emplace_back(c, 0.0f);
          seen[c] = true;
          sum[c] += docs.values[static_cast<size_t>(j)];
        }
      }
      for (auto& [c, value] : row) {
        value = sum[c];
        sum[c] = 0;
        seen[c] = false;
      }
      row.erase(std::remove_if(row.begin(), row.end(), [](const auto& p) { return p.second == 0; }), row.end());
      thin(row, most, 1.0);
      double square = 0;
      for (const auto& [c, value] : row) square += double{value} * value;
      const auto scale = static_cast<float>(square > 0 ? 1 / std::sqrt(square) : 0);
      for (auto& [c, value] : row) value *= scale;
    }
  });
  Matrix out;
  for (const auto& row : rows) {
    for (const auto& [c, value] : row)
      if (value != 0) {
        out.columns.push_back(c);
        out.values.push_back(value);
      }
    out.starts.push_back(static_cast<int64_t>(out.columns.size()));
  }
  return out;
}

// Appends documents to centres.
void append(const Matrix& docs, const std::vector<uint32_t>& which, Matrix& centres) {
  for (uint32_t doc : which) {
    const auto first = docs.starts[doc], last = docs.starts[doc + 1];
    centres.columns.insert(centres.columns.end(), docs.columns.begin() + first, docs.columns.begin() + last);
    centres.values.insert(centres.values.end(), docs.values.begin() + first, docs.values.begin() + last);
    centres.starts.push_back(static_cast<int64_t>(centres.columns.size()));
  }
}

// `wanted` documents of the sample, from that share of it that fits worst.
std::vector<uint32_t> misfits(const std::vector<uint32_t>& sample, const Fit& best, uint32_t wanted, double pool,
                              std::mt19937_64& random) {
  std::vector<uint32_t> worst(sample.size());
  std::iota(worst.begin(), worst.end(), 0u);
  const auto size = static_cast<int64_t>(static_cast<double>(worst.size()) * pool);
  std::nth_element(worst.begin(), worst.begin() + size, worst.end(), [&](uint32_t a, uint32_t b) {
    return best.likeness[a] != best.likeness[b] ? best.likeness[a] < best.likeness[b] : a < b;
  });
  worst.resize(static_cast<size_t>(size));
  std::shuffle(worst.begin(), worst.end(), random);
  worst.resize(std::min<size_t>(worst.size(), wanted));
  for (uint32_t& i : worst) i = sample[i];
  return worst;
}

std::vector<uint32_t> sample_of(int64_t docs, int64_t wanted, std::mt19937_64& random) {
  std::vector<uint32_t> sample(static_cast<size_t>(docs));
  std::iota(sample.begin(), sample.end(), 0u);
  std::shuffle(sample.begin(), sample.end(), random);
  sample.resize(static_cast<size_t>(std::min(docs, wanted)));
  std::sort(sample.begin(), sample.end());
  return sample;
}

// The group of each document.
std::vector<uint32_t> learn(const Matrix& docs, uint32_t dims, uint32_t wanted, uint32_t most, int threads,
                            uint32_t& centres) {
  std::mt19937_64 random(1);
  const std::vector<uint32_t> sample = sample_of(docs.docs(), wanted * sample_a_group, random);
  Fit best{std::vector<uint32_t>(sample.size(), 0), std::vector<float>(sample.size(), 0.0f)};
  Matrix rows;
  for (const Step& step : steps) {
    const bool last = &step == std::end(steps) - 1;
    if (rows.docs() > 0)
      rows =
          means(docs, popular(members(best.centre, &sample, static_cast<uint32_t>(rows.docs()))), dims, most, threads);
    const auto more = static_cast<uint32_t>(std::ceil(wanted * step.centres));
    append(docs, misfits(sample, best, more, step.pool, random), rows);
    if (last)
      best = {std::vector<uint32_t>(static_cast<size_t>(docs.docs())),
              std::vector<float>(static_cast<size_t>(docs.docs()))};
    fit(docs, last ? nullptr : &sample, Centres(rows, dims, threads), threads, best);
  }
  centres = static_cast<uint32_t>(rows.docs());
  return best.centre;
}

}  // namespace

Grouping group(const Rows& rows, uint32_t dim, uint32_t size, int threads) {
  const std::vector<uint32_t> dims = used(rows, dim);
  const auto n_dims = static_cast<uint32_t>(dims.size());
  const Matrix docs = heavy(rows, dim, dims);
  const auto wanted = static_cast<uint32_t>(std::clamp<int64_t>(rows.docs / size, 1, most_centres));
  const auto values = static_cast<int64_t>(docs.columns.size());
  const auto most = static_cast<uint32_t>(std::clamp<int64_t>(2 * values / std::max<int64_t>(rows.docs, 1), 16, 64));
  uint32_t centres = 0;
  const std::vector<uint32_t> centre = learn(docs, n_dims, wanted, most, threads, centres);
  Members found = members(centre, nullptr, centres);
  Grouping out;
  out.order = std::move(found.order);
  out.starts.push_back(0);
  for (uint32_t c = 0; c < centres; ++c)
    for (uint32_t at = found.starts[c], end = found.starts[c + 1]; at < end;) {
      at = std::min(end, at + largest_group * size);
      out.starts.push_back(at);
    }
  Matrix last = means(docs, Members{out.order, out.starts}, n_dims, most, threads);
  for (uint32_t& c : last.columns) c = dims[c];
  out.centre_starts = std::move(last.starts);
  out.centre_columns = std::move(last.columns);
  out.centre_values = std::move(last.values);
  return out;
}

void permute(const Rows& rows, const uint32_t* order, int64_t* starts, uint32_t* columns, float* values, int threads) {
  starts[0] = 0;
  for (int64_t i = 0; i < rows.docs; ++i) starts[i + 1] = starts[i] + rows.starts[order[i] + 1] - rows.starts[order[i]];
  parallel_rows(rows.docs, starts[rows.docs] * 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto first = rows.starts[order[i]], n = starts[i + 1] - starts[i];
      std::copy_n(rows.columns + first, n, columns + starts[i]);
      std::copy_n(rows.values + first, n, values + starts[i]);
    }
  });
}

}  // namespace gossamer::retrieval
