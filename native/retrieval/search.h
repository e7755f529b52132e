// Maximum inner product over segments, term at a time, one cache-resident range of documents after another.
#pragma once

#include <cstdint>
#include <vector>

#include "build.h"
#include "segment.h"

namespace gossamer::retrieval {

struct Target {
  Segment segment;
  const uint32_t* allowed;  // one bit per document, padding bits 0; nullptr: all
  uint64_t count;           // of documents allowed
  // Groups of like documents (see group.h): their centres, and where each begins, one place more than centres. Or none.
  const Segment* centres;
  const uint32_t* starts;

  bool allows(uint32_t doc) const { return allowed == nullptr || (allowed[doc / 32] >> (doc % 32) & 1) != 0; }
};

struct Options {
  uint32_t k;
  bool exact;          // keep all that bounds allow, and score it from its values
  float trust;         // exact: bounds of what is left out count this much; below 1 the best may be missed
  uint32_t survivors;  // not exact: candidates to score from their values
  float cut;           // not exact: contributions below this share of the query's largest are skipped
  int threads;
  uint32_t groups;  // of like documents to score before anything else; trust 0: and nothing else
};

// What a search did, summed over its queries.
struct Work {
  int64_t candidates = 0;  // documents scored exactly
  int64_t ranges = 0;      // ranges accumulated
  int64_t complete = 0;    // queries that had to score every document they touch
};

// The k best documents of each query: scores and ids, [queries, k], best first, ties to the lower id. Exact scores are
// float32 sums over ascending dimensions, each product rounded, and documents that share no dimension with the query
// score 0. Missing results are (-inf, -1).
Work search(const std::vector<Target>& targets, const Rows& queries, const Options& options, float* scores,
            int64_t* ids);

// Postings that each query would touch.
void count_postings(const std::vector<Target>& targets, const Rows& queries, int64_t* counts);

}  // namespace gossamer::retrieval
