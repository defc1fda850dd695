// The part of ONNX Runtime's C ABI that a custom operator needs, declared by hand: its wheels ship no headers.
//
// OrtApi is a table of function pointers to which releases only append (onnxruntime_c_api.h says so and ONNX Runtime tests
// it), so a slot number is stable. The numbers below are those of API version 17, the oldest that this file accepts;
// tests/export/test_native.py makes the installed release answer through every one of them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace ort {

constexpr uint32_t kApiVersion = 17;

// Opaque handles.
struct Status;  // null: success
struct Value;
struct TypeShape;
struct MemoryInfo;
struct Allocator;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct Domain;
struct SessionOptions;

using Table = const void* const*;  // OrtApi

struct ApiBase {  // OrtApiBase
  Table (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum Element : int { kUndefined = 0, kFloat = 1, kBool = 9, kFloat16 = 10, kDouble = 11, kBFloat16 = 16 };
enum Code : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };

// Slots of OrtApi.
enum Slot : int {
  kCreateStatus = 0,
  kGetErrorMessage = 2,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kCreateTensorTypeAndShapeInfo = 57,
  kSetTensorElementType = 58,
  kSetDimensions = 59,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kCreateMemoryInfo = 68,
  kAllocatorAlloc = 75,
  kAllocatorFree = 76,
  kGetAllocatorWithDefaultOptions = 78,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelContextGetInputCount = 88,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseMemoryInfo = 94,
  kReleaseValue = 96,
  kReleaseTensorTypeAndShapeInfo = 99,
  kReleaseAllocator = 132,
  kKernelContextGetGPUComputeStream = 193,
  kKernelInfoGetAttributeTensor = 236,
  kKernelInfoGetNodeName = 244,
  kKernelContextGetAllocator = 253,
  kShapeInferContextGetInputTypeShape = 268,
  kShapeInferContextSetOutputTypeShape = 270,
  kKernelContextParallelFor = 274,
};

struct CustomOp {  // OrtCustomOp of API version 17
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, Table, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  Element (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  Element (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);  // 0: required, 1: optional
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);  // 0: where the provider computes
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, Table, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShape)(const CustomOp*, ShapeContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

extern std::atomic<Table> table;  // set by RegisterCustomOps

template <class Signature>
Signature* call(Slot slot) {
  return reinterpret_cast<Signature*>(const_cast<void*>(table.load(std::memory_order_relaxed)[slot]));
}

inline Status* error(Code code, const std::string& message) {
  return call<Status*(int, const char*)>(kCreateStatus)(code, message.c_str());
}

}  // namespace ort

#define ORT_RETURN_IF_ERROR(expression)                  \
  do {                                                   \
    if (ort::Status* status_ = (expression)) return status_; \
  } while (0)
