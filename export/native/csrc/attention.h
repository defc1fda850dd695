// One call of ai.tsa::TokenSparseAttention: attributes, sizes and operands, the same for every execution provider.
#pragma once

#include <cstdint>
#include <string>

#include "ort_abi.h"

namespace tsa {

struct Attributes {
  std::string node;  // its name, for messages
  double coverage = 0;
  float scale = 0;
  int64_t window = 0, pool = 0, min_tokens = 0, strip_window = 0, strip_sinks = 0, heavy = 0;
};

// Contiguous tensors: q [batch, heads, q_len, dim], k [batch, kv_heads, k_len, dim], v [batch, kv_heads, k_len, v_dim],
// key_mask [batch, k_len] bytes or null, out [batch, heads, q_len, v_dim].
struct Problem {
  int64_t batch, heads, kv_heads, q_len, k_len, dim, v_dim;
  const void *q, *k, *v;
  const uint8_t* key_mask;
  void* out;
  ort::Element type;
};

ort::Status* run_cpu(const Attributes&, const Problem&, ort::KernelContext*);
ort::Status* run_cuda(const Attributes&, const Problem&, ort::KernelContext*);
ort::Status* check_cuda();  // an error that says why run_cuda cannot work here, or null

}  // namespace tsa
