#include "cc/server/security.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "cc/session/error.h"

namespace continual_transformers::server {
namespace {

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file) {
    throw Error(ErrorCode::kIo, "cannot read " + path + ": " + std::strerror(errno));
  }
  return text;
}

}  // namespace

Security Security::Read(const std::string& certificate_file, const std::string& key_file,
                        const std::string& client_ca_file, const std::string& token_file) {
  if (certificate_file.empty() != key_file.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "TLS needs both --tls-certificate and --tls-key, got only one");
  }
  if (!client_ca_file.empty() && certificate_file.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "--tls-client-ca needs --tls-certificate and --tls-key too");
  }
  Security security;
  if (!certificate_file.empty()) {
    security.certificate = ReadFile(certificate_file);
    security.key = ReadFile(key_file);
  }
  if (!client_ca_file.empty()) security.client_ca = ReadFile(client_ca_file);
  if (!token_file.empty()) {
    security.token = ReadFile(token_file);
    while (!security.token.empty() && std::strchr(" \t\r\n", security.token.back()) != nullptr) {
      security.token.pop_back();
    }
    if (security.token.empty()) {
      throw Error(ErrorCode::kInvalidArgument, "the token file " + token_file + " is empty");
    }
  }
  return security;
}

bool Security::Allows(std::string_view authorization) const {
  if (token.empty()) return true;
  constexpr std::string_view kScheme = "Bearer ";
  if (authorization.substr(0, kScheme.size()) != kScheme) return false;
  const std::string_view got = authorization.substr(kScheme.size());
  if (got.size() != token.size()) return false;
  unsigned char difference = 0;
  for (size_t i = 0; i < got.size(); ++i)
    difference |= static_cast<unsigned char>(got[i] ^ token[i]);
  return difference == 0;
}

}  // namespace continual_transformers::server
