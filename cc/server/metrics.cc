#include "cc/server/metrics.h"

#include <continual_transformers.h>
#include <prometheus/text_serializer.h>

#include <limits>
#include <memory>
#include <sstream>

namespace continual_transformers::server {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

using Labels = std::vector<ClientMetric::Label>;

MetricFamily Family(const std::string& name, MetricType type, const std::string& help) {
  MetricFamily family;
  family.name = "continual_transformers_" + name;
  family.help = help;
  family.type = type;
  return family;
}

void Add(const Labels& labels, double value, MetricFamily* family) {
  ClientMetric metric;
  metric.label = labels;
  (family->type == MetricType::Counter ? metric.counter.value : metric.gauge.value) = value;
  family->metric.push_back(std::move(metric));
}

void Add(const Labels& labels, const Histogram& histogram, MetricFamily* family) {
  ClientMetric metric;
  metric.label = labels;
  uint64_t count = 0;
  for (size_t i = 0; i < histogram.counts().size(); ++i) {
    count += histogram.counts()[i];
    metric.histogram.bucket.push_back({count, i < histogram.bounds().size()
                                                  ? histogram.bounds()[i]
                                                  : std::numeric_limits<double>::infinity()});
  }
  metric.histogram.sample_count = count;
  metric.histogram.sample_sum = histogram.sum();
  family->metric.push_back(std::move(metric));
}

}  // namespace

std::vector<MetricFamily> Metrics::Collect() const {
  const auto counter = [](const char* name, const char* help) {
    return Family(name, MetricType::Counter, help);
  };
  const auto gauge = [](const char* name, const char* help) {
    return Family(name, MetricType::Gauge, help);
  };
  MetricFamily build = gauge("build_info", "The version of the server. Its value is always 1");
  MetricFamily ready = gauge("ready", "Whether the server takes steps");
  MetricFamily model_ready = gauge("model_ready", "Whether the model is loaded");
  MetricFamily requests =
      counter("requests_total", "Requests answered with a step, or with the last answer again");
  MetricFamily steps = counter("steps_total", "Input steps taken, of all streams");
  MetricFamily repeats =
      counter("repeats_total", "Rows of requests that were answered with the last answer again");
  MetricFamily refused = counter("refused_requests_total", "Requests refused, by reason");
  MetricFamily waiting = gauge("waiting_requests", "Requests that wait for their batch");
  MetricFamily rows = Family("batch_rows", MetricType::Histogram, "Streams of a batch");
  MetricFamily latency = Family("request_duration_seconds", MetricType::Histogram,
                                "From a request's arrival at its model to its answer");
  MetricFamily compute =
      Family("batch_duration_seconds", MetricType::Histogram, "The computation of a batch");
  MetricFamily queue = counter("queue_seconds_total", "Time that requests have waited, summed");
  MetricFamily open = gauge("open_streams", "Streams that are open");
  MetricFamily opened = counter("streams_opened_total", "Streams that were opened");
  MetricFamily ended = counter("streams_ended_total", "Streams that ended, by reason");
  MetricFamily memory = gauge("memory_bytes", "Memory, by what it holds");
  MetricFamily last =
      gauge("last_request_timestamp_seconds", "When the last request was answered, since 1970");

  Add({{"version", ct_version()}}, 1, &build);
  Add({}, repository_->ready() ? 1 : 0, &ready);
  for (const ModelRepository::Entry& entry : repository_->index()) {
    Add({{"model", entry.name}}, entry.ready ? 1 : 0, &model_ready);
  }
  for (const std::shared_ptr<ServedModel>& model : repository_->loaded()) {
    const Statistics counts = model->statistics();
    const Labels labels = {{"model", model->name()}};
    const auto with = [&labels](const char* name, const char* value) {
      Labels more = labels;
      more.push_back({name, value});
      return more;
    };
    const auto number = [](int64_t x) { return static_cast<double>(x); };
    Add(labels, number(counts.requests), &requests);
    Add(labels, number(counts.steps), &steps);
    Add(labels, number(counts.repeats), &repeats);
    Add(labels, number(counts.waiting), &waiting);
    Add(labels, counts.batch_rows, &rows);
    Add(labels, counts.latency, &latency);
    Add(labels, counts.compute, &compute);
    Add(labels, number(counts.queue_ns) * 1e-9, &queue);
    Add(labels, number(counts.open_streams), &open);
    Add(labels, number(counts.opened), &opened);
    Add(labels, number(counts.last_request_ms) * 1e-3, &last);
    // All reasons from the beginning: a rate needs the 0 before the first.
    for (int i = 1; i < kReasons; ++i) {
      Add(with("reason", NameOf(static_cast<Reason>(i))), number(counts.refused[i]), &refused);
    }
    for (int i = 1; i < kEnds; ++i) {
      Add(with("reason", NameOf(static_cast<End>(i))), number(counts.ended[i]), &ended);
    }
    Add(with("kind", "weights"), number(counts.memory.weights), &memory);
    Add(with("kind", "model_file"), number(counts.memory.model_file), &memory);
    Add(with("kind", "streams"), number(counts.memory.streams), &memory);
    Add(with("kind", "streams_overhead"), number(counts.memory.streams_overhead), &memory);
    Add(with("kind", "arenas"), number(counts.memory.arenas), &memory);
    Add(with("kind", "answers"), number(counts.answer_bytes), &memory);
  }
  return {build,   ready,   model_ready, requests, steps,  repeats, refused, waiting, rows,
          latency, compute, queue,       open,     opened, ended,   memory,  last};
}

std::string Metrics::Text() const {
  std::ostringstream text;
  prometheus::TextSerializer().Serialize(text, Collect());
  return text.str();
}

}  // namespace continual_transformers::server
