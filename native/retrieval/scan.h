// One query over the ranges of one segment.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "leaders.h"
#include "plan.h"
#include "query.h"
#include "search.h"

namespace gossamer::retrieval {

// Measured on a 2.6 GHz core: one posting, one document scored from its row, one document of a range cleared and read
// back.
constexpr double posting_ns = 0.5, document_ns = 250, sweep_ns = 0.05;
constexpr double leader_ns = 100;  // a document scored from its row, which is fetched ahead

// A term's postings in one range that are still to be read.
struct List {
  const uint32_t *begin, *end;
  uint32_t expected;  // postings that will be read
  int16_t weight;
  int least;  // impacts below are left unread
  bool dense;
};

constexpr int nothing = 32768;  // as the least impact to read

// What one thread needs, kept from call to call: making it anew costs as much as a small query.
struct Scratch {
  std::vector<int16_t> memory = std::vector<int16_t>(accumulators + 32);
  std::vector<uint16_t> places = std::vector<uint16_t>(range_docs);
  std::vector<float> table;  // weight of each column, 0 where the query has none
  std::vector<int16_t> maxima = std::vector<int16_t>(groups);
  std::vector<int16_t> weights;
  std::vector<int> least;
  std::vector<Share> shares;
  std::vector<double> scales;
  std::vector<List> lists;
  double failed = 0;  // share of the ranges that had to be looked at again, lately
  uint32_t tries = 0;

  // Where documents of a kind lie together, the first ranges say little about the rest.
  bool hopeful() { return failed < 0.1 || ++tries % 32 == 0; }

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
    scratch_.least.resize(terms_.size());
    scratch_.shares.clear();
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
    bar_ = leaders_.bar;
    const double hope = leaders_.hope();
    leaders_.seen += s_.docs_in(r);
    if (bound <= 0 || bound < bar_) return skip(r);
    const double unit = bound / head_;
    const double error = options_.exact ? error_ + matched_ * 1.5e-45 / unit : 0;
    if (!(error < 8192)) {
      leaders_.broken = true;
      return skip(r);
    }
    ++ranges;
    int16_t* acc = scratch_.acc();
    std::memset(acc, 0, padded * sizeof(int16_t));
    const double rest = options_.exact ? leave_out(r, hope) : cut_off(unit);
    if (rest > 0 && hope > bar_) leaders_.hopes.push_back({index_, r, bar_ = hope});
    list(r);
    for (Term& t : terms_)
      if (t.meta == nullptr) flat_term(acc, t, r, unit);
    read(acc, r);
    if (rest > 0 && settle(acc, r, unit, error, rest)) return;
    if (rest > 0) read_rest(acc, r);
    hide(acc, r);
    if (bar_ == -infinity) first_bar(acc, padded, unit, error);
    const double floor = std::floor(error) + 1;
    double least = std::floor(bar_ / unit - error);
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

  // Scores the documents that what was left unread could lift over the bar. False if they are too many.
  bool settle(int16_t* acc, uint32_t r, double unit, double error, double rest) {
    const double least = std::floor((bar_ - rest) / unit - error);
    if (least < std::floor(error) + 1) return false;
    const uint32_t padded = (s_.docs_in(r) + 31) / 32 * 32;
    const uint32_t found =
        least > 32767 ? 0 : k_.collect(acc, padded, static_cast<int16_t>(least), scratch_.places.data());
    size_t unread = 0;
    for (const List& list : scratch_.lists) unread += static_cast<size_t>(list.end - list.begin);
    const double most = unread * (posting_ns / leader_ns);
    leave_ = std::clamp(leave_ * (found > most / 6 ? 0.85 : found < most / 16 ? 1.1 : 1.0), 0.1, 0.9);
    if (found > most) return false;
    if (found > 0 && table_ == nullptr) table_ = std::make_unique<Table>(s_, query_, scratch_.table);
    const auto doc_at = [&](size_t i) { return std::min(r * range_docs + scratch_.places[i], s_.docs() - 1); };
    const Ahead ahead(s_, found, doc_at);
    for (uint32_t i = 0; i < found; ++i) {
      ahead.fetch(i, doc_at);
      const uint32_t doc = r * range_docs + scratch_.places[i];
      if (doc >= s_.docs() || !target_.allows(doc)) continue;
      const double score = table_->score(s_, doc);
      if (score >= leaders_.bar) leaders_.add({score, score, index_, doc});
    }
    scored += found;
    if (found > 0 && leaders_.hits.size() >= leaders_.keep) leaders_.prune();
    return true;
  }

