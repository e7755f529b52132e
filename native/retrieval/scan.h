// One query over the ranges of one segment.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "kernels.h"
#include "query.h"
#include "search.h"

namespace gossamer::retrieval {

constexpr double infinity = std::numeric_limits<double>::infinity();

// Measured on a 2.6 GHz core: one posting, one document scored from its row, one document of a range cleared and read
// back.
constexpr double posting_ns = 0.5, document_ns = 250, sweep_ns = 0.05;

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

  explicit Leaders(size_t keep) : keep(keep), limit(4 * keep + 256) {}

  void add(const Hit& hit) {
    hits.push_back(hit);
    if (hits.size() >= limit) prune();
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

// A term's postings in one range.
struct List {
  const uint32_t *begin, *end;
  uint32_t expected;  // postings that will be read, for a half-normal distribution of impacts
  int16_t weight, least;
  bool dense;
};

// What one thread needs, kept from call to call: making it anew costs as much as a small query.
struct Scratch {
  std::vector<int16_t> memory = std::vector<int16_t>(accumulators + 32);
  std::vector<uint16_t> places = std::vector<uint16_t>(range_docs);
  std::vector<float> table;  // weight of each column, 0 where the query has none
  std::vector<int16_t> maxima = std::vector<int16_t>(groups);
  std::vector<int16_t> weights;
  std::vector<double> scales;
  std::vector<List> lists;

  int16_t* acc() {
    const auto at = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<int16_t*>((at + 63) / 64 * 64);
  }
};

inline Scratch& scratch_here() {
  thread_local Scratch scratch;
  return scratch;
}

class Scan {
 public:
  Scan(const Target& target, uint32_t index, const Query& query, const Options& options, Scratch& scratch,
       Leaders& leaders)
      : target_(target),
        s_(target.segment),
        index_(index),
        options_(options),
        k_(kernels()),
        scratch_(scratch),
        leaders_(leaders) {
    double square = 0;
    for (uint32_t i = 0; i < query.length; ++i) square += double{query.weights[i]} * query.weights[i];
    norm_ = std::sqrt(square) * (1 + 1e-9);
    query_ = query;
  }

  void run(uint32_t begin, uint32_t end, std::atomic<double>* shared) {
    terms_ = terms_of(s_, query_, begin);
    if (terms_.empty()) return;
    scratch_.weights.resize(terms_.size());
    scratch_.scales.resize(terms_.size());
    largest_ = 0;
    for (const Term& t : terms_) largest_ = std::max(largest_, most_of(t));
    if (!options_.exact)
      terms_.erase(std::remove_if(terms_.begin(), terms_.end(),
                                  [&](const Term& t) { return most_of(t) < options_.cut * largest_; }),
                   terms_.end());
    for (uint32_t r = begin; r < end; ++r) {
      if (shared != nullptr) leaders_.bar = std::max(leaders_.bar, shared->load(std::memory_order_relaxed));
      range(r);
      if (shared == nullptr) continue;
      double seen = shared->load(std::memory_order_relaxed);
      while (seen < leaders_.bar && !shared->compare_exchange_weak(seen, leaders_.bar)) {
      }
    }
  }

  int64_t ranges = 0, scored = 0;

 private:
  void range(uint32_t r) {
    const uint32_t base = r * range_docs, padded = (s_.docs_in(r) + 31) / 32 * 32;
    const double bound = weigh(r);
    if (bound <= 0 || bound < leaders_.bar) return skip(r);
    const double unit = bound / head_;
    const double error = options_.exact ? error_ + matched_ * 1.5e-45 / unit : 0;
    if (!(error < 8192)) {
      leaders_.broken = true;
      return skip(r);
    }
    ++ranges;
    int16_t* acc = scratch_.acc();
    std::memset(acc, 0, padded * sizeof(int16_t));
    size_t read = 0;
    if (options_.exact && leaders_.bar > 0 && leading(acc, r, unit, error, read)) return;
    accumulate(acc, r, unit, read, terms_.size());
    hide(acc, r);
    if (leaders_.bar == -infinity) first_bar(acc, padded, unit, error);
    const double floor = std::floor(error) + 1;
    double least = std::floor(leaders_.bar / unit - error);
    if (!(least >= floor)) {
      least = floor;
      leaders_.missed = std::max(leaders_.missed, (floor + error) * unit);
    }
    const uint32_t n = least > 32767 ? 0 : k_.collect(acc, padded, static_cast<int16_t>(least), scratch_.places.data());
    for (uint32_t i = 0; i < n; ++i) {
      const uint32_t place = scratch_.places[i];
      leaders_.add({(acc[place] - error) * unit, (acc[place] + error) * unit, index_, base + place});
    }
    if (n > 0 && leaders_.hits.size() >= leaders_.keep && options_.exact) leaders_.prune();
  }

  // Padding and documents that are not asked for never come up again.
  void hide(int16_t* acc, uint32_t r) const {
    const uint32_t docs = s_.docs_in(r), padded = (docs + 31) / 32 * 32;
    for (uint32_t i = docs; i < padded; ++i) acc[i] = -32768;
    if (target_.allowed != nullptr) k_.mask(acc, padded, target_.allowed + r * (range_docs / 32));
  }

  // Reads the heaviest terms only, and scores what the others could still lift over the bar: by Cauchy and Schwarz they
  // add at most their norm times the largest document's. False if that leaves too many documents; `read` terms are
  // summed.
  bool leading(int16_t* acc, uint32_t r, double unit, double error, size_t& read) {
    const size_t n = terms_.size();
    size_t first = n;
    double square = 0, sum = 0, rest = 0, saved = 0;
    while (first > 0 && terms_[first - 1].meta != nullptr) {
      const Term& t = terms_[first - 1];
      square += double{t.weight} * t.weight;
      sum += std::fabs(scratch_.scales[first - 1]);
      const double bound = std::min(std::sqrt(square) * s_.norms[r], sum) * (1 + 1e-6 + 1e-7 * matched_);
      if (bound * options_.trust > leave_ * leaders_.bar) break;
      rest = bound * options_.trust;
      saved += t.meta[r + 1].offset - t.meta[r].offset;
      --first;
    }
    const double least = std::floor((leaders_.bar - rest) / unit - error);
    const double most = saved * (posting_ns / document_ns);
    if (first == n || most < 4 || least < std::floor(error) + 1) return false;
    accumulate(acc, r, unit, 0, first);
    read = first;
    const uint32_t padded = (s_.docs_in(r) + 31) / 32 * 32;
    const uint32_t found =
        least > 32767 ? 0 : k_.collect(acc, padded, static_cast<int16_t>(least), scratch_.places.data());
    leave_ = std::clamp(leave_ * (found > most / 4 ? 0.85 : found < most / 16 ? 1.1 : 1.0), 0.1, 0.9);
    if (found > most) return false;
    if (found > 0 && table_ == nullptr) table_ = std::make_unique<Table>(s_, query_, scratch_.table);
    for (uint32_t i = 0; i < found; ++i) {
      const uint32_t doc = r * range_docs + scratch_.places[i];
      if (doc >= s_.docs() || (target_.allowed != nullptr && (target_.allowed[doc / 32] >> (doc % 32) & 1) == 0))
        continue;
      const double score = table_->score(s_, doc);
      if (score >= leaders_.bar) leaders_.add({score, score, index_, doc});
    }
    scored += found;
    if (found > 0 && leaders_.hits.size() >= leaders_.keep) leaders_.prune();
    return true;
  }

  static double most_of(const Term& t) { return std::fabs(double{t.weight}) * t.entry->largest; }

  // No score in the range exceeds the bound returned; fills weights, error (in units) and headroom.
  double weigh(uint32_t r) {
    double sum = 0;
    uint32_t matched = 0;
    for (size_t i = 0; i < terms_.size(); ++i) {
      const Term& t = terms_[i];
      double scale = 0;
      if (t.meta != nullptr) {
        if (t.meta[r].offset != t.meta[r + 1].offset) scale = std::fabs(t.meta[r].scale);
      } else if (t.next < t.entry->count && word(t.postings, t.next) / range_docs == r) {
        scale = t.entry->largest;
      }
      scratch_.scales[i] = t.weight * scale;
      sum += std::fabs(scratch_.scales[i]);
      matched += scale > 0;
    }
    matched_ = std::min(matched, s_.header->max_row);
    head_ = 32767.0 - 2.0 * matched_ - 8;
    if (!options_.exact) head_ = std::max(head_, 8192.0);  // rounding that adds up so far is not worth a thought
    // The margin covers the rounding of float32 sums.
    const double bound = std::min(sum, norm_ * s_.norms[r]) * (1 + 1e-6 + 1e-7 * matched_);
    if (bound <= 0 || head_ < 8192) {
      error_ = infinity;
      head_ = 1;
      return bound;
    }
    const double step = head_ * (32768.0 / impact_one) / bound;
    for (size_t i = 0; i < terms_.size(); ++i) {
      const double weight = std::clamp(scratch_.scales[i] * step, -32767.0, 32767.0);  // only damage gets that far
      scratch_.weights[i] = static_cast<int16_t>(static_cast<int>(weight + 32768.5) - 32768);
    }
    if (options_.exact) bound_error(step);
    return bound;
  }

  // Of one contribution: half a step of the impact, half of the weight, half of the product, and the float32 sum that
  // it is compared with. The largest `matched` of them.
  void bound_error(double step) {
    const double share = 0.5 / impact_one + 1e-7 * matched_;
    double error = 0, largest = 0;
    for (size_t i = 0; i < terms_.size(); ++i) {
      if (scratch_.scales[i] == 0) continue;
      const double own = 1.0 + share * std::fabs(scratch_.scales[i] * step);
      error += own;
      largest = std::max(largest, own);
    }
    error_ = std::min(error, largest * matched_) + 0.5;
  }

  // Flat terms keep their place in step even where a range is not looked at.
  void skip(uint32_t r) {
    for (Term& t : terms_)
      while (t.meta == nullptr && t.next < t.entry->count && word(t.postings, t.next) / range_docs <= r) ++t.next;
  }

  void accumulate(int16_t* acc, uint32_t r, double unit, size_t begin, size_t end) {
    const double cut = options_.exact ? 0 : options_.cut * largest_ / unit * 32768.0;
    auto& lists = scratch_.lists;
    lists.clear();
    for (size_t i = begin; i < end; ++i) {
      if (terms_[i].meta == nullptr) {
        flat_term(acc, terms_[i], r, unit);
        continue;
      }
      const Meta* here = terms_[i].meta + r;
      const int weight = scratch_.weights[i];
      if (weight == 0 || here[0].offset == here[1].offset) continue;
      const bool dense = std::signbit(here[0].scale);
      const double least = dense ? 0 : cut / std::abs(weight);
      if (least > impact_one) continue;
      const double above = 1 - least / impact_one;
      const uint32_t count = here[1].offset - here[0].offset;
      const auto expected = std::min(count, static_cast<uint32_t>(count * above * above * above) + 32);
      lists.push_back({terms_[i].postings + here[0].offset, terms_[i].postings + here[1].offset, expected,
                       static_cast<int16_t>(weight), static_cast<int16_t>(least), dense});
    }
    for (size_t i = 0; i < lists.size(); ++i) {
      const List& list = lists[i];
      const uint32_t *next = nullptr, *next_end = nullptr;
      if (i + 1 < lists.size()) {
        next = lists[i + 1].begin;
        next_end = next + lists[i + 1].expected;
      } else if (r + 1 < s_.header->ranges && terms_[0].meta != nullptr) {
        next = terms_[0].postings + terms_[0].meta[r + 1].offset;
        next_end = std::min(next + 256, terms_[0].postings + terms_[0].meta[r + 2].offset);
      }
      const auto count = static_cast<uint32_t>(list.end - list.begin);
      if (list.dense)
        k_.dense(acc, reinterpret_cast<const int16_t*>(list.begin), count * 2, list.weight);
      else
        k_.scatter(acc, list.begin, count, list.weight, list.least, next, next_end);
    }
  }

  static void flat_term(int16_t* acc, Term& t, uint32_t r, double unit) {
    const double scale = t.weight / unit;
    for (; t.next < t.entry->count; ++t.next) {
      const uint32_t doc = word(t.postings, t.next);
      if (doc / range_docs > r) break;
      if (doc / range_docs < r) continue;
      // A damaged value cannot be out of bounds: the column's largest is part of the bound.
      const double share = std::clamp(scale * flat_value(t.postings, t.next), -32767.0, 32767.0);
      int16_t& sum = acc[doc % range_docs];
      sum = static_cast<int16_t>(sum + static_cast<int16_t>(std::lrint(share == share ? share : 0.0)));
    }
  }

  // The keep-th largest of many disjoint maxima: as many documents reach it.
  void first_bar(const int16_t* acc, uint32_t padded, double unit, double error) {
    const size_t keep = leaders_.keep;
    if (keep == 0 || keep > groups) return;
    auto& maxima = scratch_.maxima;
    k_.maxima(acc, padded, maxima.data());
    std::nth_element(maxima.begin(), maxima.begin() + static_cast<int64_t>(keep) - 1, maxima.end(), std::greater<>());
    const double low = (maxima[keep - 1] - error) * unit;
    if (low > 0) leaders_.bar = low;
  }

  const Target& target_;
  const Segment& s_;
  const uint32_t index_;
  const Options& options_;
  const Kernels& k_;
  Scratch& scratch_;
  Leaders& leaders_;
  Query query_{};
  std::vector<Term> terms_;
  double norm_ = 0, largest_ = 0, head_ = 0, error_ = 0;
  uint32_t matched_ = 0;
  double leave_ = 0.5;  // share of the bar that terms left out may add up to; adapts
  std::unique_ptr<Table> table_;
};

}  // namespace gossamer::retrieval
