// Samples of every model's counts over the last ten minutes, for the page.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_HISTORY_H_
#define CONTINUAL_TRANSFORMERS_SERVER_HISTORY_H_

#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "cc/server/statistics.h"
#include "cc/server/step_request.h"

namespace continual_transformers::server {

// The value that a share of the counted values does not exceed, by interpolation in its bucket. 0
// if nothing was counted. `before`, if any, is the same histogram earlier: what it had is left out.
double Quantile(const Histogram& histogram, const Histogram* before, double share);

// Any thread may call any method.
class History {
 public:
  static constexpr int kSeconds = 2;  // between samples
  static constexpr size_t kSamples = 300;

  // Adds a sample of a model. `sample` numbers the samples of the server.
  void Add(const std::string& model, int64_t sample, const Statistics& now);
  // Forgets the models that have no sample of this number: they are not loaded any more.
  void ForgetOthers(int64_t sample);
  // The samples of a model with larger numbers than `since`, as lists by name, the oldest first.
  nlohmann::ordered_json Since(const std::string& model, int64_t since) const;

 private:
  struct Sample {
    int64_t number;
    // A second, or seconds; the quantiles are of the requests since the sample before.
    double steps, requests, refused, batches, rows_of_batch, p50, p90, p99, compute_p50;
    int64_t open, waiting;
  };
  struct OfModel {
    std::optional<Statistics> last;
    Clock::time_point at;
    std::deque<Sample> samples;
  };

  mutable std::mutex mutex_;
  std::map<std::string, OfModel> models_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_HISTORY_H_
