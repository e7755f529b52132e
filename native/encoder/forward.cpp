#include "forward.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>

#ifdef GOSSAMER_X86
#include <immintrin.h>
#endif

#include "../bsr_int8/common.h"
#include "../bsr_int8/run.h"
#include "../parallel.h"

namespace gossamer::encoder {

const char* const stage_names[stages] = {"embedding", "qkv", "attention", "context", "out", "norm", "up", "function",
                                         "down", "rows"};

namespace {

using bsr::block_tokens;
using bsr::Layout;

// Token blocks that one thread takes through all products of a layer before the next: they stay in its cache.
constexpr int64_t chunk_blocks = 2;

struct Level {
  const bsr::Kernels* products;
  const Kernels* kernels;
};

Level level_of(const std::string& isa) {
#ifdef GOSSAMER_X86
  if (isa == "avx512") return {&bsr::avx512_kernels, &avx512_kernels};
  if (isa == "avxvnni") return {&bsr::avxvnni_kernels, &avx2_kernels};
  if (isa == "avx2") return {&bsr::avx2_kernels, &avx2_kernels};
#endif
  return {&bsr::scalar_kernels, &scalar_kernels};
}

// All `count` threads of a team leave once all have come.
class Barrier {
 public:
  void wait(int count) {
    const int turn = turn_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      waiting_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    constexpr int spins = 4000;  // then others may need the core
    for (int i = 0; turn_.load(std::memory_order_acquire) == turn; ++i)
      if (i < spins) pause();
      else std::this_thread::yield();
  }

 private:
  static void pause() {
#ifdef GOSSAMER_X86
    _mm_pause();
#endif
  }

  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<int> turn_{0};
};

struct Sentence {
  int64_t first, count;
};

// The tokens that the mask keeps, one after the other.
struct Packed {
  std::vector<Token> tokens;
  std::vector<int64_t> places;  // row in the output, of each token
  std::vector<Sentence> sentences;
  int64_t longest = 0;
};

int64_t checked(int64_t value, int64_t end, const char* what, int64_t sentence, int64_t at) {
  if (value >= 0 && value < end) return value;
  throw std::out_of_range(std::string(what) + " " + std::to_string(value) + " of row " + std::to_string(sentence) +
                          ", token " + std::to_string(at) + " is not in 0 .. " + std::to_string(end - 1) +
                          "; fix: use the tokenizer of this model, and truncate to its longest sequence");
}

Packed pack(const Embeddings& e, const Batch& b) {
  Packed p;
  for (int64_t s = 0; s < b.sentences; ++s) {
    const int64_t first = static_cast<int64_t>(p.places.size());
    int64_t seen = 0;
    for (int64_t i = 0; i < b.length; ++i) {
      const int64_t at = s * b.length + i;
      const bool counted = b.ids && e.pad >= 0 && b.ids[at] != e.pad;
      seen += counted;
      if (b.mask && b.mask[at] == 0) continue;
      p.places.push_back(at);
      if (!b.ids) continue;
      const int64_t own = e.pad < 0 ? i : counted ? e.pad + seen : e.pad;
      p.tokens.push_back({checked(b.ids[at], e.word_rows, "token id", s, i),
                          checked(b.positions ? b.positions[at] : own, e.position_rows, "position", s, i),
                          checked(b.types ? b.types[at] : 0, e.type_rows, "token type", s, i)});
    }
    const int64_t count = static_cast<int64_t>(p.places.size()) - first;
    if (count) p.sentences.push_back({first, count});
    p.longest = std::max(p.longest, count);
  }
  return p;
}

// What lies in the arena, in this order.
struct Plan {
  int64_t x, context, bytes, scales, qkv, wide, wide_bytes, wide_step, wide_bytes_step, scratch, scratch_step, total;

