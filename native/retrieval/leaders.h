// The documents that may be among the best, and the bar that others have to reach.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace gossamer::retrieval {

constexpr double infinity = std::numeric_limits<double>::infinity();

struct Hit {
  double low, high;  // bounds of the score
  uint32_t target, doc;
};

// The documents that may be among the best `keep`, and a bar that the keep-th best score is known to reach.
struct Leaders {
  size_t keep, limit;
  double bar = -infinity;
  double missed = 0;    // documents with scores up to this may have been passed over
  bool broken = false;  // a range could not be accumulated in 16 bits
  std::vector<Hit> hits;

  // Ranges that were looked at with a higher bar than was known. Where the best ones do not reach it in the end, they
  // have to be looked at again.
  struct Hope {
    uint32_t target, range;
    double bar;
  };
  std::vector<Hope> hopes;
  uint64_t total = 0, seen = 0;  // documents; total 0: no hopes

  explicit Leaders(size_t keep) : keep(keep), limit(4 * keep + 256) {}

  void add(const Hit& hit) {
    hits.push_back(hit);
    if (hits.size() >= limit) prune();
  }

  // What the keep-th best score will probably reach: of the documents seen, about as many are among the best in the
  // end as their share of all is.
  double hope() {
    if (total == 0 || seen == 0) return bar;
    const double share = static_cast<double>(seen) / static_cast<double>(total), mean = share * keep;
    const auto place = static_cast<size_t>(std::ceil(mean + 2 * std::sqrt(mean * (1 - share)) + 1));
    if (place >= keep || place > hits.size()) return bar;
    const auto at = hits.begin() + static_cast<int64_t>(place) - 1;
    std::nth_element(hits.begin(), at, hits.end(), [](const Hit& a, const Hit& b) { return a.low > b.low; });
    return std::max(bar, at->low);
  }

  void prune() {
    if (hits.size() > keep) {
      std::nth_element(hits.begin(), hits.begin() + static_cast<int64_t>(keep) - 1, hits.end(),
                       [](const Hit& a, const Hit& b) { return a.low > b.low; });
    }
    if (hits.size() >= keep && keep > 0)
      bar = std::max(
          bar,
          std::min_element(hits.begin(), hits.begin() + static_cast<int64_t>(keep), [](const Hit& a, const Hit& b) {
            return a.low < b.low;
          })->low);
    hits.erase(std::remove_if(hits.begin(), hits.end(), [&](const Hit& h) { return h.high < bar; }), hits.end());
    limit = std::max(limit, 2 * hits.size());
  }
};

}  // namespace gossamer::retrieval
