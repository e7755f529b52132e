#include "search.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <mutex>
#include <stdexcept>

#include "../parallel.h"
#include "near.h"
#include "scan.h"

namespace gossamer::retrieval {
namespace {

// Below this many postings a query runs on one thread.
constexpr int64_t postings_per_thread = int64_t{1} << 18;

struct Best {
  float score;
  int64_t id;
};

bool better(const Best& a, const Best& b) { return a.score != b.score ? a.score > b.score : a.id < b.id; }

void mark(const Segment& s, const Query& query, std::vector<uint32_t>& bits) {
  for (const Term& t : terms_of(s, query, 0)) {
    const auto set = [&](uint32_t doc) {
      if (doc < s.docs()) bits[doc / 32] |= 1u << (doc % 32);
    };
    if (t.meta == nullptr) {
      for (uint32_t i = 0; i < t.entry->count; ++i) set(word(t.postings, i));
      continue;
    }
    for (uint32_t r = 0; r < s.header->ranges; ++r) {
      const uint32_t begin = t.meta[r].offset, end = t.meta[r + 1].offset;
      if (std::signbit(t.meta[r].scale))
        for (uint32_t i = 0; i < s.docs_in(r); ++i) set(r * range_docs + i);
      else
        for (uint32_t i = begin; i < end; ++i) set(r * range_docs + (t.postings[i] & 0xffff));
    }
  }
}

// Keeps the best k of what it is given.
struct Podium {
  size_t k;
  std::vector<Best> heap;

