// A client of the HTTP port that sends what it is told to, right or wrong.
#ifndef CONTINUAL_TRANSFORMERS_TESTS_CC_HTTP_CLIENT_H_
#define CONTINUAL_TRANSFORMERS_TESTS_CC_HTTP_CLIENT_H_

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cstdint>
#include <string>

namespace continual_transformers::server {

// A connection to a port of this machine.
class HttpClient {
 public:
  explicit HttpClient(int port) : socket_(::socket(AF_INET, SOCK_STREAM, 0)) {
    // A test that waits for ever would not say which one it is.
    const timeval most = {30, 0};
    setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &most, sizeof(most));
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ =
        connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
  }
  ~HttpClient() { close(socket_); }
  HttpClient(const HttpClient&) = delete;
  HttpClient& operator=(const HttpClient&) = delete;

  bool connected() const { return connected_; }

  void Send(const std::string& text) {
    for (size_t sent = 0; sent < text.size();) {
      const ssize_t more = send(socket_, text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
      if (more <= 0) return;  // The server has closed: its answer says why.
      sent += static_cast<size_t>(more);
    }
  }

  void EndSending() { shutdown(socket_, SHUT_WR); }

  // Returns the status of the next response, and its body. 0: the connection has ended.
  int Receive(std::string* body = nullptr) {
    size_t end = 0;
    while ((end = buffer_.find("\r\n\r\n")) == std::string::npos) {
      if (!More()) return 0;
    }
    head_ = buffer_.substr(0, end);
    buffer_.erase(0, end + 4);
    const int status = std::stoi(head_.substr(9, 3));
    if (status == 100) return status;
    constexpr char kLength[] = "Content-Length: ";
    const size_t at = head_.find(kLength);
    if (at == std::string::npos) return status;
    const size_t length = std::stoul(head_.substr(at + sizeof(kLength) - 1));
    while (buffer_.size() < length) {
      if (!More()) return 0;
    }
    if (body != nullptr) *body = buffer_.substr(0, length);
    buffer_.erase(0, length);
    return status;
  }

  bool Ended() { return buffer_.empty() && !More(); }
  const std::string& head() const { return head_; }

 private:
  bool More() {
    char part[65536];
    const ssize_t got = recv(socket_, part, sizeof(part), 0);
    if (got <= 0) return false;
    buffer_.append(part, static_cast<size_t>(got));
    return true;
  }

  const int socket_;
  bool connected_ = false;
  std::string buffer_, head_;
};

inline std::string Message(const std::string& line, const std::string& body = "",
                           const std::string& headers = "") {
  return line + " HTTP/1.1\r\nHost: test\r\nContent-Length: " + std::to_string(body.size()) +
         "\r\n" + headers + "\r\n" + body;
}

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_TESTS_CC_HTTP_CLIENT_H_
