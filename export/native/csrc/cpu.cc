// docs/operators.md on the CPU, in float32 and without tricks: one task for each head, rows one by one.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#include "attention.h"
#include "workspace.h"

namespace tsa {
namespace {

using ort::call;
using ort::Status;

float from_half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  float value;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -value : value;
  }
  const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (mantissa << 13);
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t to_half(float value) {  // rounds to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;
  if (bits < 0x38800000u) {  // subnormal
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

float from_bfloat(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fc0u;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Rows `index` of x [rows, width] as float32.
std::vector<float> load(const void* x, int64_t first_row, const std::vector<int64_t>& index, int64_t width, ort::Element type) {
  std::vector<float> out(index.size() * width);
  for (size_t i = 0; i < index.size(); ++i) {
    const int64_t from = (first_row + index[i]) * width;
    float* to = &out[i * width];
    if (type == ort::kFloat) {
      std::memcpy(to, static_cast<const float*>(x) + from, width * sizeof(float));
      continue;
    }
    const uint16_t* bits = static_cast<const uint16_t*>(x) + from;
    for (int64_t j = 0; j < width; ++j) to[j] = type == ort::kFloat16 ? from_half(bits[j]) : from_bfloat(bits[j]);
  }
  return out;
}

void store(void* out, int64_t row, const float* values, int64_t width, ort::Element type) {
  if (type == ort::kFloat) {
    std::memcpy(static_cast<float*>(out) + row * width, values, width * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out) + row * width;
  for (int64_t j = 0; j < width; ++j) to[j] = type == ort::kFloat16 ? to_half(values[j]) : to_bfloat(values[j]);
}

float dot(const float* x, const float* y, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// One batch row without its padding; positions below are ranks.
struct Row {
  std::vector<int64_t> keys, queries;  // positions of the real tokens in k, and of the real queries in q
  int64_t length() const { return static_cast<int64_t>(keys.size()); }
  int64_t first_query() const { return length() - static_cast<int64_t>(queries.size()); }
};

struct Head {
  std::vector<float> q, k, v;
  float* score;  // [tokens before the window]
  std::vector<int64_t> kept;     // ascending
  std::vector<uint8_t> is_kept;  // [length]
  std::vector<int64_t> heavy;    // ascending
};

Row real_tokens(const Problem& p, int64_t b) {
  Row row;
  const int64_t offset = p.k_len - p.q_len;
  for (int64_t i = 0; i < p.k_len; ++i) {
    if (p.key_mask && !p.key_mask[b * p.k_len + i]) continue;
    row.keys.push_back(i);
    if (i >= offset) row.queries.push_back(i - offset);
  }
  return row;
}

// Steps 2 and 3: mean attention of the last queries, average-pooled, for the tokens before the window. A score that is not
// finite (NaN or infinity in q or k) is 0, so casts and comparisons below are defined.
void scores(const Attributes& a, const Row& row, const Head& head, int64_t dim) {
  const int64_t length = row.length(), queries = std::min<int64_t>(a.window, row.queries.size());
  const int64_t before = length - a.window;
  std::vector<float> mean(length, 0.f), weight(length);
  for (int64_t i = length - queries; i < length; ++i) {
    const float* q = &head.q[(i - row.first_query()) * dim];
    float top = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t j = 0; j <= i; ++j) top = std::max(top, weight[j] = a.scale * dot(q, &head.k[j * dim], dim));
    for (int64_t j = 0; j <= i; ++j) sum += weight[j] = std::exp(weight[j] - top);
    for (int64_t j = 0; j <= i; ++j) mean[j] += weight[j] / sum;
  }
  for (int64_t j = 0; j < before; ++j) {
    float sum = 0;
    for (int64_t n = j - a.pool / 2; n <= j + a.pool / 2; ++n)
      if (n >= 0 && n < before) sum += mean[n] / queries;
    head.score[j] = std::isfinite(sum) ? sum / a.pool : 0.f;
  }
}

// Steps 4 and 5: kept tokens before the window, for all heads of the row.
int64_t count_kept(const Attributes& a, const std::vector<Head>& heads, int64_t before) {
  std::vector<int64_t> units(before, 0);
  for (const Head& head : heads)
    for (int64_t j = 0; j < before; ++j) units[j] += static_cast<int64_t>(head.score[j] * 4503599627370496.f);
  const int64_t total = std::accumulate(units.begin(), units.end(), int64_t{0});
  const int64_t target = static_cast<int64_t>(std::ceil(static_cast<double>(total) * a.coverage));
  std::sort(units.begin(), units.end());
  int64_t dropped = 0, sum = 0;
  for (int64_t u : units) dropped += (sum += u) < target;
  return dropped == 0 ? before : std::max(a.min_tokens, before - dropped - 1);
}

// Indices of the `count` largest values, lowest index first among equals; ascending.
std::vector<int64_t> largest(const float* value, int64_t size, int64_t count) {
  std::vector<int64_t> index(size);
  std::iota(index.begin(), index.end(), 0);
  count = std::min(count, size);
  auto before = [&](int64_t x, int64_t y) { return value[x] != value[y] ? value[x] > value[y] : x < y; };
  std::nth_element(index.begin(), index.begin() + count, index.end(), before);
  index.resize(count);
  std::sort(index.begin(), index.end());
  return index;
}

// The keys that the query at rank i reads, each once.
void keys_of(const Attributes& a, const Head& head, int64_t i, std::vector<int64_t>* keys) {
  keys->clear();
  const bool selected = head.is_kept[i];
  if (selected)
    for (int64_t j : head.kept) {
      if (j > i) break;
      keys->push_back(j);
    }
  const int64_t local = std::max<int64_t>(i - a.strip_window + 1, 0), sinks = std::min(a.strip_sinks, local);
  auto add = [&](int64_t j) {
    if (!(selected && head.is_kept[j])) keys->push_back(j);
  };
  for (int64_t j = 0; j < sinks; ++j) add(j);
  for (int64_t j : head.heavy)
    if (j >= sinks && j < local && j <= i) add(j);
  for (int64_t j = local; j <= i; ++j) add(j);
}

void attend(const Attributes& a, const Problem& p, const Row& row, const Head& head, int64_t out_row) {
  std::vector<int64_t> keys;
  std::vector<float> weight(row.length()), out(p.v_dim);
  for (int64_t i = row.first_query(); i < row.length(); ++i) {
    keys_of(a, head, i, &keys);
    const int64_t query = i - row.first_query();
    float top = -std::numeric_limits<float>::infinity(), sum = 0;
    for (size_t n = 0; n < keys.size(); ++n)
      top = std::max(top, weight[n] = a.scale * dot(&head.q[query * p.dim], &head.k[keys[n] * p.dim], p.dim));
    std::fill(out.begin(), out.end(), 0.f);
    for (size_t n = 0; n < keys.size(); ++n) {
      const float w = std::exp(weight[n] - top);
      sum += w;
      const float* v = &head.v[keys[n] * p.v_dim];
      for (int64_t d = 0; d < p.v_dim; ++d) out[d] += w * v[d];
    }
    for (float& x : out) x = keys.empty() ? 0.f : x / sum;
    store(p.out, out_row + row.queries[query], out.data(), p.v_dim, p.type);
  }
}

// body(0) .. body(count - 1) on the session's threads; an exception becomes an error.
template <class Body>
Status* parallel(ort::KernelContext* context, size_t count, Body& body) {
  struct Job {
    Body* body;
    std::atomic<bool> failed;
  } job{&body, false};
  auto task = [](void* data, size_t i) {
    Job& job = *static_cast<Job*>(data);
    try {
      (*job.body)(i);
    } catch (const std::exception&) {
      job.failed = true;
    }
  };
  using ParallelFor = Status*(const ort::KernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
  ORT_RETURN_IF_ERROR(call<ParallelFor>(ort::kKernelContextParallelFor)(context, task, count, 0, &job));
  if (job.failed) throw std::bad_alloc();
  return nullptr;
}

}  // namespace

Status* run_cpu(const Attributes& a, const Problem& p, ort::KernelContext* context) {
  const size_t bytes = p.type == ort::kFloat ? 4 : 2;
  std::memset(p.out, 0, p.batch * p.heads * p.q_len * p.v_dim * bytes);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Row row = real_tokens(p, b);
    if (row.queries.empty()) continue;
    const int64_t length = row.length(), before = std::max<int64_t>(length - a.window, 0);
    const bool select = length > a.min_tokens + a.window && a.coverage > 0;
    std::vector<Head> heads(p.heads);
    ort::Workspace workspace(context, "Cpu", 0);
    float* all_scores = workspace.take<float>(p.heads * before);
    std::fill_n(all_scores, p.heads * before, 0.f);
    auto score = [&](size_t h) {
      const int64_t kv = b * p.kv_heads + h / (p.heads / p.kv_heads);
      heads[h].q = load(p.q, (b * p.heads + h) * p.q_len, row.queries, p.dim, p.type);
      heads[h].k = load(p.k, kv * p.k_len, row.keys, p.dim, p.type);
      heads[h].v = load(p.v, kv * p.k_len, row.keys, p.v_dim, p.type);
      heads[h].score = all_scores + h * before;
      if (select) scores(a, row, heads[h], p.dim);
    };
    ORT_RETURN_IF_ERROR(parallel(context, p.heads, score));
    const int64_t keep = select ? count_kept(a, heads, before) : before;
    auto finish = [&](size_t h) {
      Head& head = heads[h];
      head.kept = largest(head.score, before, keep);
      if (select && keep < before) head.heavy = largest(head.score, before, a.heavy);
      for (int64_t j = before; j < length; ++j) head.kept.push_back(j);
      head.is_kept.assign(length, 0);
      for (int64_t j : head.kept) head.is_kept[j] = 1;
      attend(a, p, row, head, (b * p.heads + h) * p.q_len);
    };
    ORT_RETURN_IF_ERROR(parallel(context, p.heads, finish));
  }
  return nullptr;
}

}  // namespace tsa
