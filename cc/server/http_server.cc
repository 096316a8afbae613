#include "cc/server/http_server.h"

#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <boost/asio.hpp>
#include <boost/asio/ssl.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <boost/beast/ssl.hpp>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <future>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "cc/server/history.h"
#include "cc/server/http_api.h"
#include "cc/server/http_message.h"
#include "cc/server/log.h"
#include "cc/session/error.h"

namespace continual_transformers::server {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;

using Seconds = std::chrono::seconds;
using PlainStream = beast::tcp_stream;
using TlsStream = beast::ssl_stream<beast::tcp_stream>;

class ConnectionBase {
 public:
  virtual ~ConnectionBase() = default;
  // Null: it is being destroyed.
  virtual std::shared_ptr<ConnectionBase> Lock() = 0;
  // Ends the connection when it has answered; at once with `now`. Any thread.
  virtual void Close(bool now) = 0;
  // Since when it waits for a request; Clock::time_point::max(): it does not. Any thread.
  virtual Clock::time_point idle_since() const = 0;
  // Ends the connection unless a request has come. Any thread.
  virtual void CloseIfIdle() = 0;
};

// The connections that are open, so that they can be counted and closed.
class Connections {
 public:
  void Add(ConnectionBase* connection) {
    std::lock_guard<std::mutex> lock(mutex_);
    open_.insert(connection);
  }

  void Remove(ConnectionBase* connection) {
    std::lock_guard<std::mutex> lock(mutex_);
    open_.erase(connection);
    changed_.notify_all();
  }

  size_t count() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return open_.size();
  }

  void Close(bool now) {
    for (const std::shared_ptr<ConnectionBase>& connection : open()) connection->Close(now);
  }

  // Ends the connection that has waited longest for a request. Returns whether there was one.
  bool CloseLongestIdle() {
    std::shared_ptr<ConnectionBase> longest;
    Clock::time_point since = Clock::time_point::max();
    for (const std::shared_ptr<ConnectionBase>& connection : open()) {
      const Clock::time_point idle_since = connection->idle_since();
      if (idle_since >= since) continue;
      since = idle_since;
      longest = connection;
    }
    if (longest == nullptr) return false;
    longest->CloseIfIdle();
    return true;
  }

  bool WaitUntilNone(std::chrono::milliseconds time) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, time, [this] { return open_.empty(); });
  }

 private:
  // The caller lets go of them without the lock: the last owner of a connection removes it, which
  // needs the lock.
  std::vector<std::shared_ptr<ConnectionBase>> open() const {
    std::vector<std::shared_ptr<ConnectionBase>> open;
    std::lock_guard<std::mutex> lock(mutex_);
    open.reserve(open_.size());
    for (ConnectionBase* const connection : open_) {
      std::shared_ptr<ConnectionBase> locked = connection->Lock();
      if (locked != nullptr) open.push_back(std::move(locked));
    }
    return open;
  }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::set<ConnectionBase*> open_;
};

// An entry of Connections.
class Registration {
 public:
  Registration(Connections* connections, ConnectionBase* connection)
      : connections_(connections), connection_(connection) {
    connections_->Add(connection_);
  }
  ~Registration() { connections_->Remove(connection_); }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

 private:
  Connections* const connections_;
  ConnectionBase* const connection_;
};

struct Shared {
  HttpOptions options;
  HttpApi* api;
  Connections* connections;
  std::atomic<bool> stopping{false};
};

const char* TextOf(int status) {
  return http::obsolete_reason(static_cast<http::status>(status)).data();
}

