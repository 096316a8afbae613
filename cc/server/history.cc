#include "cc/server/history.h"

#include <numeric>
#include <utility>

namespace continual_transformers::server {
namespace {

double Sum(const std::array<int64_t, kReasons>& counts) {
  return static_cast<double>(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
}

}  // namespace

double Quantile(const Histogram& histogram, const Histogram* before, double share) {
  std::vector<int64_t> counts = histogram.counts();
  if (before != nullptr) {
    for (size_t i = 0; i < counts.size(); ++i) counts[i] -= before->counts()[i];
  }
  const int64_t all = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  if (all <= 0) return 0;
  double rest = share * static_cast<double>(all);
  const std::vector<double>& bounds = histogram.bounds();
  for (size_t i = 0; i < bounds.size(); ++i) {
    const auto count = static_cast<double>(counts[i]);
    if (count > 0 && rest <= count) {
      const double least = i == 0 ? 0 : bounds[i - 1];
      return least + (bounds[i] - least) * rest / count;
    }
    rest -= count;
  }
  return bounds.back();  // at least
}

void History::Add(const std::string& model, int64_t sample, const Statistics& now) {
  std::lock_guard<std::mutex> lock(mutex_);
  OfModel* const of_model = &models_[model];
  const Clock::time_point at = Clock::now();
  const Statistics* last = of_model->last.has_value() ? &*of_model->last : nullptr;
  // After a model was unloaded and loaded again, its counts start at 0.
  if (last != nullptr && last->requests > now.requests) last = nullptr;
  if (last != nullptr) {
    const double seconds = std::chrono::duration<double>(at - of_model->at).count();
    const double batches = static_cast<double>(now.batches - last->batches);
    const auto rate = [seconds](double more) { return seconds > 0 ? more / seconds : 0; };
    of_model->samples.push_back(
        {sample, rate(static_cast<double>(now.steps - last->steps)),
         rate(static_cast<double>(now.requests - last->requests)),
         rate(Sum(now.refused) - Sum(last->refused)), rate(batches),
         batches > 0 ? (now.batch_rows.sum() - last->batch_rows.sum()) / batches : 0,
         Quantile(now.latency, &last->latency, 0.5), Quantile(now.latency, &last->latency, 0.9),
         Quantile(now.latency, &last->latency, 0.99), Quantile(now.compute, &last->compute, 0.5),
         now.open_streams, now.waiting});
    if (of_model->samples.size() > kSamples) of_model->samples.pop_front();
  }
  of_model->last = now;
  of_model->at = at;
}

void History::ForgetOthers(int64_t sample) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto at = models_.begin(); at != models_.end();) {
    const std::deque<Sample>& samples = at->second.samples;
    at = !samples.empty() && samples.back().number < sample ? models_.erase(at) : std::next(at);
  }
}

nlohmann::ordered_json History::Since(const std::string& model, int64_t since) const {
  nlohmann::ordered_json lists;
  for (const char* const name :
       {"sample", "steps_per_second", "requests_per_second", "refused_per_second",
        "batches_per_second", "rows_per_batch", "latency_p50", "latency_p90", "latency_p99",
        "compute_p50", "open_streams", "waiting"}) {
    lists[name] = nlohmann::ordered_json::array();
  }
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = models_.find(model);
  if (found == models_.end()) return lists;
  for (const Sample& sample : found->second.samples) {
    if (sample.number <= since) continue;
    lists["sample"].push_back(sample.number);
    lists["steps_per_second"].push_back(sample.steps);
    lists["requests_per_second"].push_back(sample.requests);
    lists["refused_per_second"].push_back(sample.refused);
    lists["batches_per_second"].push_back(sample.batches);
    lists["rows_per_batch"].push_back(sample.rows_of_batch);
    lists["latency_p50"].push_back(sample.p50);
    lists["latency_p90"].push_back(sample.p90);
    lists["latency_p99"].push_back(sample.p99);
    lists["compute_p50"].push_back(sample.compute_p50);
    lists["open_streams"].push_back(sample.open);
    lists["waiting"].push_back(sample.waiting);
  }
  return lists;
}

}  // namespace continual_transformers::server
