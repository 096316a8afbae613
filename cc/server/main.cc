// continual-transformers-server: serves models until SIGTERM or SIGINT.

#include <google/protobuf/stubs/logging.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <exception>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>

#include "cc/server/grpc_server.h"
#include "cc/server/http_server.h"
#include "cc/server/journal.h"
#include "cc/server/log.h"
#include "cc/server/logged_load.h"
#include "cc/server/model_repository.h"
#include "cc/server/options.h"
#include "cc/server/security.h"
#include "cc/server/server_parts.h"
#include "cc/server/shard_owner.h"
#include "cc/server/snapshots.h"
#include "cc/session/error.h"

namespace continual_transformers::server {
namespace {

// The signals that end the server. They are blocked in every thread, and waited for in this one.
sigset_t EndingSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

// Waits for a signal, at most so long. Returns 0 if none came.
int WaitForSignal(const sigset_t& signals, double seconds) {
  timespec time;
  time.tv_sec = static_cast<time_t>(seconds);
  time.tv_nsec = static_cast<long>((seconds - static_cast<double>(time.tv_sec)) * 1e9);
  const int signal = sigtimedwait(&signals, nullptr, &time);
  return signal > 0 ? signal : 0;
}

// A file that tells others that the server is ready, until it ends.
class ReadyFile {
 public:
  ReadyFile(std::string path, int grpc_port, int http_port) : path_(std::move(path)) {
    const nlohmann::ordered_json facts = {
        {"pid", getpid()}, {"grpc_port", grpc_port}, {"http_port", http_port}};
    const std::string beside = path_ + ".new";
    std::ofstream file(beside, std::ios::trunc);
    file << facts.dump() << '\n';
    file.close();
    // Nobody reads half a file.
    if (!file || std::rename(beside.c_str(), path_.c_str()) != 0) {
      throw Error(ErrorCode::kIo, "cannot write " + path_ + ": " + std::strerror(errno));
    }
  }
  ~ReadyFile() { std::remove(path_.c_str()); }
  ReadyFile(const ReadyFile&) = delete;
  ReadyFile& operator=(const ReadyFile&) = delete;

 private:
  const std::string path_;
};

void Serve(const Options& options, const sigset_t& signals) {
  const Security security =
      Security::Read(options.tls_certificate, options.tls_key, options.tls_client_ca,
                     options.token_file, options.operator_token_file);
  if (options.sharded && !security.knows_operator()) {
    throw Error(ErrorCode::kInvalidArgument,
                "--sharded needs --operator-token-file (or --token-file): only who knows the token "
                "may give this server its shards");
  }
  ModelRepository repository(options.model);
  std::optional<Snapshots> snapshots;
  if (!options.snapshots.directory.empty()) {
    snapshots.emplace(options.snapshots);
    repository.AddObserver(&*snapshots);
  }
  // After the snapshots: it has steps that came later.
  std::optional<Journal> journal;
  if (!options.journal.url.empty()) {
    journal.emplace(options.journal);
    repository.AddObserver(&*journal);
  }
  // After the journal, from which it rebuilds streams.
  std::optional<ShardOwner> shards;
  if (options.sharded) {
    shards.emplace(journal.has_value() ? &*journal : nullptr);
    repository.AddObserver(&*shards);
  }
  for (const auto& [name, path] : options.models) repository.Add(name, path);
  const ServerParts parts = {&repository, snapshots.has_value() ? &*snapshots : nullptr,
                             journal.has_value() ? &*journal : nullptr,
                             shards.has_value() ? &*shards : nullptr};

  // They answer while models load: live, and not ready.
  GrpcServer grpc(options.grpc, security, parts);
  HttpServer http(options.http, security, parts);
  Log(LogLevel::kInfo, "listening",
      {{"host", options.grpc.host},
       {"grpc_port", grpc.port()},
       {"http_port", http.port()},
       {"tls", security.tls()},
       {"token", !security.token.empty()}});
  const auto drain = [&] {
    const auto drain_ms = static_cast<int64_t>(options.drain_seconds * 1000);
    grpc.SetServing(false);
    repository.Drain();
    if (journal.has_value()) journal->Finish();
    grpc.Stop(drain_ms);
    http.Stop(drain_ms);
    if (snapshots.has_value()) snapshots->Finish();
  };
  std::optional<ReadyFile> ready;
  try {
    for (const auto& [name, path] : options.models) LoadAndLog(&repository, name);
    grpc.SetServing(true);
    Log(LogLevel::kInfo, "ready",
        {{"grpc_port", grpc.port()}, {"http_port", http.port()}, {"pid", getpid()}});
    if (!options.ready_file.empty()) ready.emplace(options.ready_file, grpc.port(), http.port());
  } catch (...) {
    // Models that were loaded may have taken steps, and their snapshots count as a crashed server's
    // until they are finished.
    drain();
    throw;
  }

  int signal = 0;
  while (signal == 0) {
    constexpr double kHousekeepingSeconds = 0.25;
    signal = WaitForSignal(signals, kHousekeepingSeconds);
    try {
      for (const auto& model : repository.loaded()) model->EvictIdle();
    } catch (const std::exception& error) {
      // No memory, for example. The server goes on, and tries it again.
      Log(LogLevel::kError, "idle_streams_not_ended", {{"error", error.what()}});
    }
  }
  ready.reset();
  Log(LogLevel::kInfo, "draining", {{"signal", signal == SIGTERM ? "SIGTERM" : "SIGINT"}});
  drain();
  Log(LogLevel::kInfo, "ended");
}

int Main(int argc, char** argv) {
  Options options;
  int status = 0;
  try {
    if (!ParseOptions(argc, argv, &options, &status)) return status;
    SetLogLevel(options.log_level);
    // It would write a line for each message that is none. gRPC refuses them.
    google::protobuf::SetLogHandler(nullptr);
    // States of streams are for this user only.
    umask(0077);
    // A file that may not grow is an error of the write.
    signal(SIGXFSZ, SIG_IGN);
    const sigset_t signals = EndingSignals();
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    if (options.die_with_parent) {
      const pid_t parent = getppid();
      prctl(PR_SET_PDEATHSIG, SIGTERM);
      if (getppid() != parent) return 1;
    }
    Serve(options, signals);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "continual-transformers serve: %s\n", error.what());
    return 1;
  }
}

}  // namespace
}  // namespace continual_transformers::server

int main(int argc, char** argv) { return continual_transformers::server::Main(argc, argv); }
