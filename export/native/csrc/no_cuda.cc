#ifndef TSA_CUDA
// Stands in for cuda.cc in a library that was built without CUDA kernels.
#include "attention.h"

namespace tsa {

ort::Status* check_cuda() {
  return ort::error(ort::kNotImplemented,
                    "this libtsa_ort.so was built without CUDA kernels; build it with `tsa-compile export --native --cuda`");
}

ort::Status* run_cuda(const Attributes&, const Problem&, ort::KernelContext*) { return check_cuda(); }

}  // namespace tsa
#endif
