// A whole forward pass: one team of threads from the token ids to the last hidden states, in memory planned before.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "encoder.h"

namespace gossamer::encoder {

// Sentences as rows of `length` tokens; what the mask leaves out is skipped, and zero in the output. Either ids or rows.
struct Batch {
  int64_t sentences, length;
  const int64_t* mask;       // null: all ones
  const int64_t* ids;        // null: the layers start from `rows`
  const int64_t* types;      // null: zeros
  const int64_t* positions;  // null: as the model counts them
  const float* rows;         // [sentences][length][hidden]
  float* out;                // likewise
};

// Seconds that the first thread spent, for measurements.
enum class Stage : int { embedding, qkv, attention, context, out, norm, up, function, down, rows };
constexpr int stages = 10;
extern const char* const stage_names[stages];

// Memory for one forward pass at a time; grows to the largest batch that it saw.
class Arena {
 public:
  uint8_t* reserve(int64_t bytes);
  ~Arena();
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

 private:
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

class Encoder {
 public:
  explicit Encoder(Model model) : model_(std::move(model)) {}

  // Throws std::out_of_range for ids, types and positions that the tables do not have. `times` [stages] or null.
  void run(const Batch& batch, int threads, double* times);

  const Model& model() const { return model_; }

 private:
  Model model_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Arena>> idle_;  // one for each pass that ran at the same time
};

}  // namespace gossamer::encoder
