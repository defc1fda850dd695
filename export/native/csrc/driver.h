// The few entry points of the CUDA driver that a kernel launch needs, found at run time: no CUDA toolkit to build or link.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda {

using Module = void*;
using Function = void*;
using Stream = void*;
using Device = int;
enum class Pointer : uint64_t {};  // CUdeviceptr
using Result = int;        // 0: success

enum Attribute : int { kMultiprocessors = 16, kMajor = 75, kMinor = 76 };         // CUdevice_attribute
enum FunctionAttribute : int { kMaxDynamicSharedBytes = 8 };                      // CUfunction_attribute

struct Driver {
  Result (*ctx_get_device)(Device*);
  Result (*device_get_attribute)(int*, int, Device);
  Result (*get_error_string)(Result, const char**);
  Result (*module_load_data)(Module*, const void*);
  Result (*module_get_function)(Function*, Module, const char*);
  Result (*func_set_attribute)(Function, int, int);
  Result (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream, void**, void**);
  Result (*memset_d8)(Pointer, unsigned char, size_t, Stream);
  Result (*memset_d32)(Pointer, unsigned, size_t, Stream);
  Result (*memcpy_2d)(const void*, Stream);  // CUDA_MEMCPY2D
};

// The driver of this process. Throws std::runtime_error with what is missing.
const Driver& driver();

// Throws std::runtime_error with the driver's words unless `result` is success.
void check(Result result, const char* what);

inline Pointer pointer(const void* p) { return static_cast<Pointer>(reinterpret_cast<uintptr_t>(p)); }

// Copies the int32 at byte `offset` of each of `rows` rows, `pitch` bytes apart, to consecutive places.
void gather_int32(Pointer from, size_t offset, size_t pitch, Pointer to, size_t rows, Stream stream);

}  // namespace cuda
