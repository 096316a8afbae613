// Metrics for Prometheus, made when they are asked for.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_METRICS_H_
#define CONTINUAL_TRANSFORMERS_SERVER_METRICS_H_

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <string>
#include <vector>

#include "cc/server/server_parts.h"

namespace continual_transformers::server {

class Metrics : public prometheus::Collectable {
 public:
  explicit Metrics(const ServerParts& parts) : parts_(parts) {}

  std::vector<prometheus::MetricFamily> Collect() const override;
  // The same in the text format of Prometheus, version 0.0.4.
  std::string Text() const;

 private:
  void CollectModels(std::vector<prometheus::MetricFamily>* families) const;
  void CollectSnapshots(std::vector<prometheus::MetricFamily>* families) const;
  void CollectJournal(std::vector<prometheus::MetricFamily>* families) const;
  void CollectShards(std::vector<prometheus::MetricFamily>* families) const;

  const ServerParts parts_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_METRICS_H_