  Plan(const Model& m, int64_t tokens, int64_t longest, int threads) {
    constexpr int64_t quad_padding = 15 * 4 * block_tokens;
    const int64_t blocks = bsr::blocks_of(tokens), padded = blocks * block_tokens;
    const auto next = [](int64_t at, int64_t bytes) { return at + (bytes + 63) / 64 * 64; };
    x = 0;
    context = next(x, 4 * padded * m.hidden);
    bytes = next(context, 4 * padded * m.hidden);
    scales = next(bytes, padded * m.hidden + quad_padding);
    qkv = next(scales, 4 * padded);
    wide = next(qkv, 3 * padded * m.hidden);
    // What the activation function gives: a chunk for each thread, or where they share rows all of it.
    wide_step = 4 * std::min(blocks, chunk_blocks) * block_tokens * m.intermediate;
    wide_bytes_step = wide_step / 4 + quad_padding;
    wide_bytes = next(wide, std::max(threads * wide_step, 4 * padded * m.intermediate));
    scratch = next(wide_bytes, std::max(threads * wide_bytes_step, padded * m.intermediate + quad_padding));
    scratch_step = next(0, attention_scratch(m.hidden / m.heads, longest));
    total = scratch + scratch_step * threads;
  }
};

struct Share {
  int64_t begin, end;
};

// Blocks whose addresses are counted from the first of them on.
struct Span {
  int64_t first, blocks, tokens;
};

Share share(int64_t count, int i, int n) { return {count * i / n, count * (i + 1) / n}; }

class Pass {
 public:
  Pass(const Model& m, const Batch& batch, const Packed& packed, Arena& arena, int threads, double* times)
      : m_(m), batch_(batch), packed_(packed), level_(level_of(bsr::isa())),
        tokens_(static_cast<int64_t>(packed.places.size())), blocks_(bsr::blocks_of(tokens_)),
        plan_(m, tokens_, packed.longest, threads), base_(arena.reserve(plan_.total)), times_(times) {}

  void member(int me, int team, Barrier& barrier) {
    // With enough token blocks each thread has its own, and needs the others for attention only; else rows are shared.
    const bool alone = team == 1 || blocks_ % team == 0 || blocks_ >= 4 * team;
    const Worker w{me, team, alone, barrier, me == 0 ? times_ : nullptr};
    start(w);
    for (size_t i = 0; i < m_.layers.size(); ++i) {
      const Layer& layer = m_.layers[i];
      w.meet();
      stage(w, Stage::attention, [&] { attend(layer, w); });
      w.meet();
      const Layer* next = i + 1 < m_.layers.size() ? &m_.layers[i + 1] : nullptr;
      const Share own = own_blocks(w);
      const int64_t chunk = alone ? chunk_blocks : blocks_;
      for (int64_t b = own.begin; b < own.end; b += chunk)
        rest(layer, next, span({b, std::min(own.end, b + chunk)}), w);
    }
    if (!alone) w.meet();
    stage(w, Stage::rows, [&] { finish(w); });
  }

 private:
  struct Worker {
    int me, team;
    bool alone;
    Barrier& barrier;
    double* times;

    void meet() const {
      if (team > 1) barrier.wait(team);
    }
    // Between stages where threads share rows.
    void step() const {
      if (!alone) meet();
    }
  };

