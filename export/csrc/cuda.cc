// The launches of ai.tsa::TokenSparseAttention on ONNX Runtime's CUDA stream.
//
// The kernels are the project's own, compiled ahead of time (tsa_compile/export/aot.py); this file mirrors the host code in
// kernels/*/host.py, fused.py, strip.py and hopper.py. Counts stay on the device: nothing here waits for it.
#ifdef TSA_CUDA
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "attention.h"
#include "driver.h"
#include "workspace.h"

extern "C" const char tsa_kernels_bin[];  // kernels.bin

namespace tsa {
namespace {

using cuda::Pointer;

template <class T>
struct Arg {  // no default: a forgotten argument does not compile, nor a number in a pointer's place
  T value;
  Arg(T v) : value(v) {}
};
template <>
struct Arg<Pointer> {
  Pointer value;
  Arg(Pointer p) : value(p) {}
  Arg(const void* p) : value(cuda::pointer(p)) {}
};


enum class Kernel;
struct Image {
  Kernel kernel;
  ort::Element type;
  int64_t dim, v_dim, rows;
  bool masked, strip;
  int capability;  // 86 for 8.6; 0: PTX
  const char* entry;
  size_t start;
  unsigned shared, threads;
  int64_t block_m, block_n;
};

#include "kernels.h"

asm(".section .rodata\n.balign 64\n.globl tsa_kernels_bin\n.hidden tsa_kernels_bin\n"
    "tsa_kernels_bin:\n.incbin \"kernels.bin\"\n.previous\n");

constexpr float kLog2E = 1.4426950408889634f;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Gpu {
  cuda::Device device;
  int capability, multiprocessors;
};

Gpu current_gpu() {
  const auto& d = cuda::driver();
  Gpu gpu{};
  int major = 0, minor = 0;
  cuda::check(d.ctx_get_device(&gpu.device), "current device");
  cuda::check(d.device_get_attribute(&major, cuda::kMajor, gpu.device), "compute capability");
  cuda::check(d.device_get_attribute(&minor, cuda::kMinor, gpu.device), "compute capability");
  cuda::check(d.device_get_attribute(&gpu.multiprocessors, cuda::kMultiprocessors, gpu.device), "multiprocessors");
  gpu.capability = 10 * major + minor;
  return gpu;
}

// One call: its sizes, stream and scratch memory.
class Call {
 public:
  Call(const Attributes& a, const Problem& p, ort::KernelContext* context, cuda::Stream stream)
      : a(a), p(p), gpu(current_gpu()), stream(stream), memory(context, kMemory, gpu.device) {}

  template <class Arguments>
  void launch(const Image& image, int64_t x, int64_t y, int64_t z, Arguments arguments) {
    if (y > 65535 || z > 65535 || x > INT32_MAX) throw std::runtime_error("batch, heads or length too large for a grid");
    void* parameters[64];
    Pointer scratch[2] = {};  // Triton's two hidden parameters: global and profile scratch, not used
    const int count = pack(arguments, parameters);
    parameters[count] = &scratch[0], parameters[count + 1] = &scratch[1];
    const unsigned grid_y = static_cast<unsigned>(y), grid_z = static_cast<unsigned>(z);
    cuda::check(cuda::driver().launch(function(image), static_cast<unsigned>(x), grid_y, grid_z, image.threads, 1, 1,
                                      image.shared, stream, parameters, nullptr),
                image.entry);
  }

  // The kernel for this call; null if the library has none and `required` is false.
  const Image* find(Kernel kernel, bool required = true) const {
    const int64_t rows = score_rows();
    const Image* best = nullptr;
    for (const Image& i : kImages) {
      const bool same_major = i.capability / 10 == gpu.capability / 10 && i.capability <= gpu.capability;
      const bool runs = i.capability == 0 ? gpu.capability >= 80 : same_major;
      if (i.kernel != kernel || i.type != p.type || i.dim != p.dim || i.v_dim != p.v_dim || i.rows != rows || !runs ||
          i.masked != (p.key_mask != nullptr) || i.strip != has_strip())
        continue;
      if (!best || i.capability > best->capability) best = &i;
    }
    if (best || !required) return best;
    const char* types[] = {"float32", "float16", "bfloat16"};
    const char* type = types[p.type == ort::kFloat ? 0 : p.type == ort::kFloat16 ? 1 : 2];
    throw std::runtime_error(
        std::string("libtsa_ort.so was built without kernels for ") + type + ", head dims " + std::to_string(p.dim) +
        " and " + std::to_string(p.v_dim) + ", window " + std::to_string(a.window) + (p.key_mask ? ", key_mask" : "") +
        (has_strip() ? ", completion" : "") + " on compute capability " + std::to_string(gpu.capability / 10) + "." +
        std::to_string(gpu.capability % 10) + "; build it for this model: tsa-compile export --native --cuda MODEL.onnx");
  }

