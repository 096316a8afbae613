// Counts of one model, since it was loaded.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_STATISTICS_H_
#define CONTINUAL_TRANSFORMERS_SERVER_STATISTICS_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cc/server/outcome.h"
#include "cc/server/stream_table.h"
#include "cc/session/session.h"

namespace continual_transformers::server {

// Counts values by size: bucket i holds those of at most first * factor^i, the last bucket the
// rest.
class Histogram {
 public:
  Histogram(double first, double factor, int buckets) : counts_(buckets + 1) {
    for (double bound = first; buckets > 0; --buckets, bound *= factor) bounds_.push_back(bound);
  }

  void Add(double value, int64_t times = 1) {
    const auto at = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
    counts_[at] += times;
    sum_ += value * static_cast<double>(times);
  }

  const std::vector<double>& bounds() const { return bounds_; }
  const std::vector<int64_t>& counts() const { return counts_; }  // one more than bounds
  double sum() const { return sum_; }

 private:
  std::vector<double> bounds_;
  std::vector<int64_t> counts_;
  double sum_ = 0;
};

struct Statistics {
  int64_t requests = 0;  // answered
  int64_t steps = 0;     // input steps taken, of all streams
  int64_t repeats = 0;   // rows answered with the last answer again
  int64_t batches = 0;
  std::array<int64_t, kReasons> refused = {};  // requests by reason
  int64_t opened = 0;
  std::array<int64_t, kEnds> ended = {};              // streams by why they ended
  int64_t queue_ns = 0, compute_ns = 0, copy_ns = 0;  // sums over requests
  int64_t last_request_ms = 0;                        // since 1970

  Histogram batch_rows{1, 2, 12};
  // Seconds from the arrival of a request to its answer: 10 us to 10 s.
  Histogram latency{1e-5, 1.5848931924611136, 30};
  Histogram compute{1e-5, 1.5848931924611136, 30};  // seconds of a batch

  // What is held now.
  int64_t open_streams = 0, waiting = 0;
  int64_t answer_bytes = 0;
  Session::Memory memory = {};
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_STATISTICS_H_
