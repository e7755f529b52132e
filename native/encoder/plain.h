// The kernels in plain code: the reference of the vector kernels, and what other CPUs run.
#pragma once

#include "common.h"

namespace gossamer::encoder {
namespace {

inline void quantise_columns(const Columns& c) {
  const float steps = c.least ? 255.0f : 127.0f, zero = c.least ? 0.0f : 128.0f;
  for (int64_t t = c.begin; t < c.end; ++t) {
    const auto value = [&](int64_t k) {
      const float x = c.x[k * c.width + t] * (c.factors ? c.factors[k] : 1.0f);
      return c.least ? x - *c.least : x;
    };
    float most = 0;
    for (int64_t k = 0; k < c.channels; ++k) most = std::max(most, std::fabs(value(k)));
    c.scales[t] = most / steps;
    const float inverse = most >= tiny ? steps / most : 0.0f;
    for (int64_t k = 0; k < c.channels; ++k) {
      const int64_t at = c.layout == Layout::t ? k * c.width + t : (k / 4 * c.width + t) * 4 + k % 4;
      c.bytes[at] = static_cast<uint8_t>(bsr::saturate(std::fma(value(k), inverse, zero), 0, 255));
    }
  }
}

inline void norm(const Columns& c, const Norm* n) {
  const float count = static_cast<float>(c.channels);
  for (int64_t t = c.begin; n && t < c.end; ++t) {
    float *x = c.x + t, mean = 0, variance = 0;
    for (int64_t k = 0; k < c.channels; ++k) mean += x[k * c.width];
    mean /= count;
    for (int64_t k = 0; k < c.channels; ++k) variance += (x[k * c.width] - mean) * (x[k * c.width] - mean);
    const float inverse = 1.0f / std::sqrt(variance / count + n->eps);
    for (int64_t k = 0; k < c.channels; ++k)
      x[k * c.width] = std::fma((x[k * c.width] - mean) * inverse, n->weight[k], n->bias[k]);
  }
  if (c.bytes) quantise_columns(c);
}

// 2^x to 0 .. 255 and, in sum, their total; past the last key there are zeros.
inline int64_t softmax(const Head& h, int64_t lane, float scale) {
  int32_t most = h.scores[lane];
  for (int64_t j = 1; j < h.count; ++j) most = std::max(most, h.scores[j * query_lanes + lane]);
  int64_t sum = 0;
  for (int64_t j = 0; j < h.padded; ++j) {
    const float x = static_cast<float>(h.scores[j * query_lanes + lane] - most) * scale;
    const int weight = j < h.count ? static_cast<int>(std::nearbyintf(255.0f * std::exp2(x))) : 0;
    h.weights[4 * (j / 4 * query_lanes + lane) + j % 4] = static_cast<uint8_t>(weight);
    sum += weight;
  }
  return sum;
}

inline int32_t score(const Head& h, int64_t key, int64_t query) {
  int32_t sum = 0;
  for (int64_t c = 0; c < h.quads; ++c)
    for (int64_t i = 0; i < 4; ++i)
      sum += h.keys[4 * (c * h.padded + key) + i] *
             (h.queries[4 * (c * h.padded + query) + i] - zero_point);
  return sum;
}

inline int32_t value(const Head& h, int64_t channel, int64_t lane) {
  int32_t sum = 0;
  const uint8_t* from = h.values + channel / 4 * 4 * h.padded + channel % 4;
  for (int64_t j = 0; j < h.count; ++j)
    sum += h.weights[4 * (j / 4 * query_lanes + lane) + j % 4] * (from[4 * j] - zero_point);
  return sum;
}

// Here queries and values stay unsigned and values keep the order in which they are gathered.
inline void attend(const Attention& a, int64_t first, int64_t count, int64_t head, uint8_t* scratch) {
  const Head h = head_of(a, count, scratch);
  gather_head(a, first, head, h);
  for (int64_t query = 0; query < count; ++query) {
    const int64_t lane = query % query_lanes;
    for (int64_t j = 0; j < count; ++j) h.scores[j * query_lanes + lane] = score(h, j, query);
    const float inverse = 1.0f / static_cast<float>(softmax(h, lane, a.score_scale[head]));
    const Place to = place_t(a.hidden, a.tokens, first + query);
    for (int64_t d = 0; d < a.head_size; ++d) {
      const int64_t channel = head * a.head_size + d;
      a.context[to.at + channel * to.step] =
          static_cast<float>(value(h, d, lane)) * inverse * a.value_scale[channel];
    }
  }
}

inline void embed(const Embeddings& e, const Token* tokens, int64_t count, const Columns& c) {
  for (int64_t t = 0; t < count; ++t) {
    const uint16_t *word = e.words + tokens[t].word * c.channels, *type = e.types + tokens[t].type * c.channels;
    const uint16_t* position = e.positions + tokens[t].position * c.channels;
    for (int64_t k = 0; k < c.channels; ++k)
      c.x[k * c.width + c.begin + t] = bsr::from_bf16(word[k]) + bsr::from_bf16(type[k]) + bsr::from_bf16(position[k]);
  }
}

inline void to_rows(const Columns& c, float* const* rows) {
  for (int64_t t = 0; t < c.end - c.begin; ++t)
    for (int64_t k = 0; rows[t] && k < c.channels; ++k) rows[t][k] = c.x[k * c.width + c.begin + t];
}

inline void from_rows(const Columns& c, const float* const* rows) {
  for (int64_t t = 0; t < c.end - c.begin; ++t)
    for (int64_t k = 0; k < c.channels; ++k) c.x[k * c.width + c.begin + t] = rows[t] ? rows[t][k] : 0.0f;
}

}  // namespace
}  // namespace gossamer::encoder