  bool has_strip() const { return a.strip_window > 0 || a.strip_sinks > 0 || a.heavy > 0; }
  float scale_log2() const { return a.scale * kLog2E; }
  template <class T>
  Pointer take(int64_t count) {
    return cuda::pointer(memory.take<T>(static_cast<size_t>(count)));
  }

  const Attributes& a;
  const Problem& p;
  const Gpu gpu;
  const cuda::Stream stream;
  ort::Workspace memory;

 private:
  // Scoring queries that one program takes: the power of two that holds the window, as the build chose it.
  int64_t score_rows() const {
    int64_t rows = 16;
    const int64_t most = p.type == ort::kFloat || std::max(p.dim, int64_t{16}) > 128 ? 64 : 128;
    while (rows < a.window && rows < most) rows *= 2;
    return rows;
  }

  cuda::Function function(const Image& image) const {
    static std::mutex guard;
    static std::map<std::pair<const Image*, cuda::Device>, cuda::Function> loaded;
    std::lock_guard<std::mutex> lock(guard);
    cuda::Function& f = loaded[{&image, gpu.device}];
    if (f) return f;
    const auto& d = cuda::driver();
    cuda::Module module = nullptr;
    cuda::check(d.module_load_data(&module, tsa_kernels_bin + image.start), image.entry);
    cuda::check(d.module_get_function(&f, module, image.entry), image.entry);
    if (image.shared > 48 * 1024)
      cuda::check(d.func_set_attribute(f, cuda::kMaxDynamicSharedBytes, static_cast<int>(image.shared)), image.entry);
    return f;
  }

#ifdef TSA_DEVICE_ON_HOST
  static constexpr const char* kMemory = "Cpu";
#else
  static constexpr const char* kMemory = "Cuda";
#endif
};

struct Order {
  Pointer order{}, ranks{};  // int32 [B, Lk]; only with a key mask
};

struct Selection {
  Pointer indices, counts, heavy;  // int32 [B, H, Lk], [B], [B, H, heavy]
};

Order rank_order(Call& c) {
  const Problem& p = c.p;
  if (!p.key_mask) return {};
  Order o{c.take<int32_t>(p.batch * p.k_len), c.take<int32_t>(p.batch * p.k_len)};
  c.launch(*c.find(Kernel::rank), p.batch, 1, 1, rank_args{p.key_mask, o.ranks, p.k_len});
  const Image& order = *c.find(Kernel::order);
  c.launch(order, ceil_div(p.k_len, order.block_m), p.batch, 1, order_args{o.ranks, o.order, p.k_len});
  return o;
}

Pointer window_scores(Call& c, const Order& o) {
  const Problem& p = c.p;
  const Image &lse = *c.find(Kernel::score_lse), &mean_image = *c.find(Kernel::score_mean);
  constexpr int64_t kPrograms = 528, kMinSpan = 512;
  int64_t splits =
      std::max<int64_t>(1, std::min(ceil_div(kPrograms, p.batch * p.heads), ceil_div(p.k_len, kMinSpan)));
  const int64_t span = ceil_div(ceil_div(p.k_len, splits), lse.block_n) * lse.block_n;
  splits = std::max<int64_t>(1, ceil_div(p.k_len, span));
  const int64_t parts = p.batch * p.heads * splits * c.a.window;
  const Pointer top = c.take<float>(parts), sum = c.take<float>(parts), mean = c.take<float>(p.batch * p.heads * p.k_len);
  const int64_t q_sh = p.q_len * p.dim, k_sh = p.k_len * p.dim;
  c.launch(lse, p.batch * p.heads, splits, ceil_div(c.a.window, lse.block_m),
           score_lse_args{p.q, p.k, top, sum, o.order, o.ranks, p.heads * q_sh, q_sh, p.kv_heads * k_sh, k_sh, p.heads,
                          p.kv_heads, p.q_len, p.k_len, c.a.window, splits, span, c.scale_log2()});
  c.launch(mean_image, p.batch * p.heads, splits, 1,
           score_mean_args{p.q, p.k, top, sum, mean, o.order, o.ranks, p.heads * q_sh, q_sh, p.kv_heads * k_sh, k_sh,
                           p.heads, p.kv_heads, p.q_len, p.k_len, c.a.window, splits, span, c.scale_log2()});
  return mean;
}

void count_kept(Call& c, const Order& o, Pointer mean, Pointer scores, Pointer counts) {
  const Problem& p = c.p;
  constexpr int64_t kHistogram = 3 * 2 * 2048;
  const Pointer masses = c.take<int64_t>(p.batch * p.k_len), histograms = c.take<int64_t>(p.batch * kHistogram);
  cuda::check(cuda::driver().memset_d8(histograms, 0, p.batch * kHistogram * sizeof(int64_t), c.stream), "histograms");
  const Image& pool = *c.find(Kernel::pool);
  c.launch(pool, ceil_div(p.k_len, pool.block_m), p.batch, 1,
           pool_args{mean, scores, masses, histograms, o.ranks, p.heads, p.q_len, p.k_len, c.a.window, c.a.pool});
  int64_t coverage_bits;
  std::memcpy(&coverage_bits, &c.a.coverage, sizeof coverage_bits);
  const Image &level1 = *c.find(Kernel::mass_level1), &level2 = *c.find(Kernel::mass_level2);
  c.launch(level1, ceil_div(p.k_len, level1.block_m), p.batch, 1,
           mass_level1_args{masses, histograms, o.ranks, p.q_len, p.k_len, c.a.window, c.a.min_tokens, coverage_bits});
  c.launch(level2, ceil_div(p.k_len, level2.block_m), p.batch, 1,
           mass_level2_args{masses, histograms, o.ranks, p.q_len, p.k_len, c.a.window, c.a.min_tokens, coverage_bits});
  c.launch(*c.find(Kernel::count), p.batch, 1, 1,
           count_args{masses, histograms, counts, o.ranks, p.q_len, p.k_len, c.a.window, c.a.min_tokens, coverage_bits});
}

// Every real token of every row; known on the host, so nothing is scored.
void count_all(Call& c, const Order& o, Pointer counts) {
  const Problem& p = c.p;
  if (p.key_mask) {
    cuda::gather_int32(o.ranks, 4 * (p.k_len - 1), 4 * p.k_len, counts, p.batch, c.stream);
  } else {
    cuda::check(cuda::driver().memset_d32(counts, static_cast<unsigned>(p.k_len), p.batch, c.stream), "counts");
  }
}

Selection select_tokens(Call& c, const Order& o) {
  const Problem& p = c.p;
  const Selection s{c.take<int32_t>(p.batch * p.heads * p.k_len), c.take<int32_t>(p.batch),
                    c.take<int32_t>(p.batch * p.heads * c.a.heavy)};
  Pointer scores = s.indices;  // not read where everything is kept
  if (p.k_len <= c.a.min_tokens + c.a.window || c.a.coverage == 0) {
    count_all(c, o, s.counts);
  } else {
    const Pointer mean = window_scores(c, o);
    scores = c.take<float>(p.batch * p.heads * p.k_len);
    count_kept(c, o, mean, scores, s.counts);
  }
  c.launch(*c.find(Kernel::select), p.batch * p.heads, c.a.heavy > 0 ? 2 : 1, 1,
           select_args{scores, s.counts, s.indices, s.heavy, o.order, o.ranks, p.heads, p.q_len, p.k_len, c.a.window,
                       c.a.min_tokens, c.a.heavy});
  return s;
}

// Query heads that advance together (kernels/sparse_prefill/configs.py, section_heads).
int64_t section_heads(const Problem& p) {
  const int64_t bytes = (p.dim + p.v_dim) * (p.type == ort::kFloat ? 4 : 2);
  const int64_t fit = std::max<int64_t>(1, (int64_t{32} << 20) / std::max<int64_t>(1, p.k_len * bytes));
  int64_t best = 1;
  for (int64_t n = 1; n <= p.kv_heads && n <= fit; ++n)
    if (p.kv_heads % n == 0) best = n;
  return best * (p.heads / p.kv_heads);
}

void prefill(Call& c, const Selection& s, Pointer lse) {
  const Problem& p = c.p;
  const Image* hopper = c.find(Kernel::prefill_hopper, false);
  const Image& image = hopper ? *hopper : *c.find(Kernel::prefill);
  const int64_t tiles = std::min(ceil_div(p.k_len, image.block_m), ceil_div(p.q_len, image.block_m) + 1);
  const int64_t total = p.batch * p.heads * tiles, section = section_heads(p);
  const int64_t q_sh = p.q_len * p.dim, k_sh = p.k_len * p.dim, v_sh = p.k_len * p.v_dim, o_sh = p.q_len * p.v_dim;
  const Pointer lse_or_out = c.has_strip() ? lse : cuda::pointer(p.out);
  if (hopper) {
    const int64_t programs = std::min<int64_t>(total, c.gpu.multiprocessors);
    c.launch(image, programs, 1, 1,
             prefill_hopper_args{p.q, p.k, p.v, p.out, lse_or_out, s.indices, s.counts, p.heads * q_sh, q_sh,
                                 p.kv_heads * k_sh, k_sh, p.kv_heads * v_sh, v_sh, p.heads * o_sh, o_sh,
                                 p.heads * p.k_len, p.k_len, p.heads, p.kv_heads, p.heads, p.q_len, p.k_len, total, tiles,
                                 section, c.scale_log2()});
    return;
  }
  c.launch(image, total, 1, 1,
           prefill_args{p.q, p.k, p.v, p.out, lse_or_out, s.indices, s.counts, p.heads * q_sh, q_sh, p.kv_heads * k_sh,
                        k_sh, p.kv_heads * v_sh, v_sh, p.heads * o_sh, o_sh, p.heads * p.k_len, p.k_len, p.heads,
                        p.kv_heads, p.heads, p.q_len, p.k_len, tiles, section, c.scale_log2()});
}

void add_strip(Call& c, const Selection& s, const Order& o, Pointer lse) {
  const Problem& p = c.p;
  const int64_t entries = p.batch * p.heads * p.k_len, list = p.heads * p.k_len;
  const Pointer slots = c.take<int32_t>(entries);
  cuda::check(cuda::driver().memset_d32(slots, 0xffffffffu, entries, c.stream), "slots");
  const Image& invert = *c.find(Kernel::invert);
  c.launch(invert, ceil_div(p.k_len, invert.block_m), p.batch * p.heads, 1,
           invert_args{s.indices, s.counts, slots, list, p.k_len, list, p.k_len, p.heads});
  const Image& strip = *c.find(Kernel::strip);
  const int64_t q_sh = p.q_len * p.dim, k_sh = p.k_len * p.dim, v_sh = p.k_len * p.v_dim, o_sh = p.q_len * p.v_dim;
  const Pointer order = p.key_mask ? o.order : slots, ranks = p.key_mask ? o.ranks : slots;
  c.launch(strip, ceil_div(p.q_len, strip.block_m), p.batch * p.heads, 1,
           strip_args{p.q, p.k, p.v, p.out, p.out, lse, slots, s.heavy, order, ranks, p.heads * q_sh, q_sh,
                      p.kv_heads * k_sh, k_sh, p.kv_heads * v_sh, v_sh, p.heads * o_sh, o_sh, p.heads * o_sh, o_sh,
                      p.heads * p.q_len, p.q_len, list, p.k_len, p.heads * c.a.heavy, c.a.heavy, p.heads, p.kv_heads,
                      p.heads, p.q_len, p.k_len, c.a.heavy, c.a.strip_window, c.a.strip_sinks, c.scale_log2()});
}

bool aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; }

}  // namespace

