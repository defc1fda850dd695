#ifdef TSA_CUDA
#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#ifndef TSA_DRIVER
#define TSA_DRIVER "libcuda.so.1"
#endif

namespace cuda {
namespace {

template <class Entry>
void find(void* library, Entry& entry, const char* name) {
  entry = reinterpret_cast<Entry>(dlsym(library, name));
  if (!entry) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
}

Driver load() {
  void* library = dlopen(TSA_DRIVER, RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
  Driver d{};
  find(library, d.ctx_get_device, "cuCtxGetDevice");
  find(library, d.device_get_attribute, "cuDeviceGetAttribute");
  find(library, d.get_error_string, "cuGetErrorString");
  find(library, d.module_load_data, "cuModuleLoadData");
  find(library, d.module_get_function, "cuModuleGetFunction");
  find(library, d.func_set_attribute, "cuFuncSetAttribute");
  find(library, d.launch, "cuLaunchKernel");
  find(library, d.memset_d8, "cuMemsetD8Async");
  find(library, d.memset_d32, "cuMemsetD32Async");
  find(library, d.memcpy_2d, "cuMemcpy2DAsync_v2");
  return d;
}

struct Memcpy2D {  // CUDA_MEMCPY2D_v2
  size_t source_x, source_y;
  int source_type;
  const void* source_host;
  Pointer source;
  void* source_array;
  size_t source_pitch, target_x, target_y;
  int target_type;
  void* target_host;
  Pointer target;
  void* target_array;
  size_t target_pitch, width, height;
};

}  // namespace

const Driver& driver() {
  static const Driver loaded = load();
  return loaded;
}

void check(Result result, const char* what) {
  if (result == 0) return;
  const char* text = nullptr;
  driver().get_error_string(result, &text);
  throw std::runtime_error(std::string(what) + ": " + (text ? text : "CUDA error " + std::to_string(result)));
}

void gather_int32(Pointer from, size_t offset, size_t pitch, Pointer to, size_t rows, Stream stream) {
  constexpr int kDevice = 2;  // CU_MEMORYTYPE_DEVICE
  Memcpy2D copy{};
  copy.source_type = copy.target_type = kDevice;
  copy.source = from, copy.source_x = offset, copy.source_pitch = pitch;
  copy.target = to, copy.target_pitch = sizeof(int32_t);
  copy.width = sizeof(int32_t), copy.height = rows;
  check(driver().memcpy_2d(&copy, stream), "copy of counts");
}

}  // namespace cuda
#endif