  template <class Body>
  static void stage(const Worker& w, Stage s, const Body& body) {
    if (!w.times) return body();
    const auto begin = std::chrono::steady_clock::now();
    body();
    w.times[static_cast<int>(s)] += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  template <class T>
  T* at(int64_t bytes) const {
    return reinterpret_cast<T*>(base_ + bytes);
  }

  Span span(const Share& blocks) const {
    const int64_t first = blocks.begin * block_tokens;
    return {blocks.begin, blocks.end - blocks.begin, std::min(tokens_, blocks.end * block_tokens) - first};
  }

  // What belongs to the tokens of a span.
  float* x(const Span& s) const { return at<float>(plan_.x) + bsr::block_start(Layout::t, m_.hidden, s.first); }
  float* context(const Span& s) const {
    return at<float>(plan_.context) + bsr::block_start(Layout::t, m_.hidden, s.first);
  }
  float* scales(const Span& s) const { return at<float>(plan_.scales) + s.first * block_tokens; }
  uint8_t* bytes(const Span& s, Layout layout) const {
    return at<uint8_t>(plan_.bytes) + bsr::block_start(layout, m_.hidden, s.first);
  }
  uint8_t* qkv_bytes(const Span& s) const {
    return at<uint8_t>(plan_.qkv) + bsr::block_start(Layout::q, 3 * m_.hidden, s.first);
  }
  float* wide(const Worker& w) const { return at<float>(plan_.wide + (w.alone ? plan_.wide_step * w.me : 0)); }
  uint8_t* wide_bytes(const Worker& w) const {
    return at<uint8_t>(plan_.wide_bytes + (w.alone ? plan_.wide_bytes_step * w.me : 0));
  }

  // body(Columns of x without bytes, first token of the span) for this thread's tokens of each block, at most `most`
  // groups of 16 at once.
  template <class Body>
  void each_block(const Span& s, const Worker& w, float* x, int64_t channels, int64_t most, const Body& body) const {
    const int64_t groups = (s.tokens + lanes - 1) / lanes;
    const Share own = w.alone ? Share{0, groups} : share(groups, w.me, w.team);
    for (int64_t g = own.begin; g < own.end;) {
      const int64_t t = g * lanes, b = t / block_tokens;
      const int64_t end = std::min({own.end, (b + 1) * block_tokens / lanes, g + most});
      Columns c{};
      c.x = x + bsr::block_start(Layout::t, channels, b);
      c.channels = channels;
      c.width = bsr::width_of(s.tokens, b);
      c.begin = t - b * block_tokens;
      c.end = end * lanes - b * block_tokens;
      c.scales = scales(s) + b * block_tokens;
      body(c, t);
      g = end;
    }
  }

  // Normalises x (null: not), and rounds it for the next product, if there is one.
  void round(const Span& s, const Worker& w, const Norm* n, float* x, int64_t channels, const Linear* next,
             uint8_t* bytes, const float* least = nullptr) const {
    each_block(s, w, x, channels, block_tokens / lanes, [&](Columns c, int64_t t) {
      if (next) {
        c.layout = next->layout();
        c.bytes = bytes + bsr::block_start(c.layout, channels, t / block_tokens);
        c.factors = next->factors;
        c.least = least;
      }
      level_.kernels->norm(c, n);
    });
  }

  void round_hidden(const Span& s, const Worker& w, const Norm* n, float* x, const Linear* next) const {
    round(s, w, n, x, m_.hidden, next, bytes(s, next ? next->layout() : Layout::t));
  }

  Share own_blocks(const Worker& w) const { return w.alone ? share(blocks_, w.me, w.team) : Share{0, blocks_}; }

  void start(const Worker& w) {
    const Span s = span(own_blocks(w));
    const int64_t first = s.first * block_tokens;
    const Linear* next = m_.layers.empty() ? nullptr : &m_.layers[0].qkv;
    stage(w, Stage::embedding, [&] {
      each_block(s, w, x(s), m_.hidden, 1, [&](const Columns& c, int64_t t) {
        const int64_t count = std::min(lanes, s.tokens - t);
        if (batch_.ids) return level_.kernels->embed(m_.embeddings, packed_.tokens.data() + first + t, count, c);
        const float* from[lanes] = {};
        for (int64_t i = 0; i < count; ++i)
          from[i] = batch_.rows + packed_.places[static_cast<size_t>(first + t + i)] * m_.hidden;
        level_.kernels->from_rows(c, from);
      });
      round_hidden(s, w, batch_.ids ? &m_.embeddings.norm : nullptr, x(s), next);
    });
    w.step();
    if (next) stage(w, Stage::qkv, [&] { project(m_.layers[0], s, w); });
  }

  void finish(const Worker& w) {
    const Span s = span(own_blocks(w));
    each_block(s, w, x(s), m_.hidden, 1, [&](const Columns& c, int64_t t) {
      float* to[lanes] = {};
      for (int64_t i = 0; i < std::min(lanes, s.tokens - t); ++i)
        to[i] = batch_.out + packed_.places[static_cast<size_t>(s.first * block_tokens + t + i)] * m_.hidden;
      level_.kernels->to_rows(c, to);
    });
  }

  void attend(const Layer& layer, const Worker& w) {
    const Attention a{at<uint8_t>(plan_.qkv), tokens_, m_.hidden, m_.hidden / m_.heads, layer.score_scale, layer.value_scale,
                      at<float>(plan_.context)};
    uint8_t* scratch = base_ + plan_.scratch + plan_.scratch_step * w.me;
    // Shared out by the number of scores: sentence after sentence, head after head.
    int64_t total = 0, before = 0;
    for (const Sentence& s : packed_.sentences) total += s.count * s.count * m_.heads;
    for (const Sentence& s : packed_.sentences)
      for (int64_t head = 0; head < m_.heads; ++head, before += s.count * s.count)
        if (before * w.team / total == w.me) level_.kernels->attend(a, s.first, s.count, head, scratch);
  }

  // From the context to what attention reads in the next layer.
  void rest(const Layer& layer, const Layer* next, const Span& s, const Worker& w) {
    stage(w, Stage::context, [&] { round_hidden(s, w, nullptr, context(s), &layer.out); });
    w.step();
    stage(w, Stage::out, [&] {
      product(layer.out, input(s, bytes(s, layer.out.layout()), layer.out, 128), add_out(s, layer.out), s, w);
    });
    w.step();
    stage(w, Stage::norm, [&] { round_hidden(s, w, &layer.attention_norm, x(s), &layer.up); });
    w.step();
    stage(w, Stage::up, [&] {
      product(layer.up, input(s, bytes(s, layer.up.layout()), layer.up, 128), up_out(layer, w), s, w);
    });
    w.step();
    stage(w, Stage::function, [&] {
      round(s, w, nullptr, wide(w), m_.intermediate, &layer.down, wide_bytes(w), &layer.least);
    });
    w.step();
    stage(w, Stage::down, [&] {
      product(layer.down, input(s, wide_bytes(w), layer.down, 0), add_out(s, layer.down), s, w);
    });
    w.step();
    stage(w, Stage::norm, [&] { round_hidden(s, w, &layer.output_norm, x(s), next ? &next->qkv : nullptr); });
    w.step();
    if (next) stage(w, Stage::qkv, [&] { project(*next, s, w); });
  }

  void project(const Layer& layer, const Span& s, const Worker& w) {
    bsr::Output to{};
    to.data = qkv_bytes(s);
    to.type = bsr::Type::u8;
    to.layout = Layout::q;
    to.inverse_scale = 1.0f;
    to.zero = 128;
    to.bias = layer.qkv.bias;
    product(layer.qkv, input(s, bytes(s, layer.qkv.layout()), layer.qkv, 128), to, s, w);
  }

  bsr::Input input(const Span& s, const uint8_t* data, const Linear& to, int zero) const {
    bsr::Input in{};
    in.data = data;
    in.layout = to.layout();
    in.tokens = s.tokens;
    in.zero = zero;
    in.scale = 1.0f;
    in.token_scale = scales(s);
    return in;
  }

  static bsr::Output floats(float* data, const Linear& of) {
    bsr::Output to{};
    to.data = data;
    to.type = bsr::Type::f32;
    to.layout = Layout::t;
    to.inverse_scale = 1.0f;
    to.bias = of.bias;
    return to;
  }

  bsr::Output up_out(const Layer& layer, const Worker& w) const {
    bsr::Output to = floats(wide(w), layer.up);
    to.function = layer.function;
    return to;
  }

  // Onto the residual.
  bsr::Output add_out(const Span& s, const Linear& of) const {
    bsr::Output to = floats(x(s), of);
    to.residual = x(s);
    to.residual_type = bsr::Type::f32;
    return to;
  }

  void product(const Linear& a, const bsr::Input& in, const bsr::Output& to, const Span& s, const Worker& w) const {
    const int64_t rows = a.weights.block_rows();
    const Share own = w.alone ? Share{0, rows} : Share{cut(a.weights, w.me, w.team), cut(a.weights, w.me + 1, w.team)};
    if (own.begin == own.end) return;
    const bsr::Range range{own.begin, own.end, 0, s.blocks};
#ifdef GOSSAMER_X86
    if (a.weights.panels.data) return bsr::amx_blocks(a.weights, in, to, range);
#endif
    level_.products->blocks(a.weights, in, to, range);
  }

  // Block rows with about as many groups for each thread, at whole panels.
  static int64_t cut(const bsr::Weights& a, int i, int n) {
    const int64_t rows = a.block_rows();
    if (i == n) return rows;
    int64_t at = rows * i / n;
    if (const int64_t* starts = a.panels.data ? nullptr : a.groups.starts)
      at = std::lower_bound(starts, starts + rows, starts[rows] * i / n) - starts;
    return std::min(rows, (at + bsr::panel_rows / 2) / bsr::panel_rows * bsr::panel_rows);
  }

  const Model& m_;
  const Batch& batch_;
  const Packed& packed_;
  const Level level_;
  const int64_t tokens_, blocks_;
  const Plan plan_;
  uint8_t* const base_;
  double* const times_;
};

}  // namespace

uint8_t* Arena::reserve(int64_t bytes) {
  if (bytes <= size_) return data_;
  constexpr size_t page = 4096;
  const size_t whole = (static_cast<size_t>(bytes) + page - 1) / page * page;
  void* fresh = std::aligned_alloc(page, whole);
  if (!fresh) throw std::bad_alloc();
  std::memset(fresh, 0, whole);
  std::free(data_);
  data_ = static_cast<uint8_t*>(fresh);
  size_ = bytes;
  return data_;
}

Arena::~Arena() { std::free(data_); }

void Encoder::run(const Batch& batch, int threads, double* times) {
  const int64_t rows = batch.sentences * batch.length;
  const Packed packed = pack(model_.embeddings, batch);
  if (static_cast<int64_t>(packed.places.size()) < rows)
    std::memset(batch.out, 0, static_cast<size_t>(4 * rows * model_.hidden));
  if (packed.places.empty()) return;
  std::unique_ptr<Arena> arena;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      arena = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (!arena) arena = std::make_unique<Arena>();
  threads = std::max(1, threads);
  Pass pass(model_, batch, packed, *arena, threads, times);
  Barrier barrier;
  parallel_team(threads, [&](int i, int n) { pass.member(i, n, barrier); });
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(arena));
}

}  // namespace gossamer::encoder