ort::Status* check_cuda() {
  try {
    cuda::driver();
    return nullptr;
  } catch (const std::exception& e) {
    return ort::error(ort::kNotImplemented, e.what());
  }
}

ort::Status* run_cuda(const Attributes& a, const Problem& p, ort::KernelContext* context) {
  if (!aligned(p.q) || !aligned(p.k) || !aligned(p.v) || !aligned(p.out))
    throw std::runtime_error("operands must lie at multiples of 16 bytes");
  if (a.scale <= 0) throw std::runtime_error("the CUDA kernels take a positive scale, not " + std::to_string(a.scale));
  void* stream = nullptr;
#ifndef TSA_DEVICE_ON_HOST
  using GetStream = ort::Status*(const ort::KernelContext*, void**);
  ORT_RETURN_IF_ERROR(ort::call<GetStream>(ort::kKernelContextGetGPUComputeStream)(context, &stream));
#endif
  Call c(a, p, context, stream);
  const Order order = rank_order(c);
  const Selection selection = select_tokens(c, order);
  const Pointer lse = c.has_strip() ? c.take<float>(p.batch * p.heads * p.q_len) : Pointer{};
  prefill(c, selection, lse);
  if (c.has_strip()) add_strip(c, selection, order, lse);
  return nullptr;
}

}  // namespace tsa
#endif
