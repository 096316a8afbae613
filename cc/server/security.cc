#include "cc/server/security.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "cc/session/error.h"

namespace continual_transformers::server {
namespace {

std::string ReadFile(const std::string& path) {
  std::error_code none;
  if (std::filesystem::is_directory(path, none)) {
    throw Error(ErrorCode::kIo, "cannot read " + path + ": it is a folder");
  }
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file) {
    throw Error(ErrorCode::kIo, "cannot read " + path + ": " + std::strerror(errno));
  }
  // Without what it protects with, the server would be open.
  if (text.find_first_not_of(" \t\r\n") == std::string::npos) {
    throw Error(ErrorCode::kInvalidArgument, "the file " + path + " is empty");
  }
  return text;
}

// Without the end of its line. Empty if no file is named.
std::string ReadToken(const std::string& path) {
  if (path.empty()) return "";
  std::string token = ReadFile(path);
  while (std::strchr(" \t\r\n", token.back()) != nullptr) token.pop_back();
  return token;
}

bool IsBearer(std::string_view authorization, const std::string& token) {
  constexpr std::string_view kScheme = "Bearer ";
  if (authorization.substr(0, kScheme.size()) != kScheme) return false;
  const std::string_view got = authorization.substr(kScheme.size());
  if (token.empty() || got.size() != token.size()) return false;
  unsigned char difference = 0;
  for (size_t i = 0; i < got.size(); ++i)
    difference |= static_cast<unsigned char>(got[i] ^ token[i]);
  return difference == 0;
}

}  // namespace

Security Security::Read(const std::string& certificate_file, const std::string& key_file,
                        const std::string& client_ca_file, const std::string& token_file,
                        const std::string& operator_token_file) {
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
  security.token = ReadToken(token_file);
  security.operator_token = ReadToken(operator_token_file);
  return security;
}

bool Security::Allows(std::string_view authorization) const {
  return token.empty() || IsBearer(authorization, token) || IsBearer(authorization, operator_token);
}

bool Security::AllowsOperator(std::string_view authorization) const {
  return IsBearer(authorization, operator_token.empty() ? token : operator_token);
}

}  // namespace continual_transformers::server