// A connection reads one request, answers it, and reads the next. All of it runs on the strand of
// its socket, except Answer, gone and Close.
template <typename Stream>
class Connection final : public HttpExchange,
                         public ConnectionBase,
                         public std::enable_shared_from_this<Connection<Stream>> {
 public:
  static constexpr bool kTls = std::is_same_v<Stream, TlsStream>;

  template <typename... Arguments>
  explicit Connection(Shared* shared, Arguments&&... arguments)
      : registration_(shared->connections, this),
        shared_(shared),
        stream_(std::forward<Arguments>(arguments)...),
        timer_(executor()) {}

  void Start() {
    asio::dispatch(executor(), [self = this->shared_from_this()] { self->Begin(); });
  }

  void Answer(std::function<HttpResponse()> make) override {
    // On the connection's own strand this goes on at once: the answer does not wait until this
    // thread has run the batches of others.
    asio::dispatch(executor(), [self = this->shared_from_this(), make = std::move(make)] {
      self->Respond(make);
    });
  }

  bool gone() const override { return gone_; }

  std::shared_ptr<ConnectionBase> Lock() override { return this->weak_from_this().lock(); }

  void Close(bool now) override {
    asio::post(executor(), [self = this->shared_from_this(), now] {
      self->keep_alive_ = false;
      if (now || self->state_ == State::kIdle || self->state_ == State::kEvents) self->Abort();
    });
  }

  Clock::time_point idle_since() const override { return idle_since_; }

  void CloseIfIdle() override {
    // It is not chosen again.
    idle_since_ = Clock::time_point::max();
    asio::post(executor(), [self = this->shared_from_this()] {
      if (self->waits_) self->Abort();
    });
  }

 private:
  enum class State {
    kIdle,      // no byte of a request yet
    kReading,   // a request
    kHandling,  // waits for the answer
    kWriting,
    kEvents,
  };

  auto executor() { return stream_.get_executor(); }
  tcp::socket& socket() { return beast::get_lowest_layer(stream_).socket(); }
  void ExpireAfterIdle() {
    beast::get_lowest_layer(stream_).expires_after(Seconds(shared_->options.idle_seconds));
  }

  void Begin() {
    WaitsForRequest();
    if constexpr (kTls) {
      ExpireAfterIdle();
      stream_.async_handshake(asio::ssl::stream_base::server,
                              [self = this->shared_from_this()](error_code error) {
                                if (!error) self->ReadHead();
                              });
    } else {
      ReadHead();
    }
  }

  // Until the headers of a request have come, or the handshake has failed.
  void WaitsForRequest() {
    waits_ = true;
    idle_since_ = Clock::now();
  }

  void ReadHead() {
    if (shared_->stopping) return Abort();
    WaitsForRequest();
    state_ = buffer_.size() == 0 ? State::kIdle : State::kReading;
    parser_.emplace();
    parser_->header_limit(static_cast<uint32_t>(shared_->options.max_header_bytes));
    parser_->body_limit(static_cast<uint64_t>(shared_->options.max_body_bytes));
    ExpireAfterIdle();
    http::async_read_header(
        stream_, buffer_, *parser_,
        [self = this->shared_from_this()](error_code error, size_t) { self->OnHead(error); });
  }

  void OnHead(error_code error) {
    waits_ = false;
    idle_since_ = Clock::time_point::max();
    state_ = State::kReading;
    keep_alive_ = false;
    if (error) return RefuseMessage(error);
    const auto& message = parser_->get();
    const auto header = [&message](auto name) { return std::string(message[name]); };
    request_ = {};
    request_.method = std::string(message.method_string());
    request_.target = std::string(message.target());
    request_.host = header(http::field::host);
    request_.origin = header(http::field::origin);
    request_.authorization = header(http::field::authorization);
    request_.content_encoding = header(http::field::content_encoding);
    request_.accept = header(http::field::accept);
    request_.inference_header_content_length = header("Inference-Header-Content-Length");
    only_head_ = request_.method == "HEAD";
    if (only_head_) request_.method = "GET";
    http_1_0_ = message.version() < 11;
    if (!http_1_0_ && message.count(http::field::host) == 0) {
      return Write(ErrorResponse(400, Reason::kInvalidArgument, "the request has no header Host"));
    }

    // A proxy in front may read these in another way, and see other requests in the bytes.
    if (message.count(http::field::host) > 1) {
      return Write(ErrorResponse(400, Reason::kInvalidArgument, "the request has several Hosts"));
    }
    if (message.count(http::field::transfer_encoding) > 0 &&
        (message.count(http::field::transfer_encoding) > 1 ||
         !beast::iequals(message[http::field::transfer_encoding], "chunked"))) {
      return Write(ErrorResponse(501, Reason::kUnsupported,
                                 "the only Transfer-Encoding that this server reads is chunked"));
    }

    if (std::optional<HttpResponse> refusal = shared_->api->Refuse(request_)) {
      // The rest of the message is not read, unless there is none.
      keep_alive_ = parser_->is_done() && message.keep_alive();
      return Write(std::move(*refusal));
    }
    if (parser_->is_done()) return OnBody();
    if (beast::iequals(message[http::field::expect], "100-continue")) {
      static constexpr char kContinue[] = "HTTP/1.1 100 Continue\r\n\r\n";
      asio::async_write(stream_, asio::buffer(kContinue, sizeof(kContinue) - 1),
                        [self = this->shared_from_this()](error_code error_of_write, size_t) {
                          if (!error_of_write) self->ReadBody();
                        });
      return;
    }
    ReadBody();
  }

  void ReadBody() {
    ExpireAfterIdle();
    http::async_read(stream_, buffer_, *parser_,
                     [self = this->shared_from_this()](error_code error, size_t) {
                       if (error) return self->RefuseMessage(error);
                       self->OnBody();
                     });
  }

  void OnBody() {
    beast::get_lowest_layer(stream_).expires_never();
    keep_alive_ = parser_->get().keep_alive() && !shared_->stopping;
    request_.body = std::move(parser_->get().body());
    state_ = State::kHandling;
    ++exchange_;
    shared_->api->Handle(std::move(request_), this->shared_from_this());
    if (state_ == State::kHandling) WatchClient();
  }

  // Learns that the client has gone while the request waits for its answer.
  void WatchClient() {
    watching_ = true;
    socket().async_wait(tcp::socket::wait_read, [self = this->shared_from_this(),
                                                 exchange = exchange_](error_code error) {
      self->watching_ = false;
      if (error || exchange != self->exchange_) return;
      // The client has sent its next request, or has gone.
      char byte;
      const ssize_t got = recv(self->socket().native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
      if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) self->gone_ = true;
      if (self->gone_ && self->state_ == State::kEvents) self->Abort();
    });
  }

  // The message cannot be read. `error` says why.
  void RefuseMessage(error_code error) {
    const HttpOptions& options = shared_->options;
    if (error == http::error::header_limit) {
      return Write(ErrorResponse(431, Reason::kInvalidArgument,
                                 "the headers of the request have more than " +
                                     std::to_string(options.max_header_bytes) + " bytes"));
    }
    if (error == http::error::body_limit) {
      return Write(ErrorResponse(413, Reason::kInvalidArgument,
                                 "the body of the request has more than " +
                                     std::to_string(options.max_body_bytes) +
                                     " bytes, the most that this server was started with"));
    }
    if (error == http::error::end_of_stream || error == http::error::partial_message)
      return Abort();
    if (error.category() == make_error_code(http::error::bad_method).category()) {
      return Write(ErrorResponse(400, Reason::kInvalidArgument,
                                 "this is not a request of HTTP/1.1: " + error.message()));
    }
    Abort();  // the connection has failed, or was idle for too long
  }

  void Respond(const std::function<HttpResponse()>& make) {
    ++exchange_;
    if (watching_) {
      error_code ignored;
      socket().cancel(ignored);
    }
    try {
      Write(make());
    } catch (const std::exception& error) {
      Write(ErrorResponse({Reason::kInternal, error.what(), {}}));
    }
  }

  void Write(HttpResponse response) {
    state_ = State::kWriting;
    response_ = std::move(response);
    const bool events = response_.events != nullptr;
    if (events || shared_->stopping) keep_alive_ = false;
    head_ = "HTTP/1.1 ";
    head_ += std::to_string(response_.status) + " " + TextOf(response_.status);
    const auto add = [this](const std::string& name, const std::string& value) {
      head_ += "\r\n" + name + ": " + value;
    };
    add("Content-Type", response_.content_type);
    add("X-Content-Type-Options", "nosniff");
    add("Cache-Control", "no-store");
    for (const auto& [name, value] : response_.headers) add(name, value);
    if (!events) {
      size_t bytes = response_.body.size();
      for (const std::string& tensor : response_.tensors) bytes += tensor.size();
      add("Content-Length", std::to_string(bytes));
    }
    if (!keep_alive_) {
      add("Connection", "close");
    } else if (http_1_0_) {
      add("Connection", "keep-alive");
    }
    head_ += "\r\n\r\n";
    std::vector<asio::const_buffer> buffers = {asio::buffer(head_)};
    if (!only_head_) {
      buffers.emplace_back(asio::buffer(response_.body));
      for (const std::string& tensor : response_.tensors) {
        buffers.emplace_back(asio::buffer(tensor));
      }
    }
    ExpireAfterIdle();
    asio::async_write(stream_, buffers,
                      [self = this->shared_from_this()](error_code error, size_t) {
                        if (error) return self->Abort();
                        self->OnWritten();
                      });
  }

  void OnWritten() {
    if (response_.events != nullptr && !only_head_) {
      state_ = State::kEvents;
      WatchClient();
      return WriteEvents();
    }
    response_ = {};
    if (keep_alive_) return ReadHead();
    Shutdown();
  }

  void WriteEvents() {
    if (state_ != State::kEvents || shared_->stopping) return Abort();
    const bool last = response_.events->ended();
    event_ = response_.events->Next();
    if (event_.empty()) return WaitForEvents();
    ExpireAfterIdle();
    asio::async_write(stream_, asio::buffer(event_),
                      [self = this->shared_from_this(), last](error_code error, size_t) {
                        if (error) return self->Abort();
                        if (last) return self->Shutdown();
                        self->WaitForEvents();
                      });
  }

  void WaitForEvents() {
    constexpr auto kBetween = std::chrono::milliseconds(200);
    timer_.expires_after(kBetween);
    timer_.async_wait([self = this->shared_from_this()](error_code error) {
      if (!error) self->WriteEvents();
    });
  }

  // Ends the connection so that the client can read the whole answer: closing a socket with unread
  // data would throw away what is on its way.
  void Shutdown() {
    state_ = State::kIdle;
    constexpr auto kMost = Seconds(2);
    beast::get_lowest_layer(stream_).expires_after(kMost);
    if constexpr (kTls) {
      stream_.async_shutdown([self = this->shared_from_this()](error_code) { self->Abort(); });
    } else {
      error_code ignored;
      socket().shutdown(tcp::socket::shutdown_send, ignored);
      buffer_.clear();
      Discard();
    }
  }

  void Discard() {
    constexpr size_t kPart = 64 << 10;
    stream_.async_read_some(buffer_.prepare(kPart),
                            [self = this->shared_from_this()](error_code error, size_t) {
                              if (!error) self->Discard();
                            });
  }

  void Abort() {
    state_ = State::kIdle;
    response_ = {};
    timer_.cancel();
    error_code ignored;
    socket().close(ignored);
  }

  const Registration registration_;  // the last to go: with it the server may go
  Shared* const shared_;
  Stream stream_;
  asio::basic_waitable_timer<std::chrono::steady_clock, asio::wait_traits<Clock>,
                             typename Stream::executor_type>
      timer_;
  beast::flat_buffer buffer_;
  std::optional<http::request_parser<http::string_body>> parser_;
  HttpRequest request_;
  HttpResponse response_;
  std::string head_, event_;
  State state_ = State::kIdle;
  bool keep_alive_ = false, only_head_ = false, http_1_0_ = false;
  bool watching_ = false;  // WatchClient's wait has not ended
  int64_t exchange_ = 0;   // so that a late wait is not taken for the present one's
  std::atomic<bool> gone_{false};
  bool waits_ = false;  // for the headers of a request
  std::atomic<Clock::time_point> idle_since_{Clock::time_point::max()};
};

