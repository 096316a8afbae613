#include "cc/server/metrics.h"

#include <continual_transformers.h>
#include <prometheus/text_serializer.h>

#include <limits>
#include <map>
#include <memory>
#include <sstream>
#include <utility>

#include "cc/server/journal.h"
#include "cc/server/model_repository.h"
#include "cc/server/shard_owner.h"
#include "cc/server/snapshots.h"

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

MetricFamily Counter(const std::string& name, const std::string& help) {
  return Family(name, MetricType::Counter, help);
}

MetricFamily Gauge(const std::string& name, const std::string& help) {
  return Family(name, MetricType::Gauge, help);
}

double Number(int64_t x) { return static_cast<double>(x); }

// A number of every model that someone keeps.
template <typename Counts>
struct KeptNumber {
  MetricFamily family;
  double (*of)(const Counts&);
};

template <typename Counts>
void AddKept(const std::map<std::string, Counts>& counts, std::vector<KeptNumber<Counts>> numbers,
             std::vector<MetricFamily>* families) {
  for (KeptNumber<Counts>& number : numbers) {
    for (const auto& [model, of_model] : counts) {
      Add({{"model", model}}, number.of(of_model), &number.family);
    }
    families->push_back(std::move(number.family));
  }
}

}  // namespace

std::vector<MetricFamily> Metrics::Collect() const {
  std::vector<MetricFamily> families;
  CollectModels(&families);
  if (parts_.snapshots != nullptr) CollectSnapshots(&families);
  if (parts_.journal != nullptr) CollectJournal(&families);
  if (parts_.shards != nullptr) CollectShards(&families);
  return families;
}

void Metrics::CollectSnapshots(std::vector<MetricFamily>* families) const {
  using Counts = SnapshotCounts;
  AddKept<Counts>(
      parts_.snapshots->counts(),
      {{Counter("snapshot_written_streams_total", "Streams written to the state directory"),
        [](const Counts& counts) { return Number(counts.written); }},
       {Counter("snapshot_written_bytes_total", "Bytes of these"),
        [](const Counts& counts) { return Number(counts.written_bytes); }},
       {Counter("snapshot_failures_total", "Times that a snapshot could not be written"),
        [](const Counts& counts) { return Number(counts.failures); }},
       {Gauge("snapshot_waiting_requests", "Requests whose answers wait for the disk"),
        [](const Counts& counts) { return Number(counts.held); }},
       {Gauge("snapshot_age_seconds", "Since the last complete snapshot"),
        [](const Counts& counts) { return counts.age_seconds; }}},
      families);
}

void Metrics::CollectJournal(std::vector<MetricFamily>* families) const {
  using Counts = JournalCounts;
  AddKept<Counts>(
      parts_.journal->counts(),
      {{Gauge("journal_connected", "Whether Redis can be reached"),
        [](const Counts& counts) { return counts.connected ? 1.0 : 0.0; }},
       {Counter("journal_entries_total", "Entries that Redis has acknowledged"),
        [](const Counts& counts) { return Number(counts.entries); }},
       {Counter("journal_bytes_total", "Bytes of these"),
        [](const Counts& counts) { return Number(counts.bytes); }},
       {Counter("journal_copied_streams_total", "Streams copied whole, instead of their inputs"),
        [](const Counts& counts) { return Number(counts.copies); }},
       {Gauge("journal_kept_entries", "Entries that Redis has now"),
        [](const Counts& counts) { return Number(counts.kept); }},
       {Counter("journal_failures_total", "Times that Redis was away"),
        [](const Counts& counts) { return Number(counts.failures); }},
       {Counter("journal_rebuilt_streams_total", "Streams rebuilt from the journal"),
        [](const Counts& counts) { return Number(counts.rebuilt); }},
       {Counter("journal_lost_streams_total", "Streams that could not be rebuilt"),
        [](const Counts& counts) { return Number(counts.lost); }},
       {Counter("journal_fenced_total", "Times that another server had taken over a shard"),
        [](const Counts& counts) { return Number(counts.fenced); }},
       {Gauge("journal_waiting_batches", "Batches whose answers wait for Redis"),
        [](const Counts& counts) { return Number(counts.held); }}},
      families);
}

void Metrics::CollectShards(std::vector<MetricFamily>* families) const {
  const std::shared_ptr<const ShardTable> table = parts_.shards->table();
  families->push_back(Gauge("shard_epoch", "The version of this server's table of shards"));
  Add({}, Number(table->epoch), &families->back());
  families->push_back(Gauge("shards", "Shards that this server has"));
  Add({}, static_cast<double>(table->Own().count()), &families->back());
}