  void add(Best one) {
    if (heap.size() < k) {
      heap.push_back(one);
      std::push_heap(heap.begin(), heap.end(), better);
    } else if (k > 0 && better(one, heap.front())) {
      std::pop_heap(heap.begin(), heap.end(), better);
      heap.back() = one;
      std::push_heap(heap.begin(), heap.end(), better);
    }
  }
};

// Scores every document that the query touches; those it does not touch score 0.
std::vector<Best> score_all(const std::vector<Target>& targets, const Query& query, size_t k, bool touched_only,
                            Scratch& scratch, Work& work) {
  Podium podium{k, {}};
  std::vector<uint32_t> bits;
  for (const Target& target : targets) {
    const Segment& s = target.segment;
    const Table table(s, query, scratch.table);
    const size_t words = (size_t{s.docs()} + 31) / 32;
    if (touched_only) {
      bits.assign(words, 0);
      mark(s, query, bits);
    }
    for (uint32_t w = 0; w < words; ++w) {
      const uint32_t all = w + 1 < words || s.docs() % 32 == 0 ? ~0u : (1u << (s.docs() % 32)) - 1;
      const uint32_t allowed = target.allowed != nullptr ? target.allowed[w] & all : all;
      for (uint32_t left = allowed; left; left &= left - 1) {
        const uint32_t bit = static_cast<uint32_t>(__builtin_ctz(left)), doc = w * 32 + bit;
        const bool touched = !touched_only || (bits[w] >> bit & 1) != 0;
        work.candidates += touched;
        podium.add({touched ? table.score(s, doc) : 0.0f, s.id(doc)});
      }
    }
  }
  std::sort(podium.heap.begin(), podium.heap.end(), better);
  return podium.heap;
}

// Scores the leaders exactly. A segment without values has the estimate only.
std::vector<Best> score_hits(const std::vector<Target>& targets, const Query& query, std::vector<Hit>& hits, size_t k,
                             Scratch& scratch, Work& work) {
  std::sort(hits.begin(), hits.end(),
            [](const Hit& a, const Hit& b) { return a.target != b.target ? a.target < b.target : a.doc < b.doc; });
  std::vector<Best> best;
  best.reserve(hits.size());
  size_t i = 0;
  while (i < hits.size()) {
    const uint32_t index = hits[i].target;
    size_t end = i;
    while (end < hits.size() && hits[end].target == index) ++end;
    const Segment& s = targets[index].segment;
    if (!s.exact()) {
      for (; i < end; ++i) best.push_back({static_cast<float>((hits[i].low + hits[i].high) / 2), s.id(hits[i].doc)});
      continue;
    }
    const size_t first = i;
    const auto doc_at = [&](size_t j) { return hits[first + j].doc; };
    const Table table(s, query, scratch.table);
    const Ahead ahead(s, end - first, doc_at);
    work.candidates += static_cast<int64_t>(end - first);
    for (; i < end; ++i) {
      ahead.fetch(i - first, doc_at);
      best.push_back({table.score(s, hits[i].doc), s.id(hits[i].doc)});
    }
  }
  const size_t n = std::min(k, best.size());
  std::partial_sort(best.begin(), best.begin() + static_cast<int64_t>(n), best.end(), better);
  best.resize(n);
  return best;
}

double postings_of(const std::vector<Target>& targets, const Query& query) {
  double sum = 0;
  for (const Target& target : targets)
    for (uint32_t i = 0; i < query.length; ++i) {
      const uint32_t column = target.segment.find(query.dims[i]);
      if (column != flat) sum += target.segment.table[column].count;
    }
  return sum;
}

// Few documents are allowed: reading their rows costs less than reading the postings.
bool rows_are_cheaper(const std::vector<Target>& targets, const Query& query) {
  double allowed = 0, docs = 0;
  for (const Target& target : targets) {
    allowed += static_cast<double>(target.count);
    docs += target.segment.docs();
  }
  return allowed * document_ns < postings_of(targets, query) * posting_ns + docs * sweep_ns;
}

// Those of all `ranges` whose hopes did not come true, with what is known now.
void look_again(const std::vector<Target>& targets, const Query& query, const Options& options, int64_t ranges,
                Leaders& leaders, Work& work) {
  if (leaders.total == 0) return;
  std::vector<Leaders::Hope> hopes = std::move(leaders.hopes);
  leaders.total = 0;
  const double bar = leaders.bar;
  hopes.erase(std::remove_if(hopes.begin(), hopes.end(), [=](const auto& hope) { return hope.bar <= bar; }),
              hopes.end());
  double& failed = scratch_here().failed;
  failed += 0.05 * (static_cast<double>(hopes.size()) / static_cast<double>(ranges) - failed);
  for (const auto& hope : hopes) {
    const auto there = [&](const Hit& hit) { return hit.target == hope.target && hit.doc / range_docs == hope.range; };
    leaders.hits.erase(std::remove_if(leaders.hits.begin(), leaders.hits.end(), there), leaders.hits.end());
    Scan scan(targets[hope.target], hope.target, query, options, scratch_here(), leaders);
    scan.run(hope.range, hope.range + 1, nullptr);
    work.ranges += scan.ranges;
    work.candidates += scan.scored;
  }
  if (!hopes.empty()) leaders.prune();
}

// The leaders over all ranges, of scores that reach the bar known, by `threads` threads that share their bar.
Leaders scan_all(const std::vector<Target>& targets, const Query& query, const Options& options, size_t keep,
                 double known, int64_t threads, Work& work) {
  int64_t total = 0;
  uint64_t docs = 0;
  for (const Target& target : targets) {
    total += target.segment.header->ranges;
    docs += target.segment.docs();
  }
  const int64_t parts = std::min(threads, std::max<int64_t>(total, 1));
  std::vector<Leaders> found(static_cast<size_t>(parts), Leaders(keep));
  std::vector<Work> done(static_cast<size_t>(parts));
  const bool hopeful = options.exact && options.trust == 1 && scratch_here().hopeful();
  for (Leaders& one : found) {
    one.bar = known;
    one.total = hopeful ? docs : 0;
  }
  std::atomic<double> bar{known};
  std::exception_ptr failure;
  std::mutex lock;
  const auto part = [&](int64_t p) {
    const int64_t begin = total * p / parts, end = total * (p + 1) / parts;
    int64_t first = 0;
    for (size_t t = 0; t < targets.size(); ++t) {
      const int64_t n = targets[t].segment.header->ranges;
      const int64_t from = std::max(begin, first) - first, to = std::min(end, first + n) - first;
      if (from < to && targets[t].count > 0) {
        Scan scan(targets[t], static_cast<uint32_t>(t), query, options, scratch_here(), found[static_cast<size_t>(p)]);
        scan.run(static_cast<uint32_t>(from), static_cast<uint32_t>(to), parts > 1 ? &bar : nullptr);
        done[static_cast<size_t>(p)].ranges += scan.ranges;
        done[static_cast<size_t>(p)].candidates += scan.scored;
      }
      first += n;
    }
  };
  parallel_parts(parts, [&](int64_t p) {
    try {
      part(p);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(lock);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
  Leaders all = std::move(found[0]);
  for (size_t p = 1; p < found.size(); ++p) {
    all.hits.insert(all.hits.end(), found[p].hits.begin(), found[p].hits.end());
    all.bar = std::max(all.bar, found[p].bar);
    all.missed = std::max(all.missed, found[p].missed);
    all.broken = all.broken || found[p].broken;
    all.hopes.insert(all.hopes.end(), found[p].hopes.begin(), found[p].hopes.end());
  }
  all.prune();
  look_again(targets, query, options, total, all, work);
  for (const Work& one : done) {
    work.ranges += one.ranges;
    work.candidates += one.candidates;
  }
  return all;
}

// Candidates kept beyond k: their scores are rounded differently.
constexpr size_t spare = 8;

// The best documents of the groups nearest to the query; fewer than k where that is all they hold.
std::vector<Hit> look_near(const std::vector<Target>& targets, const Query& query, const Options& options, Work& work) {
  const std::vector<Hit> groups = nearest_groups(targets, query, options, scratch_here());
  Visit visit(targets, query, size_t{options.k} + spare, scratch_here());
  std::vector<Hit> hits = visit.run(groups);
  work.candidates += visit.scored;
  return hits;
}

// Adds the hits of `more` whose documents are not among `hits`.
void add_missing(const std::vector<Hit>& more, std::vector<Hit>& hits) {
  const auto key = [](const Hit& hit) { return uint64_t{hit.target} << 32 | hit.doc; };
  std::vector<uint64_t> there;
  for (const Hit& hit : hits) there.push_back(key(hit));
  std::sort(there.begin(), there.end());
  for (const Hit& hit : more)
    if (!std::binary_search(there.begin(), there.end(), key(hit))) hits.push_back(hit);
}

bool all_grouped(const std::vector<Target>& targets) {
  return std::all_of(targets.begin(), targets.end(),
                     [](const Target& t) { return t.centres != nullptr || t.count == 0; });
}

// The k best of what the leaders and the groups hold.
std::vector<Best> joined(const std::vector<Target>& targets, const Query& query, const Options& options,
                         const std::vector<Hit>& near, Leaders& leaders, Work& work) {
  add_missing(near, leaders.hits);
  return score_hits(targets, query, leaders.hits, options.k, scratch_here(), work);
}

std::vector<Best> answer_scanned(const std::vector<Target>& targets, const Query& query, const Options& options,
                                 const std::vector<Hit>& near, double bar, int64_t threads, Work& work) {
  const bool values = std::all_of(targets.begin(), targets.end(), [](const Target& t) { return t.segment.exact(); });
  const size_t keep = options.exact || !values ? options.k : std::max(options.k, options.survivors);
  Leaders leaders = scan_all(targets, query, options, keep, bar, threads, work);
  if (bar > 0 && (!options.exact || options.trust < 1)) return joined(targets, query, options, near, leaders, work);
  // Every document passed over has a score below the k-th best one found, or we look at all of them.
  if (options.exact && (leaders.broken || leaders.hits.size() < keep || !(leaders.bar > leaders.missed))) {
    ++work.complete;
    return score_all(targets, query, options.k, true, scratch_here(), work);
  }
  if (!options.exact && leaders.hits.size() > keep) {
    std::nth_element(leaders.hits.begin(), leaders.hits.begin() + static_cast<int64_t>(keep), leaders.hits.end(),
                     [](const Hit& a, const Hit& b) { return a.low > b.low; });
    leaders.hits.resize(keep);
  }
  return score_hits(targets, query, leaders.hits, options.k, scratch_here(), work);
}

std::vector<Best> answer(const std::vector<Target>& targets, const Query& query, Options options, int64_t threads,
                         Work& work) {
  bool filtered = false, values = true;
  for (const Target& target : targets) {
    filtered = filtered || target.allowed != nullptr;
    values = values && target.segment.exact();
  }
  if (values && filtered && rows_are_cheaper(targets, query))
    return score_all(targets, query, options.k, false, scratch_here(), work);
  if (options.groups == 0 || !values) return answer_scanned(targets, query, options, {}, -infinity, threads, work);
  std::vector<Hit> near = look_near(targets, query, options, work);
  const std::vector<Best> best = score_hits(targets, query, near, options.k, scratch_here(), work);
  const bool full = best.size() == options.k && best.back().score > 0;
  const double bar = full ? best.back().score : -infinity;
  if (options.trust > 0) return answer_scanned(targets, query, options, near, bar, threads, work);
  if (full && all_grouped(targets)) return best;
  // Fewer than k were found, or documents lie in no group: those that were not looked at are.
  options.trust = 1;
  options.exact = true;
  if (!full) return answer_scanned(targets, query, options, near, bar, threads, work);
  std::vector<Target> others = targets;
  for (Target& target : others)
    if (target.centres != nullptr) target.count = 0;  // passes over it
  Leaders leaders = scan_all(others, query, options, options.k, bar, threads, work);
  return joined(targets, query, options, near, leaders, work);
}

void put(const std::vector<Best>& best, uint32_t k, float* scores, int64_t* ids) {
  for (uint32_t i = 0; i < k; ++i) {
    scores[i] = i < best.size() ? best[i].score : -std::numeric_limits<float>::infinity();
    ids[i] = i < best.size() ? best[i].id : -1;
  }
}

}  // namespace

Work search(const std::vector<Target>& targets, const Rows& queries, const Options& options, float* scores,
            int64_t* ids) {
  for (const Target& target : targets)
    if (options.exact && !target.segment.exact()) throw std::invalid_argument("the index holds no exact values");
  Work work;
  const auto one = [&](int64_t q, int64_t threads, Work& into) {
    put(answer(targets, query_of(queries, q), options, threads, into), options.k, scores + q * options.k,
        ids + q * options.k);
  };
  const int64_t threads = std::max(options.threads, 1);
  if (queries.docs < threads) {
    for (int64_t q = 0; q < queries.docs; ++q) {
      const double postings = postings_of(targets, query_of(queries, q));
      const auto useful = static_cast<int64_t>(postings / postings_per_thread) + 1;
      one(q, std::min(threads, useful), work);
    }
    return work;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex lock;
  parallel_parts(threads, [&](int64_t) {
    Work own;
    try {
      for (int64_t q = next++; q < queries.docs; q = next++) one(q, 1, own);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(lock);
      failure = std::current_exception();
    }
    const std::lock_guard<std::mutex> guard(lock);
    work.candidates += own.candidates;
    work.ranges += own.ranges;
    work.complete += own.complete;
  });
  if (failure) std::rethrow_exception(failure);
  return work;
}

void count_postings(const std::vector<Target>& targets, const Rows& queries, int64_t* counts) {
  for (int64_t q = 0; q < queries.docs; ++q)
    counts[q] = static_cast<int64_t>(postings_of(targets, query_of(queries, q)));
}

}  // namespace gossamer::retrieval
