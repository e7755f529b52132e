// Damages segments at random and searches what still opens: the reader must refuse or survive. Built with sanitizers by
// tests/sanitize_index.sh; arguments: rounds, seed.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "../isa.h"
#include "build.h"
#include "checksum.h"
#include "group.h"
#include "search.h"

using namespace gossamer::retrieval;

namespace {

struct Owned {
  std::vector<int64_t> starts{0};
  std::vector<uint32_t> columns;
  std::vector<float> values;
  Rows rows() const { return {static_cast<int64_t>(starts.size()) - 1, starts.data(), columns.data(), values.data()}; }
};

Owned random_rows(std::mt19937& random, int64_t docs, uint32_t dim, double density, bool common) {
  Owned out;
  std::uniform_real_distribution<double> share(0, 1);
  std::normal_distribution<float> value(0, 1);
  for (int64_t doc = 0; doc < docs; ++doc) {
    const uint32_t step = dim > 4096 ? dim / 512 : 1;
    for (uint32_t column = 0; column < dim; column += step)
      if (share(random) < (common && column < 2 * step ? 0.6 : density)) {
        const float v = value(random);
        out.columns.push_back(column);
        out.values.push_back(v != 0 ? v : 1.0f);
      }
    out.starts.push_back(static_cast<int64_t>(out.columns.size()));
  }
  return out;
}

// The block lies in an allocation of exactly its size, so that the sanitizer sees a read past it.
struct Block {
  char* data;
  uint64_t bytes;
  explicit Block(uint64_t n) : data(static_cast<char*>(std::aligned_alloc(64, (n + 63) / 64 * 64))), bytes(n) {}
  ~Block() { std::free(data); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
};

struct Groups {
  Segment centres;
  std::vector<uint32_t> starts;
};

void use(const Segment& s, const Owned& queries, const Groups* groups, std::mt19937& random) {
  std::vector<uint32_t> allowed((s.docs() + 31) / 32);
  for (uint32_t& word : allowed) word = static_cast<uint32_t>(random());
  if (s.docs() % 32 != 0) allowed.back() &= (1u << (s.docs() % 32)) - 1;
  uint64_t count = 0;
  for (uint32_t word : allowed) count += static_cast<uint64_t>(__builtin_popcount(word));
  const bool filtered = random() % 2;
  const bool near = groups != nullptr && s.exact();
  const std::vector<Target> targets{{s, filtered ? allowed.data() : nullptr, filtered ? count : s.docs(),
                                     near ? &groups->centres : nullptr, near ? groups->starts.data() : nullptr}};
  const Rows rows = queries.rows();
  constexpr uint32_t k = 20;
  std::vector<float> scores(static_cast<size_t>(rows.docs) * k);
  std::vector<int64_t> ids(scores.size());
  constexpr float trusts[] = {1.0f, 0.3f, 0.0f};
  const uint32_t first = near ? static_cast<uint32_t>(random() % 9) : 0;
  const Options options{k,
                        s.exact() && random() % 2,
                        first > 0 ? trusts[random() % 3] : 1.0f,
                        50,
                        0.1f,
                        static_cast<int>(1 + random() % 3),
                        first};
  search(targets, rows, options, scores.data(), ids.data());
  std::vector<int64_t> postings(static_cast<size_t>(rows.docs)), lengths(s.docs()), starts(s.docs() + 1, 0);
  count_postings(targets, rows, postings.data());
  count_rows(s, nullptr, lengths.data());
  for (uint32_t i = 0; i < s.docs(); ++i) starts[i + 1] = starts[i] + lengths[i];
  std::vector<uint32_t> columns(static_cast<size_t>(starts.back()));
  std::vector<float> values(columns.size());
  extract_rows(s, nullptr, starts.data(), columns.data(), values.data());
}

void damage(Block& block, std::mt19937& random) {
  const uint64_t reach = random() % 2 ? std::min<uint64_t>(block.bytes, 4096) : block.bytes;
  for (uint32_t n = 1 + random() % 4; n > 0; --n) {
    const uint64_t at = random() % reach;
    switch (random() % 3) {
      case 0:
        block.data[at] ^= static_cast<char>(1 << random() % 8);
        break;
      case 1:
        block.data[at] = static_cast<char>(random());
        break;
      default: {
        const uint32_t word = random() % 2 ? 0xffffffffu : static_cast<uint32_t>(random());
        if (at / 4 * 4 + 4 <= block.bytes) std::memcpy(block.data + at / 4 * 4, &word, 4);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const long rounds = argc > 1 ? std::atol(argv[1]) : 2000;
  std::mt19937 random(argc > 2 ? static_cast<unsigned>(std::atol(argv[2])) : 1);
  const struct {
    int64_t docs;
    uint32_t dim;
    double density;
  } shapes[] = {{0, 5, 0.5},
                {1, 1, 1.0},
                {70, 40, 0.2},
                {500, 60, 0.1},
                {range_docs + 40, 30, 0.05},
                {300, 4'000'000'000u, 0.05},
                {200, 70'000, 1.0}};
  long refused = 0, survived = 0;
  for (long round = 0; round < rounds; ++round) {
    const auto& shape = shapes[random() % (sizeof shapes / sizeof *shapes)];
    gossamer::isa::set(gossamer::isa::supported()[random() % gossamer::isa::supported().size()]);
    const Owned docs = random_rows(random, shape.docs, shape.dim, shape.density, random() % 2);
    const Owned queries = random_rows(random, 3, shape.dim, 0.4, false);
    std::vector<int64_t> ids(static_cast<size_t>(shape.docs));
    const uint32_t span = random() % 2 ? 1u << 20 : 0xffffffffu;  // packed, or short
    for (int64_t& id : ids) id = static_cast<int64_t>(random() % span);
    const Grouping found = group(docs.rows(), shape.dim, 8, 2);
    Owned sorted = docs;
    permute(docs.rows(), found.order.data(), sorted.starts.data(), sorted.columns.data(), sorted.values.data(), 2);
    const Rows centre_rows{static_cast<int64_t>(found.starts.size()) - 1, found.centre_starts.data(),
                           found.centre_columns.data(), found.centre_values.data()};
    const Builder builder(sorted.rows(), shape.dim, random() % 4 != 0, random() % 2 ? ids.data() : nullptr, 7, 2);
    const Builder centre_builder(centre_rows, shape.dim, false, nullptr, 0, 2);
    Block whole(builder.bytes()), centres(centre_builder.bytes());
    builder.write(whole.data);
    centre_builder.write(centres.data);
    const Groups groups{open_segment(centres.data, centres.bytes), found.starts};
    const bool grouped = random() % 2;
    use(open_segment(whole.data, whole.bytes), queries, grouped ? &groups : nullptr, random);
    for (int copy = 0; copy < 8; ++copy) {
      Block broken(random() % 8 ? whole.bytes : random() % whole.bytes / 64 * 64 + 64);
      Block broken_centres(centres.bytes);
      std::memcpy(broken.data, whole.data, std::min(broken.bytes, whole.bytes));
      std::memcpy(broken_centres.data, centres.data, centres.bytes);
      damage(random() % 2 ? broken : broken_centres, random);
      checksum(broken.data, broken.bytes, 2);
      try {
        const Segment s = open_segment(broken.data, broken.bytes);
        Groups near{open_segment(broken_centres.data, broken_centres.bytes), found.starts};
        if (random() % 4 == 0) near.starts[random() % near.starts.size()] = static_cast<uint32_t>(random());
        if (s.exact()) check_groups(s, near.centres, near.starts.data(), near.starts.size());
        use(s, queries, grouped ? &near : nullptr, random);
        ++survived;
      } catch (const std::invalid_argument&) {
        ++refused;
      }
    }
  }
  std::printf("%ld damaged segments refused, %ld searched\n", refused, survived);
  return refused > 0 && survived > 0 ? 0 : 1;
}