  struct Whole {
    size_t first;
    double rest, saved;
  };

  // Decides what a bar allows to leave unread of the range; returns what a document's share of that adds up to at
  // most, 0 if nothing is to be gained.
  double leave_out(uint32_t r, double bar) {
    auto& least = scratch_.least;
    std::fill(least.begin(), least.end(), 0);
    if (!(bar > 0)) return 0;
    const double margin = 1 + 1e-6 + 1e-7 * matched_;
    const double budget = leave_ * bar / options_.trust / margin;
    const Whole whole = lightest(r, budget);
    const double saved = plan(budget) * postings_;
    if (std::max(saved, whole.saved) * posting_ns < 4 * leader_ns) return 0;
    const double rest = saved > whole.saved ? cut_lists(r) : leave_lists(whole);
    return rest * margin * options_.trust;
  }

  double leave_lists(const Whole& whole) {
    std::fill(scratch_.least.begin() + static_cast<int64_t>(whole.first), scratch_.least.end(), nothing);
    return whole.rest;
  }

  double cut_lists(uint32_t r) {
    double rest = 0;
    for (size_t i = 0; i < terms_.size(); ++i) {
      const double most = std::fabs(scratch_.scales[i]), cut = scratch_.shares[i].cut;
      if (!(cut > 0) || most == 0) continue;
      const bool whole = cut >= most * 0.999;
      if (!whole && std::signbit(terms_[i].meta[r].scale)) continue;  // a row is read whole
      scratch_.least[i] = whole ? nothing : static_cast<int>(cut / most * impact_one);
      rest += whole ? most : most * (scratch_.least[i] / double{impact_one});
    }
    return rest;
  }

  // The lightest terms whose contributions stay below the budget: by Cauchy and Schwarz they add up to their norm times
  // the largest document's at most.
  Whole lightest(uint32_t r, double budget) const {
    double square = 0, sum = 0;
    Whole out{terms_.size(), 0, 0};
    while (out.first > 0 && terms_[out.first - 1].meta != nullptr) {
      const Term& t = terms_[out.first - 1];
      square += double{t.weight} * t.weight;
      sum += std::fabs(scratch_.scales[out.first - 1]);
      const double bound = std::min(std::sqrt(square) * s_.norms[r], sum);
      if (bound > budget) break;
      out.rest = bound;
      out.saved += t.meta[r + 1].offset - t.meta[r].offset;
      --out.first;
    }
    return out;
  }

  // Plans to leave the smallest impacts of every list unread; returns the share of postings that saves, about. A plan
  // holds for a little more than its budget.
  double plan(double budget) {
    if (budget >= planned_ && budget < 1.07 * planned_) return saved_;
    auto& shares = scratch_.shares;
    if (shares.empty())
      for (const Term& t : terms_) shares.push_back(share_of(t));
    planned_ = budget;
    return saved_ = plan_cuts(shares, static_cast<float>(budget));
  }

  static Share share_of(const Term& t) {
    const bool known = t.entry->mean > 0 && t.entry->mean <= t.entry->largest;
    const float weight = std::fabs(t.weight), most = weight * t.entry->largest;
    const float mean = known ? weight * t.entry->mean : 0.2f * most;
    const bool some = t.meta != nullptr && most < 1e30f && mean > 1e-30f;
    return {most, mean, some ? static_cast<float>(t.entry->count) : 0.0f};
  }

