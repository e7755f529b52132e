// What a search may leave unread in a range once it knows a bar: postings whose impacts are too small to matter.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "segment.h"

namespace gossamer::retrieval {

// A term, as a plan sees it.
struct Share {
  float most;      // no contribution exceeds it
  float mean;      // of its contributions, about
  float postings;  // 0: cannot be left unread
  float cut = 0;   // the plan: contributions below this are left unread
};

// The logarithm to base 2, good to 0.09: plans need no more.
inline float rough_log2(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<float>(bits - (127 << 23)) / (1 << 23);
}

// The share of postings with contributions below a share of the largest, for half-normal ones.
inline float below(float share) {
  const float above = 1 - share;
  return 1 - above * above * above;
}

// Sets cuts that add up to `budget` at most, so that many postings lie below them; returns their share, about. Were
// contributions exponentially distributed, these would be the best cuts: the next posting saved costs each term alike.
inline float plan_cuts(std::vector<Share>& shares, float budget) {
  constexpr float ln2 = 0.6931f;
  float low = 1e30f, high = -1e30f;
  for (Share& s : shares) {
    s.cut = s.postings > 0 ? rough_log2(s.postings / s.mean) * ln2 : -1e30f;  // until the end: where its cut begins
    if (s.postings == 0) continue;
    low = std::min(low, s.cut - s.most / s.mean);
    high = std::max(high, s.cut);
  }
  const auto cut_at = [](const Share& s, float level) { return std::clamp((s.cut - level) * s.mean, 0.0f, s.most); };
  for (int step = 0; step < 12; ++step) {
    const float level = (low + high) / 2;
    float sum = 0;
    for (const Share& s : shares) sum += cut_at(s, level);
    (sum > budget ? low : high) = level;
  }
  float saved = 0, all = 0;
  for (Share& s : shares) {
    s.cut = cut_at(s, high);
    if (s.cut > 0) saved += s.postings * below(s.cut / s.most);
    all += s.postings;
  }
  return all > 0 ? saved / all : 0;
}

}  // namespace gossamer::retrieval
