// Metrics for Prometheus, made when they are asked for.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_METRICS_H_
#define CONTINUAL_TRANSFORMERS_SERVER_METRICS_H_

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <string>
#include <vector>

#include "cc/server/model_repository.h"

namespace continual_transformers::server {

class Metrics : public prometheus::Collectable {
 public:
  explicit Metrics(const ModelRepository* repository) : repository_(repository) {}

  std::vector<prometheus::MetricFamily> Collect() const override;
  // The same in the text format of Prometheus, version 0.0.4.
  std::string Text() const;

 private:
  const ModelRepository* const repository_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_METRICS_H_
