// Which of an op's compiled configurations to launch: tables of measured winners that Python hands over at import
// (triton_ops/tuned/<gpu>/<op>.json), looked up by device, key and nearest size. Never a search.
#pragma once

#include <cmath>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace fastops {

class TunedTable {
 public:
  static TunedTable& get() {
    static TunedTable table;
    return table;
  }

  // rows: "key size config;…". Replaces what this op had for this device.
  void set(const std::string& op, const std::string& gpu, const std::string& rows) {
    std::vector<Row> parsed;
    std::istringstream lines(rows);
    for (std::string line; std::getline(lines, line, ';');) {
      std::istringstream fields(line);
      Row row;
      int64_t size;
      if (fields >> row.key >> size >> row.config) {
        row.log_size = std::log(static_cast<double>(size < 1 ? 1 : size));
        parsed.push_back(row);
      }
    }
    const std::lock_guard lock(mutex_);
    rows_[op + '@' + gpu] = std::move(parsed);
  }

  // The configuration of the nearest entry with this key, or `fallback`.
  int find(const char* op, const std::string& gpu, int64_t key, int64_t size, int fallback) {
    const std::lock_guard lock(mutex_);
    const auto it = rows_.find(std::string(op) + '@' + gpu);
    if (it == rows_.end()) return fallback;
    const double log_size = std::log(static_cast<double>(size < 1 ? 1 : size));
    double best = HUGE_VAL;
    int config = fallback;
    for (const Row& row : it->second) {
      const double distance = std::abs(row.log_size - log_size);
      if (row.key == key && distance < best) {
        best = distance;
        config = row.config;
      }
    }
    return config;
  }

 private:
  struct Row {
    int64_t key;
    double log_size;
    int config;
  };
  std::mutex mutex_;
  std::map<std::string, std::vector<Row>> rows_;
};

// "NVIDIA H100 80GB HBM3" -> "h100": triton_ops/_tuned.py has the same rule, and a test holds them together.
inline std::string device_slug(const std::string& name) {
  std::vector<std::string> words(1);
  for (const char c : name) {
    if (c == ' ' || c == '-') {
      words.emplace_back();
    } else {
      words.back() += static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
    }
  }
  std::vector<std::string> kept;
  for (const auto& w : words) {
    if (!w.empty() && w != "nvidia" && w != "geforce" && w != "tesla" && w != "quadro" && w != "graphics")
      kept.push_back(w);
  }
  if (kept.empty()) return "unknown";
  const bool series = kept[0] == "rtx" || kept[0] == "gtx" || kept[0] == "titan";
  return series && kept.size() > 1 ? kept[0] + kept[1] : kept[0];
}

}  // namespace fastops