asio::ssl::context TlsContext(const Security& security) {
  asio::ssl::context context(asio::ssl::context::tls_server);
  try {
    context.set_options(asio::ssl::context::default_workarounds | asio::ssl::context::no_sslv2 |
                        asio::ssl::context::no_sslv3 | asio::ssl::context::no_tlsv1 |
                        asio::ssl::context::no_tlsv1_1);
    context.use_certificate_chain(asio::buffer(security.certificate));
    context.use_private_key(asio::buffer(security.key), asio::ssl::context::pem);
    if (!security.client_ca.empty()) {
      context.add_certificate_authority(asio::buffer(security.client_ca));
      context.set_verify_mode(asio::ssl::verify_peer | asio::ssl::verify_fail_if_no_peer_cert);
    }
  } catch (const boost::system::system_error& error) {
    throw Error(
        ErrorCode::kInvalidArgument,
        std::string("cannot use the certificate, key or client CA for TLS: ") + error.what());
  }
  // A server that verifies clients needs a name for the sessions that they resume.
  static constexpr unsigned char kName[] = "continual-transformers";
  SSL_CTX_set_session_id_context(context.native_handle(), kName, sizeof(kName) - 1);
  return context;
}

}  // namespace

class HttpServer::Impl {
 public:
  Impl(const HttpOptions& options, const Security& security, const ServerParts& parts)
      : api_(security, parts, options.limits),
        shared_{options, &api_, &connections_},
        io_(std::max(options.threads, 1)),
        acceptor_(asio::make_strand(io_)),
        retry_(acceptor_.get_executor()),
        sampler_(io_) {
    if (security.tls()) tls_.emplace(TlsContext(security));
    Listen();
    Accept();
    SampleLater();
    for (int i = 0; i < std::max(options.threads, 1); ++i) {
      threads_.emplace_back([this] { Run(); });
    }
  }

