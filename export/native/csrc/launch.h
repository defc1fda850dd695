// Launches of the kernels that tsa_compile/export/aot.py compiled, on ONNX Runtime's stream.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "driver.h"
#include "workspace.h"

namespace tsa {

using cuda::Pointer;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Everything that kernels take at run time. aot.py binds a kernel's parameters to members, by name, and writes the
// bindings to kernels.h: a parameter without a member does not compile, nor a number in a pointer's place.
struct Values {
  Pointer q{}, k{}, v{}, key_mask{}, out{};
  Pointer order{}, ranks{};                            // int32 [B, Lk]; only with a key mask
  Pointer part_max{}, part_sum{}, mean{}, scores{};    // float32
  Pointer masses{}, candidates{}, mass_bins{};         // int64
  Pointer bins{}, cuts{}, gathered{};                  // int32, int32, float32
  Pointer counts{}, indices{}, heavy_indices{};        // int32 [B], [B, H, Lk], [B, H, heavy]
  Pointer slots{}, lse{}, lse_or_out{};
  Pointer queue{};                                     // int32 [1]
  Pointer strip_order{}, strip_ranks{};
  int64_t heads, kv_heads, lists, q_len, k_len, last_queries, pool, min_tokens, heavy, strip_window, strip_sinks;
  int64_t coverage_bits, splits = 0, span = 0, tiles = 0, total = 0, section = 0, queued = 0;
  int64_t q_sb, q_sh, q_sl, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, o_sb, o_sh, o_sl, i_sb, i_sg, l_sb, l_sh, h_sb, h_sg;
  float scale_log2;

  Values(const Attributes&, const Problem&);
};

// One parameter of a kernel: its type there, and where its value is.
struct Parameter {
  enum Type { kPointer, kInt32, kInt64, kFloat32 } type;
  Pointer Values::*pointer;
  int64_t Values::*number;
  float Values::*real;
};
constexpr Parameter pointer(Pointer Values::*m) { return {Parameter::kPointer, m, nullptr, nullptr}; }
constexpr Parameter i32(int64_t Values::*m) { return {Parameter::kInt32, nullptr, m, nullptr}; }
constexpr Parameter i64(int64_t Values::*m) { return {Parameter::kInt64, nullptr, m, nullptr}; }
constexpr Parameter fp32(float Values::*m) { return {Parameter::kFloat32, nullptr, nullptr, m}; }

// A compiled kernel for one form of site.
enum class Kernel;
struct Image {
  Kernel kernel;
  ort::Element type;
  int64_t dim, v_dim, last_queries;
  bool masked, strip;
  int64_t group;
  int capability;  // 86 for 8.6; 0: PTX
  const char* entry;
  size_t start;  // in kernels.bin
  unsigned shared, threads;
  int64_t block_m, block_n;
};

struct Gpu {
  cuda::Device device;
  int capability, multiprocessors;
};

// One call of the operator: its sizes, stream and scratch memory.
class Call {
 public:
  Call(const Attributes& a, const Problem& p, ort::KernelContext* context, cuda::Stream stream);

  void launch(Kernel kernel, int64_t x, int64_t y = 1, int64_t z = 1);
  // The image for this call; throws if the library has none.
  const Image& image(Kernel kernel) const;
  bool has(Kernel kernel) const { return find(kernel) != nullptr; }

  template <class T>
  Pointer take(int64_t count) {
    return cuda::pointer(memory_.take<T>(static_cast<size_t>(count)));
  }
  void fill8(Pointer to, unsigned char value, int64_t bytes);
  void fill32(Pointer to, unsigned value, int64_t count);

  const Attributes& a;
  const Problem& p;
  const Gpu gpu;
  const cuda::Stream stream;
  Values values;

 private:
  const Image* find(Kernel kernel) const;
  cuda::Function function(const Image& image) const;

  ort::Workspace memory_;
};

inline bool has_strip(const Attributes& a) { return a.strip_window > 0 || a.strip_sinks > 0 || a.heavy > 0; }

}  // namespace tsa
