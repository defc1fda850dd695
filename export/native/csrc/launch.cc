#ifdef TSA_CUDA
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <utility>

#include "kernel_names.h"
#include "launch.h"

extern "C" const char tsa_kernels_bin[];  // kernels.bin

namespace tsa {
namespace {

#include "kernels.h"  // kImages, parameters_of

asm(".section .rodata\n.balign 64\n.globl tsa_kernels_bin\n.hidden tsa_kernels_bin\n"
    "tsa_kernels_bin:\n.incbin \"kernels.bin\"\n.previous\n");

constexpr float kLog2E = 1.4426950408889634f;

#ifdef TSA_DEVICE_ON_HOST
constexpr const char* kMemory = "Cpu";
#else
constexpr const char* kMemory = "Cuda";
#endif

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

// Storage for a kernel's arguments, as cuLaunchKernel wants them.
class Arguments {
 public:
  Arguments(Kernel kernel, const Values& v) {
    const auto [first, count] = parameters_of(kernel);
    if (count + 2 > kMost) throw std::logic_error("a kernel has too many parameters");
    for (size_t i = 0; i < count; ++i) {
      store(first[i], v, &words_[i]);
      pointers_[i] = &words_[i];
    }
    for (size_t i = count; i < count + 2; ++i) pointers_[i] = &words_[i];  // Triton's hidden scratch pointers: null
  }
  void** get() { return pointers_; }

 private:
  static void store(const Parameter& p, const Values& v, uint64_t* word) {
    switch (p.type) {
      case Parameter::kPointer: std::memcpy(word, &(v.*p.pointer), 8); break;
      case Parameter::kInt64: std::memcpy(word, &(v.*p.number), 8); break;
      case Parameter::kFloat32: std::memcpy(word, &(v.*p.real), 4); break;
      case Parameter::kInt32: {
        const int64_t wide = v.*p.number;
        const int32_t number = static_cast<int32_t>(wide);
        if (number != wide) throw std::runtime_error("a size exceeds 2^31: " + std::to_string(wide));
        std::memcpy(word, &number, 4);
      }
    }
  }

  static constexpr size_t kMost = 64;
  uint64_t words_[kMost] = {};
  void* pointers_[kMost];
};

}  // namespace

Values::Values(const Attributes& a, const Problem& p)
    : q(cuda::pointer(p.q)), k(cuda::pointer(p.k)), v(cuda::pointer(p.v)), key_mask(cuda::pointer(p.key_mask)),
      out(cuda::pointer(p.out)), heads(p.heads), kv_heads(p.kv_heads), lists(p.heads), q_len(p.q_len), k_len(p.k_len),
      last_queries(a.window), pool(a.pool), min_tokens(a.min_tokens), heavy(a.heavy), strip_window(a.strip_window),
      strip_sinks(a.strip_sinks), q_sb(p.heads * p.q_len * p.dim), q_sh(p.q_len * p.dim),
      q_sl(p.dim), k_sb(p.kv_heads * p.k_len * p.dim), k_sh(p.k_len * p.dim), k_sl(p.dim),
      v_sb(p.kv_heads * p.k_len * p.v_dim), v_sh(p.k_len * p.v_dim), v_sl(p.v_dim), o_sb(p.heads * p.q_len * p.v_dim),
      o_sh(p.q_len * p.v_dim), o_sl(p.v_dim), i_sb(p.heads * p.k_len), i_sg(p.k_len), l_sb(p.heads * p.q_len),
      l_sh(p.q_len), h_sb(p.heads * a.heavy), h_sg(a.heavy),
      scale_log2(a.scale * kLog2E) {
  std::memcpy(&coverage_bits, &a.coverage, sizeof coverage_bits);
}

Call::Call(const Attributes& a, const Problem& p, ort::KernelContext* context, cuda::Stream stream)
    : a(a), p(p), gpu(current_gpu()), stream(stream), values(a, p), memory_(context, kMemory, gpu.device) {}

void Call::launch(Kernel kernel, int64_t x, int64_t y, int64_t z) {
  if (y > 65535 || z > 65535 || x > INT32_MAX) throw std::runtime_error("batch, heads or length too large for a grid");
  const Image& i = image(kernel);
  Arguments arguments(kernel, values);
  cuda::check(cuda::driver().launch(function(i), static_cast<unsigned>(x), static_cast<unsigned>(y),
                                    static_cast<unsigned>(z), i.threads, 1, 1, i.shared, stream, arguments.get(), nullptr),
              i.entry);
}

void Call::fill8(Pointer to, unsigned char value, int64_t bytes) {
  cuda::check(cuda::driver().memset_d8(to, value, static_cast<size_t>(bytes), stream), "fill");
}

void Call::fill32(Pointer to, unsigned value, int64_t count) {
  cuda::check(cuda::driver().memset_d32(to, value, static_cast<size_t>(count), stream), "fill");
}

const Image* Call::find(Kernel kernel) const {
  const Image* best = nullptr;
  for (const Image& i : kImages) {
    const bool same_major = i.capability / 10 == gpu.capability / 10 && i.capability <= gpu.capability;
    const bool runs = i.capability == 0 ? gpu.capability >= 80 : same_major;
    if (i.kernel != kernel || i.type != p.type || i.dim != p.dim || i.v_dim != p.v_dim || i.last_queries != a.window || !runs ||
        i.masked != (p.key_mask != nullptr) || i.strip != has_strip(a) || i.group != p.heads / p.kv_heads)
      continue;
    if (!best || i.capability > best->capability) best = &i;
  }
  return best;
}

const Image& Call::image(Kernel kernel) const {
  if (const Image* found = find(kernel)) return *found;
  const char* type = p.type == ort::kFloat ? "float32" : p.type == ort::kFloat16 ? "float16" : "bfloat16";
  throw std::runtime_error(
      std::string("libtsa_ort.so was built without kernels for ") + type + ", head dims " + std::to_string(p.dim) +
      " and " + std::to_string(p.v_dim) + ", window " + std::to_string(a.window) + ", " + std::to_string(p.heads / p.kv_heads) +
      " query heads to a KV head" + (p.key_mask ? ", key_mask" : "") +
      (has_strip(a) ? ", completion" : "") + " on compute capability " + std::to_string(gpu.capability / 10) + "." +
      std::to_string(gpu.capability % 10) + "; build it for this model: tsa-compile export MODEL.onnx --native --cuda");
}

cuda::Function Call::function(const Image& image) const {
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

}  // namespace tsa
#endif
