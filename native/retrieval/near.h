// The documents of the groups whose centres are nearest to a query.
#pragma once

#include <algorithm>
#include <vector>

#include "scan.h"

namespace gossamer::retrieval {

// Groups of all targets, the nearest `options.groups` first within each target.
inline std::vector<Hit> nearest_groups(const std::vector<Target>& targets, const Query& query, const Options& options,
                                       Scratch& scratch) {
  Options all = options;
  all.exact = false;
  all.cut = 0;
  Leaders near(options.groups);
  for (size_t t = 0; t < targets.size(); ++t) {
    if (targets[t].centres == nullptr) continue;
    const Target centres{*targets[t].centres, nullptr, targets[t].centres->docs(), nullptr, nullptr};
    Scan(centres, static_cast<uint32_t>(t), query, all, scratch, near).run(0, centres.segment.header->ranges, nullptr);
  }
  auto& hits = near.hits;
  const auto before = [](const Hit& a, const Hit& b) { return a.low != b.low ? a.low > b.low : a.doc < b.doc; };
  if (hits.size() > options.groups) {
    std::nth_element(hits.begin(), hits.begin() + static_cast<int64_t>(options.groups), hits.end(), before);
    hits.resize(options.groups);
  }
  std::sort(hits.begin(), hits.end(),
            [&](const Hit& a, const Hit& b) { return a.target != b.target ? a.target < b.target : before(a, b); });
  return hits;
}

// The best `keep` documents of those groups, by scores that are good to a rounding.
class Visit {
 public:
  Visit(const std::vector<Target>& targets, const Query& query, size_t keep, Scratch& scratch)
      : targets_(targets), query_(query), keep_(keep), scratch_(scratch) {}

  std::vector<Hit> run(const std::vector<Hit>& groups) {
    for (size_t i = 0; i < groups.size();) {
      const uint32_t index = groups[i].target;
      const Target& target = targets_[index];
      const Table table(target.segment, query_, scratch_.table);
      for (; i < groups.size() && groups[i].target == index; ++i) {
        if (i + 1 < groups.size() && groups[i + 1].target == index) fetch(target, groups[i + 1].doc);
        visit(target, index, table, groups[i].doc);
      }
    }
    return std::move(best_);
  }

  int64_t scored = 0;

 private:
  static void fetch(const Target& target, uint32_t group) {
    const Segment& s = target.segment;
    const uint32_t first = target.starts[group], last = target.starts[group + 1];
    for (uint32_t doc = first; doc <= last; doc += 16) s.prefetch_row(doc);
    prefetch(s.data + s.row(first), s.data + s.row(last), 1024);  // the core goes on by itself
  }

  void visit(const Target& target, uint32_t index, const Table& table, uint32_t group) {
    float scores[scores_at_once];
    const uint32_t last = target.starts[group + 1];
    for (uint32_t first = target.starts[group]; first < last; first += scores_at_once) {
      const uint32_t end = std::min(last, first + scores_at_once);
      table.score(target.segment, first, end, scores);
      for (uint32_t doc = first; doc < end; ++doc)
        if (scores[doc - first] > bar_ && target.allows(doc))
          add({scores[doc - first], scores[doc - first], index, doc});
      scored += end - first;
    }
  }

  void add(const Hit& hit) {
    const auto worse = [](const Hit& a, const Hit& b) { return a.low > b.low; };
    if (best_.size() == keep_) {
      std::pop_heap(best_.begin(), best_.end(), worse);
      best_.pop_back();
    }
    best_.push_back(hit);
    std::push_heap(best_.begin(), best_.end(), worse);
    if (best_.size() == keep_) bar_ = best_.front().low;
  }

  const std::vector<Target>& targets_;
  const Query& query_;
  const size_t keep_;
  Scratch& scratch_;
  std::vector<Hit> best_;
  double bar_ = 0;
};

}  // namespace gossamer::retrieval