  ~Impl() { Stop(0); }

  int port() const { return port_; }

  void Stop(int64_t milliseconds) {
    if (threads_.empty()) return;
    shared_.stopping = true;
    // Waits for it: a port that is still open when the threads have ended would take connections
    // that nobody answers.
    std::promise<void> closed;
    asio::post(acceptor_.get_executor(), [this, &closed] {
      error_code ignored;
      acceptor_.close(ignored);
      retry_.cancel();
      closed.set_value();
    });
    closed.get_future().wait();
    connections_.Close(false);
    if (!connections_.WaitUntilNone(std::chrono::milliseconds(milliseconds))) {
      // Requests that still wait for their model keep their connections until it answers.
      do {
        connections_.Close(true);
      } while (!connections_.WaitUntilNone(std::chrono::milliseconds(100)));
    }
    io_.stop();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  void Listen() {
    const HttpOptions& options = shared_.options;
    const std::string place = options.host + ":" + std::to_string(options.port);
    try {
      tcp::resolver resolver(io_);
      const auto found =
          resolver.resolve(options.host, std::to_string(options.port), tcp::resolver::passive);
      const tcp::endpoint endpoint = found.begin()->endpoint();
      acceptor_.open(endpoint.protocol());
      acceptor_.set_option(asio::socket_base::reuse_address(true));
      acceptor_.bind(endpoint);
      acceptor_.listen();
      port_ = acceptor_.local_endpoint().port();
    } catch (const boost::system::system_error& error) {
      throw Error(ErrorCode::kIo, "cannot listen on " + place + ": " + error.code().message() +
                                      "; choose another port with --http-port");
    }
  }

  void Run() {
    while (true) {
      try {
        io_.run();
        return;
      } catch (const std::exception& error) {
        // No memory for a connection, for example. It is closed, and the others go on.
        Log(LogLevel::kError, "http_connection_failed", {{"error", error.what()}});
      }
    }
  }

  void Accept() {
    acceptor_.async_accept(asio::make_strand(io_), [this](error_code error, tcp::socket socket) {
      if (shared_.stopping || error == asio::error::operation_aborted) return;
      if (error) {
        // The process has too many files open, for example: more may close soon.
        Log(LogLevel::kWarning, "http_accept_failed", {{"error", error.message()}});
        retry_.expires_after(std::chrono::milliseconds(100));
        retry_.async_wait([this](error_code stopped) {
          if (!stopped) Accept();
        });
        return;
      }
      // First: if there is no memory to welcome this one, others still come.
      Accept();
      Welcome(std::move(socket));
    });
  }

  void Welcome(tcp::socket socket) {
    // Many idle connections must not lock out a client that has a request.
    if (connections_.count() >= static_cast<size_t>(shared_.options.max_connections) &&
        !connections_.CloseLongestIdle()) {
      Log(LogLevel::kWarning, "http_connection_refused",
          {{"max_connections", shared_.options.max_connections}});
      static constexpr char kFull[] =
          "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
      // Without waiting: what does not fit in the socket's buffer is lost.
      error_code ignored;
      socket.non_blocking(true, ignored);
      if (!tls_.has_value()) socket.send(asio::buffer(kFull, sizeof(kFull) - 1), 0, ignored);
      return;
    }
    error_code ignored;
    socket.set_option(tcp::no_delay(true), ignored);
    if (tls_.has_value()) {
      std::make_shared<Connection<TlsStream>>(&shared_, std::move(socket), *tls_)->Start();
    } else {
      std::make_shared<Connection<PlainStream>>(&shared_, std::move(socket))->Start();
    }
  }

  void SampleLater() {
    sampler_.expires_after(Seconds(History::kSeconds));
    sampler_.async_wait([this](error_code error) {
      if (error) return;
      SampleLater();  // also if Sample throws
      api_.Sample();
    });
  }

  Connections connections_;
  HttpApi api_;
  Shared shared_;
  std::optional<asio::ssl::context> tls_;
  asio::io_context io_;
  tcp::acceptor acceptor_;
  asio::steady_timer retry_, sampler_;
  int port_ = 0;
  std::vector<std::thread> threads_;
};

HttpServer::HttpServer(const HttpOptions& options, const Security& security,
                       const ServerParts& parts)
    : impl_(std::make_unique<Impl>(options, security, parts)) {}

HttpServer::~HttpServer() = default;

int HttpServer::port() const { return impl_->port(); }

void HttpServer::Stop(int64_t milliseconds) { impl_->Stop(milliseconds); }

}  // namespace continual_transformers::server
