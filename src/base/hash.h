#pragma once
// SHA-256, used for provenance: which model, which data, which options an artefact was made from.

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace headfold {

/// Streaming SHA-256 (OpenSSL).
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;
  void update(std::span<const std::byte> bytes);
  void update(std::string_view text);
  /// 64 lower-case hexadecimal digits. The object must not be used afterwards.
  std::string hex();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// SHA-256 of a text, 64 hexadecimal digits.
std::string sha256_hex(std::string_view text);

}  // namespace headfold
