#include "cc/server/options.h"

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <cstdint>

#include "cc/session/error.h"

namespace continual_transformers::server {
namespace {

// "name=path", or a path whose stem is the name.
std::pair<std::string, std::string> NameAndPath(const std::string& argument) {
  const size_t slash = argument.find('/');
  const size_t equals = argument.find('=');
  if (equals != std::string::npos && equals < slash) {
    return {argument.substr(0, equals), argument.substr(equals + 1)};
  }
  std::string stem = argument.substr(argument.rfind('/') + 1);
  const size_t dot = stem.rfind('.');
  if (dot != std::string::npos && dot > 0) stem.resize(dot);
  return {stem, argument};
}

std::string NotEmpty(const std::string& text) { return text.empty() ? "it is empty" : ""; }

// CLI11's ranges let a NaN pass.
std::string IsNumber(const std::string& text) {
  double value = 0;
  return CLI::detail::lexical_cast(text, value) && std::isfinite(value) ? "" : "it is no number";
}

}  // namespace

bool ParseOptions(int argc, char** argv, Options* options, int* status) {
  CLI::App app(
      "Serve streaming models over KServe V2: gRPC, HTTP, metrics and a page.\n"
      "Each MODEL is a model file that ct.Session.save wrote, as [name=]path.",
      "continual-transformers serve");
  std::vector<std::string> models;
  std::string log_level = "info";
  double idle_timeout = 0;
  int64_t max_delay_us = 0;
  double max_message_mb = static_cast<double>(options->grpc.max_message_bytes) / (1 << 20);
  double snapshot_every = static_cast<double>(options->snapshots.every.count()) / 1000;
  bool fast_disk = false;
  app.add_option("model", models, "[name=]model.safetensors")->required();

  CLI::Option_group* const ports = app.add_option_group("Ports");
  ports->add_option("--host", options->grpc.host, "The address to listen on")
      ->capture_default_str();
  ports->add_option("--grpc-port", options->grpc.port, "0: any free port")
      ->capture_default_str()
      ->check(CLI::Range(0, 65535));
  ports->add_option("--http-port", options->http.port, "0: any free port")
      ->capture_default_str()
      ->check(CLI::Range(0, 65535));
  ports
      ->add_option("--http-threads", options->http.threads,
                   "Threads that read requests over HTTP and run their batches")
      ->capture_default_str()
      ->check(CLI::Range(2, 1024));

  CLI::Option_group* const streams = app.add_option_group("Streams");
  streams->add_option("--max-streams", options->model.max_streams, "Open at once; 0: no limit")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  streams
      ->add_option("--idle-timeout", idle_timeout,
                   "Seconds until an idle stream is ended; 0: never")
      ->check(IsNumber)
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  streams->add_flag("--strict-start", options->model.strict_start,
                    "Refuse a stream's first step without sequence_start");

  CLI::Option_group* const batches = app.add_option_group("Batches");
  batches->add_option("--threads", options->model.threads, "Threads that compute a batch")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  batches
      ->add_option("--device", options->model.device,
                   "The device that computes batches: cpu, or cuda:0 for the first GPU")
      ->capture_default_str();
  batches->add_option("--max-batch", options->model.queue.rows, "Most rows of a batch")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  batches->add_option("--max-queue", options->model.queue.requests, "Most requests that wait")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 24));
  batches
      ->add_option("--max-delay-us", max_delay_us,
                   "How long a batch waits for more requests, in microseconds")
      ->capture_default_str()
      ->check(CLI::Range(0, 10000000));

  CLI::Option_group* const state = app.add_option_group("State");
  CLI::Option* const state_dir =
      state->add_option("--state-dir", options->snapshots.directory,
                        "Keep snapshots of the streams there, and go on with them");
  state->add_option("--snapshot-every", snapshot_every, "Seconds between snapshots")
      ->check(IsNumber)
      ->capture_default_str()
      ->check(CLI::Range(0.01, 1e6));
  state->add_option("--journal", options->journal.url,
                    "redis://host:port/database: write every step there before it is answered");
  state->add_flag("--other-weights", options->snapshots.other_weights,
                  "Go on with streams of the same model with other weights");
  state->add_flag("--no-power-loss", fast_disk,
                  "Do not wait for the disk: a machine that loses its power may forget the last "
                  "snapshots, a killed server does not");

  CLI::Option_group* const safety = app.add_option_group("Safety");
  safety->add_option("--tls-certificate", options->tls_certificate, "PEM file; turns TLS on");
  safety->add_option("--tls-key", options->tls_key, "PEM file");
  safety->add_option("--tls-client-ca", options->tls_client_ca,
                     "PEM file; clients need a certificate that it signed");
  safety->add_option("--token-file", options->token_file,
                     "Requests need the bearer token in this file");
  safety->add_option("--operator-token-file", options->operator_token_file,
                     "The operator's calls need the bearer token in this file, not the other one");
  safety
      ->add_option("--max-message-mb", max_message_mb,
                   "The most that a request may have, and the outputs in an answer")
      ->check(IsNumber)
      ->capture_default_str()
      ->check(CLI::Range(0.001, 2047.0));
  safety
      ->add_option("--max-steps", options->grpc.limits.steps,
                   "The most steps in a request, those of all its streams added up")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 30));
  safety->add_option("--max-header-bytes", options->grpc.max_header_bytes, "Of a request")
      ->capture_default_str()
      ->check(CLI::Range(1024, 1 << 20));
  safety
      ->add_option("--max-calls-per-connection", options->grpc.max_calls_per_connection,
                   "gRPC calls in progress on one connection")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  safety->add_option("--max-connections", options->http.max_connections, "Over HTTP")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  safety
      ->add_option("--http-idle-seconds", options->http.idle_seconds,
                   "How long a connection over HTTP may be idle, and a request or an answer may "
                   "take on the wire")
      ->capture_default_str()
      ->check(CLI::Range(1, 86400));

  CLI::Option_group* const several = app.add_option_group("Several servers");
  CLI::Option* const sharded = several->add_flag(
      "--sharded", options->sharded,
      "Take steps of the shards of streams only that PUT /v2/shards gives to this server");
  sharded->excludes(state_dir);

  CLI::Option_group* const process = app.add_option_group("Process");
  process->add_option("--log-level", log_level, "debug, info, warning, error or off")
      ->capture_default_str();
  process
      ->add_option("--drain-seconds", options->drain_seconds,
                   "How long calls in progress may take after SIGTERM")
      ->check(IsNumber)
      ->capture_default_str()
      ->check(CLI::Range(0.0, 3600.0));
  process->add_option("--ready-file", options->ready_file,
                      "Write the process id and the ports there when ready, as JSON");
  process->add_flag("--die-with-parent", options->die_with_parent,
                    "End when the process that started this one ends");
  // Set after the groups, because a group inherits the footer of its parent.
  app.footer(
      "Example:\n"
      "  continual-transformers serve --state-dir streams --idle-timeout 3600 watch.safetensors\n\n"
      "For several machines, see `continual-transformers serve --ray auto --help`.");
  for (CLI::App* const group : app.get_subcommands({})) {
    for (CLI::Option* const option : group->get_options()) option->check(NotEmpty);
  }
  try {
    app.parse(argc, argv);
    options->log_level = LogLevelOf(log_level);
  } catch (const CLI::ParseError& error) {
    *status = app.exit(error) == 0 ? 0 : 2;
    return false;
  }
  for (const std::string& model : models) options->models.push_back(NameAndPath(model));
  std::string& host = options->grpc.host;
  if (host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);  // IPv6
  options->grpc.max_message_bytes = std::llround(max_message_mb * (1 << 20));
  options->grpc.limits.answer_bytes = options->grpc.max_message_bytes;
  options->http.limits = options->grpc.limits;
  options->http.host = options->grpc.host;
  options->http.max_body_bytes = options->grpc.max_message_bytes;
  options->http.max_header_bytes = options->grpc.max_header_bytes;
  options->snapshots.every = std::chrono::milliseconds(std::llround(snapshot_every * 1000));
  options->journal.other_weights = options->snapshots.other_weights;
  options->journal.rebuild = !options->sharded;
  options->snapshots.power_loss = !fast_disk;
  // Rounded up: 0 means never.
  options->model.idle_timeout = std::chrono::milliseconds(
      static_cast<int64_t>(std::ceil(std::min(idle_timeout, 1e9) * 1000)));
  options->model.queue.delay = std::chrono::microseconds(max_delay_us);
  return true;
}

}  // namespace continual_transformers::server