  // The approximate search leaves small contributions unread, whatever they add up to.
  double cut_off(double unit) {
    const double cut = options_.cut * largest_ / unit * 32768.0;
    for (size_t i = 0; i < terms_.size(); ++i)
      scratch_.least[i] = static_cast<int>(std::min(cut / std::max(std::abs(scratch_.weights[i]), 1), double{nothing}));
    return 0;
  }

  static double most_of(const Term& t) { return std::fabs(double{t.weight}) * t.entry->largest; }

  // No score in the range exceeds the bound returned; fills weights, error (in units) and headroom.
  double weigh(uint32_t r) {
    double sum = 0;
    uint32_t matched = 0;
    postings_ = 0;
    for (size_t i = 0; i < terms_.size(); ++i) {
      const Term& t = terms_[i];
      double scale = 0;
      if (t.meta != nullptr) {
        if (t.meta[r].offset != t.meta[r + 1].offset) scale = std::fabs(t.meta[r].scale);
        postings_ += t.meta[r + 1].offset - t.meta[r].offset;
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

  // The lists of the range that are to be read.
  void list(uint32_t r) {
    auto& lists = scratch_.lists;
    lists.clear();
    for (size_t i = 0; i < terms_.size(); ++i) {
      if (terms_[i].meta == nullptr) continue;
      const Meta* here = terms_[i].meta + r;
      const int16_t weight = scratch_.weights[i];
      if (weight == 0 || here[0].offset == here[1].offset) continue;
      const bool dense = std::signbit(here[0].scale);
      const int least = dense && scratch_.least[i] != nothing ? 0 : scratch_.least[i];
      const uint32_t count = here[1].offset - here[0].offset;
      const float left = 1 - below(std::min(static_cast<float>(least) / impact_one, 1.0f));
      const auto expected = std::min(count, static_cast<uint32_t>(static_cast<float>(count) * left) + 32);
      const uint32_t* postings = terms_[i].postings;
      lists.push_back({postings + here[0].offset, postings + here[1].offset, expected, weight, least, dense});
    }
  }

  // Adds up the lists down to their least impacts, and moves their beginnings there.
  void read(int16_t* acc, uint32_t r) {
    auto& lists = scratch_.lists;
    for (size_t i = 0; i < lists.size(); ++i) {
      List& list = lists[i];
      if (list.least == nothing) continue;
      const uint32_t *next = nullptr, *next_end = nullptr;
      if (i + 1 < lists.size()) {
        next = lists[i + 1].begin;
        next_end = next + lists[i + 1].expected;
      } else if (r + 1 < s_.header->ranges && terms_[0].meta != nullptr) {
        next = terms_[0].postings + terms_[0].meta[r + 1].offset;
        next_end = std::min(next + 256, terms_[0].postings + terms_[0].meta[r + 2].offset);
      }
      if (i + 2 < lists.size()) prefetch(lists[i + 2].begin, lists[i + 2].end, 128);
      const auto count = static_cast<uint32_t>(list.end - list.begin);
      if (list.dense) {
        k_.dense(acc, reinterpret_cast<const int16_t*>(list.begin), count * 2, list.weight);
        list.begin = list.end;
      } else {
        list.begin += k_.scatter(acc, list.begin, count, list.weight, list.least, next, next_end);
      }
    }
  }

  void read_rest(int16_t* acc, uint32_t r) {
    auto& lists = scratch_.lists;
    for (List& list : lists) {
      list.least = 0;
      list.expected = static_cast<uint32_t>(list.end - list.begin);
    }
    read(acc, r);
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
    if (low > 0) leaders_.bar = bar_ = low;
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
  double bar_ = 0;       // of the range: known, or hoped for
  double postings_ = 0;  // of the range
  double planned_ = -1, saved_ = 0;
  double leave_ = 0.4;  // share of the bar that terms left out may add up to; adapts
  std::unique_ptr<Table> table_;
};

}  // namespace gossamer::retrieval
