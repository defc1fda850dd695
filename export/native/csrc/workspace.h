// Scratch memory from ONNX Runtime's allocator of the kernel's own device.
#pragma once

#include <stdexcept>

#include "ort_abi.h"

namespace ort {

// Blocks are freed together. On CUDA that is when the kernels that use them have been enqueued: the allocator hands them
// out again in the order of the same stream.
class Workspace {
 public:
  // device: "Cpu" or "Cuda".
  Workspace(const KernelContext* context, const char* device, int device_id) {
    using CreateMemoryInfo = Status*(const char*, int, int, int, MemoryInfo**);
    check(call<CreateMemoryInfo>(kCreateMemoryInfo)(device, 0, device_id, 0, &info_), "memory info");
    using GetAllocator = Status*(const KernelContext*, const MemoryInfo*, Allocator**);
    check(call<GetAllocator>(kKernelContextGetAllocator)(context, info_, &allocator_), "allocator");
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    for (int i = 0; i < used_; ++i) release(call<Status*(Allocator*, void*)>(kAllocatorFree)(allocator_, blocks_[i]));
    if (allocator_) call<void(Allocator*)>(kReleaseAllocator)(allocator_);
    if (info_) call<void(MemoryInfo*)>(kReleaseMemoryInfo)(info_);
  }

  template <class T>
  T* take(size_t count) {
    if (used_ == kBlocks) throw std::logic_error("workspace: too many blocks");
    void* block = nullptr;
    const size_t bytes = count * sizeof(T) + (count == 0);
    check(call<Status*(Allocator*, size_t, void**)>(kAllocatorAlloc)(allocator_, bytes, &block), "workspace");
    return static_cast<T*>(blocks_[used_++] = block);
  }

 private:
  static void release(Status* status) {
    if (status) call<void(Status*)>(kReleaseStatus)(status);
  }
  static void check(Status* status, const char* what) {
    if (!status) return;
    const std::string message = call<const char*(const Status*)>(kGetErrorMessage)(status);
    release(status);
    throw std::runtime_error(std::string(what) + ": " + message);
  }

  static constexpr int kBlocks = 24;
  MemoryInfo* info_ = nullptr;
  Allocator* allocator_ = nullptr;
  void* blocks_[kBlocks];
  int used_ = 0;
};

}  // namespace ort