void Metrics::CollectModels(std::vector<MetricFamily>* families) const {
  MetricFamily build = Gauge("build_info", "The version of the server. Its value is always 1");
  MetricFamily ready = Gauge("ready", "Whether its models are loaded and it does not end");
  MetricFamily model_ready = Gauge("model_ready", "Whether the model is loaded");
  MetricFamily requests = Counter("requests_total", "Requests answered");
  MetricFamily steps = Counter("steps_total", "Input steps taken, of all streams");
  MetricFamily repeats =
      Counter("repeats_total", "Rows of requests that were answered with the last answer again");
  MetricFamily refused = Counter("refused_requests_total", "Requests refused, by reason");
  MetricFamily waiting = Gauge("waiting_requests", "Requests that wait for their batch");
  MetricFamily rows = Family("batch_rows", MetricType::Histogram, "Streams of a batch");
  MetricFamily latency = Family("request_duration_seconds", MetricType::Histogram,
                                "From a request's arrival at its model to its answer");
  MetricFamily compute =
      Family("batch_duration_seconds", MetricType::Histogram, "The computation of a batch");
  MetricFamily queue = Counter("queue_seconds_total", "Time that requests have waited, summed");
  MetricFamily open = Gauge("open_streams", "Streams that are open");
  MetricFamily opened = Counter("streams_opened_total", "Streams that were opened");
  MetricFamily ended = Counter("streams_ended_total", "Streams that ended, by reason");
  MetricFamily memory = Gauge("memory_bytes", "Memory, by what it holds");
  MetricFamily last =
      Gauge("last_request_timestamp_seconds", "When the last request was answered, since 1970");

  Add({{"version", ct_version()}}, 1, &build);
  Add({}, parts_.repository->ready() ? 1 : 0, &ready);
  for (const ModelRepository::Entry& entry : parts_.repository->index()) {
    Add({{"model", entry.name}}, entry.ready ? 1 : 0, &model_ready);
  }
  for (const std::shared_ptr<ServedModel>& model : parts_.repository->loaded()) {
    const Statistics counts = model->statistics();
    const Labels labels = {{"model", model->name()}};
    const auto with = [&labels](const char* name, const char* value) {
      Labels more = labels;
      more.push_back({name, value});
      return more;
    };
    Add(labels, Number(counts.requests), &requests);
    Add(labels, Number(counts.steps), &steps);
    Add(labels, Number(counts.repeats), &repeats);
    Add(labels, Number(counts.waiting), &waiting);
    Add(labels, counts.batch_rows, &rows);
    Add(labels, counts.latency, &latency);
    Add(labels, counts.compute, &compute);
    Add(labels, Number(counts.queue_ns) * 1e-9, &queue);
    Add(labels, Number(counts.open_streams), &open);
    Add(labels, Number(counts.opened), &opened);
    Add(labels, Number(counts.last_request_ms) * 1e-3, &last);
    // All reasons from the beginning: a rate needs the 0 before the first.
    for (int i = 1; i < kReasons; ++i) {
      Add(with("reason", NameOf(static_cast<Reason>(i))), Number(counts.refused[i]), &refused);
    }
    for (int i = 1; i < kEnds; ++i) {
      Add(with("reason", NameOf(static_cast<End>(i))), Number(counts.ended[i]), &ended);
    }
    Add(with("kind", "weights"), Number(counts.memory.weights), &memory);
    Add(with("kind", "model_file"), Number(counts.memory.model_file), &memory);
    Add(with("kind", "streams"), Number(counts.memory.streams), &memory);
    Add(with("kind", "streams_overhead"), Number(counts.memory.streams_overhead), &memory);
    Add(with("kind", "arenas"), Number(counts.memory.arenas), &memory);
    Add(with("kind", "answers"), Number(counts.answer_bytes), &memory);
  }
  for (MetricFamily* const family :
       {&build, &ready, &model_ready, &requests, &steps, &repeats, &refused, &waiting, &rows,
        &latency, &compute, &queue, &open, &opened, &ended, &memory, &last}) {
    families->push_back(std::move(*family));
  }
}

std::string Metrics::Text() const {
  std::ostringstream text;
  prometheus::TextSerializer().Serialize(text, Collect());
  return text.str();
}

}  // namespace continual_transformers::server
