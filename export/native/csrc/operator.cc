// Registration, attributes, checks and shape inference of ai.tsa::TokenSparseAttention for ONNX Runtime.
#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"

namespace ort {
std::atomic<Table> table = nullptr;
}

namespace tsa {
namespace {

using ort::call;
using ort::Element;
using ort::error;
using ort::Slot;
using ort::Status;

struct Op : ort::CustomOp {
  Element type;
  const char* provider;
};

struct Kernel {
  Attributes attributes;
  const Op* op;
};

struct Shape {
  std::array<int64_t, 4> size{};
  size_t rank = 0;
  Element type = ort::kUndefined;
};

void release_info(ort::TypeShape* info) {
  call<void(ort::TypeShape*)>(Slot::kReleaseTensorTypeAndShapeInfo)(info);
}
using Info = std::unique_ptr<ort::TypeShape, decltype(&release_info)>;

Status* read_shape(const ort::TypeShape* info, Shape* shape) {
  ORT_RETURN_IF_ERROR(call<Status*(const ort::TypeShape*, size_t*)>(Slot::kGetDimensionsCount)(info, &shape->rank));
  if (shape->rank > shape->size.size()) return nullptr;  // the rank check names it
  ORT_RETURN_IF_ERROR(call<Status*(const ort::TypeShape*, int64_t*, size_t)>(Slot::kGetDimensions)(
      info, shape->size.data(), shape->rank));
  return call<Status*(const ort::TypeShape*, Element*)>(Slot::kGetTensorElementType)(info, &shape->type);
}

Status* input(const ort::KernelContext* context, size_t index, const void** data, Shape* shape) {
  const ort::Value* value = nullptr;
  ORT_RETURN_IF_ERROR(call<Status*(const ort::KernelContext*, size_t, const ort::Value**)>(Slot::kKernelContextGetInput)(
      context, index, &value));
  *data = nullptr;
  if (!value) return nullptr;  // an absent optional input
  ort::TypeShape* raw = nullptr;
  ORT_RETURN_IF_ERROR(call<Status*(const ort::Value*, ort::TypeShape**)>(Slot::kGetTensorTypeAndShape)(value, &raw));
  Info info(raw, release_info);
  ORT_RETURN_IF_ERROR(read_shape(info.get(), shape));
  return call<Status*(const ort::Value*, const void**)>(Slot::kGetTensorMutableData)(value, data);
}

std::string text(const Shape& s) {
  std::string out = "[";
  for (size_t i = 0; i < s.rank && i < 4; ++i) out += (i ? ", " : "") + std::to_string(s.size[i]);
  return out + "]";
}

Status* invalid(const Attributes& a, const std::string& what) {
  return error(ort::kInvalidArgument, "ai.tsa::TokenSparseAttention node '" + a.node + "': " + what);
}

Status* check_shapes(const Attributes& a, const Shape& q, const Shape& k, const Shape& v) {
  const char* names[] = {"q", "k", "v"};
  const Shape* shapes[] = {&q, &k, &v};
  for (int i = 0; i < 3; ++i)
    if (shapes[i]->rank != 4)
      return invalid(a, std::string(names[i]) + " must have rank 4, got " + std::to_string(shapes[i]->rank));
  if (k.size[0] != q.size[0] || v.size[0] != q.size[0])
    return invalid(a, "batch sizes differ: q " + text(q) + ", k " + text(k) + ", v " + text(v));
  if (v.size[1] != k.size[1] || v.size[2] != k.size[2])
    return invalid(a, "k and v differ in heads or length: k " + text(k) + ", v " + text(v));
  if (k.size[3] != q.size[3]) return invalid(a, "q and k differ in head dim: q " + text(q) + ", k " + text(k));
  if (k.size[1] < 1 || q.size[1] % k.size[1])
    return invalid(a, "query heads (" + std::to_string(q.size[1]) + ") must be a multiple of KV heads (" +
                          std::to_string(k.size[1]) + ")");
  if (q.size[2] > k.size[2])
    return invalid(a, "more queries (" + std::to_string(q.size[2]) + ") than keys (" + std::to_string(k.size[2]) + ")");
  return nullptr;
}

Status* read_problem(const Kernel& kernel, ort::KernelContext* context, Problem* p) {
  Shape q, k, v, mask;
  ORT_RETURN_IF_ERROR(input(context, 0, &p->q, &q));
  ORT_RETURN_IF_ERROR(input(context, 1, &p->k, &k));
  ORT_RETURN_IF_ERROR(input(context, 2, &p->v, &v));
  ORT_RETURN_IF_ERROR(check_shapes(kernel.attributes, q, k, v));
  size_t inputs = 0;
  ORT_RETURN_IF_ERROR(
      call<Status*(const ort::KernelContext*, size_t*)>(Slot::kKernelContextGetInputCount)(context, &inputs));
  const void* data = nullptr;
  if (inputs > 3) ORT_RETURN_IF_ERROR(input(context, 3, &data, &mask));
  if (data && (mask.rank != 2 || mask.size[0] != k.size[0] || mask.size[1] != k.size[2]))
    return invalid(kernel.attributes, "key_mask must be [batch, keys] = [" + std::to_string(k.size[0]) + ", " +
                                          std::to_string(k.size[2]) + "], got " + text(mask));
  p->key_mask = static_cast<const uint8_t*>(data);
  p->batch = q.size[0], p->heads = q.size[1], p->kv_heads = k.size[1], p->q_len = q.size[2], p->k_len = k.size[2];
  p->dim = q.size[3], p->v_dim = v.size[3], p->type = q.type;
  const int64_t out_shape[] = {p->batch, p->heads, p->q_len, p->v_dim};
  ort::Value* out = nullptr;
  using GetOutput = Status*(ort::KernelContext*, size_t, const int64_t*, size_t, ort::Value**);
  ORT_RETURN_IF_ERROR(call<GetOutput>(Slot::kKernelContextGetOutput)(context, 0, out_shape, 4, &out));
  return call<Status*(ort::Value*, void**)>(Slot::kGetTensorMutableData)(out, &p->out);
}

Status* node_name(const ort::KernelInfo* info, std::string* name) {
  auto get = call<Status*(const ort::KernelInfo*, char*, size_t*)>(Slot::kKernelInfoGetNodeName);
  size_t size = 0;
  ORT_RETURN_IF_ERROR(get(info, nullptr, &size));
  std::vector<char> buffer(size + 1);
  ORT_RETURN_IF_ERROR(get(info, buffer.data(), &size));
  *name = buffer.data();
  return nullptr;
}

Status* read_coverage(const ort::KernelInfo* info, Attributes* a) {
  void* allocator = nullptr;
  ORT_RETURN_IF_ERROR(call<Status*(void**)>(Slot::kGetAllocatorWithDefaultOptions)(&allocator));
  ort::Value* value = nullptr;
  using GetTensor = Status*(const ort::KernelInfo*, const char*, void*, ort::Value**);
  ORT_RETURN_IF_ERROR(call<GetTensor>(Slot::kKernelInfoGetAttributeTensor)(info, "coverage", allocator, &value));
  const double* data = nullptr;
  Status* status = call<Status*(ort::Value*, const double**)>(Slot::kGetTensorMutableData)(value, &data);
  if (!status) a->coverage = *data;
  call<void(ort::Value*)>(Slot::kReleaseValue)(value);
  return status;
}

Status* read_attributes(const ort::KernelInfo* info, Attributes* a) {
  ORT_RETURN_IF_ERROR(node_name(info, &a->node));
  ORT_RETURN_IF_ERROR(read_coverage(info, a));
  ORT_RETURN_IF_ERROR(call<Status*(const ort::KernelInfo*, const char*, float*)>(Slot::kKernelInfoGetAttributeFloat)(
      info, "scale", &a->scale));
  const std::pair<const char*, int64_t*> ints[] = {
      {"window", &a->window},           {"pool", &a->pool},   {"min_tokens", &a->min_tokens},
      {"strip_window", &a->strip_window}, {"strip_sinks", &a->strip_sinks}, {"heavy", &a->heavy}};
  for (auto [name, target] : ints) {
    ORT_RETURN_IF_ERROR(call<Status*(const ort::KernelInfo*, const char*, int64_t*)>(
        Slot::kKernelInfoGetAttributeInt64)(info, name, target));
    if (*target < 0) return error(ort::kInvalidArgument, std::string(name) + " must not be negative, got " + std::to_string(*target));
  }
  if (!(a->coverage >= 0 && a->coverage < 1))
    return error(ort::kInvalidArgument, "coverage must be in [0, 1), got " + std::to_string(a->coverage));
  if (a->window < 1 || a->min_tokens < 1 || a->pool % 2 == 0)
    return error(ort::kInvalidArgument, "window and min_tokens must be positive and pool odd");
  if (a->heavy > a->min_tokens) return error(ort::kInvalidArgument, "heavy must not exceed min_tokens");
  return nullptr;
}

Status* create(const ort::CustomOp* op, ort::Table, const ort::KernelInfo* info, void** kernel) {
  auto made = std::make_unique<Kernel>();
  made->op = static_cast<const Op*>(op);
  Status* status = read_attributes(info, &made->attributes);
  if (!status && made->op->provider) status = check_cuda();
  if (!status) {
    *kernel = made.release();
    return nullptr;
  }
  Status* named = invalid(made->attributes, call<const char*(const Status*)>(Slot::kGetErrorMessage)(status));
  call<void(Status*)>(Slot::kReleaseStatus)(status);
  return named;
}

Status* compute(void* state, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  Problem problem;
  ORT_RETURN_IF_ERROR(read_problem(kernel, context, &problem));
  if (problem.batch * problem.heads * problem.q_len * problem.v_dim == 0) return nullptr;
  try {
#ifndef TSA_DEVICE_ON_HOST
    if (kernel.op->provider == nullptr) return run_cpu(kernel.attributes, problem, context);
#endif
    return run_cuda(kernel.attributes, problem, context);
  } catch (const std::exception& e) {
    return error(ort::kFail, "ai.tsa::TokenSparseAttention node '" + kernel.attributes.node + "': " + e.what());
  }
}

// [batch, heads, q_len, v_dim] if all four are known; symbolic sizes are left to the model's own value_info.
Status* infer(const ort::CustomOp*, ort::ShapeContext* context) {
  auto get = call<Status*(const ort::ShapeContext*, size_t, ort::TypeShape**)>(Slot::kShapeInferContextGetInputTypeShape);
  ort::TypeShape *q_info = nullptr, *v_info = nullptr, *raw = nullptr;  // owned by the context
  ORT_RETURN_IF_ERROR(get(context, 0, &q_info));
  ORT_RETURN_IF_ERROR(get(context, 2, &v_info));
  Shape q, v;
  ORT_RETURN_IF_ERROR(read_shape(q_info, &q));
  ORT_RETURN_IF_ERROR(read_shape(v_info, &v));
  if (q.rank != 4 || v.rank != 4) return nullptr;  // unknown here, or an error that compute() names
  const int64_t size[] = {q.size[0], q.size[1], q.size[2], v.size[3]};
  if (*std::min_element(size, size + 4) < 0) return nullptr;
  ORT_RETURN_IF_ERROR(call<Status*(ort::TypeShape**)>(Slot::kCreateTensorTypeAndShapeInfo)(&raw));
  Info info(raw, release_info);
  ORT_RETURN_IF_ERROR(call<Status*(ort::TypeShape*, Element)>(Slot::kSetTensorElementType)(raw, q.type));
  ORT_RETURN_IF_ERROR(call<Status*(ort::TypeShape*, const int64_t*, size_t)>(Slot::kSetDimensions)(raw, size, 4));
  return call<Status*(ort::ShapeContext*, size_t, const ort::TypeShape*)>(Slot::kShapeInferContextSetOutputTypeShape)(
      context, 0, raw);
}

Op make(Element type, const char* provider) {
  Op op{};
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp*) { return "TokenSparseAttention"; };
  op.GetExecutionProviderType = [](const ort::CustomOp* o) { return static_cast<const Op*>(o)->provider; };
  op.GetInputType = [](const ort::CustomOp* o, size_t i) { return i == 3 ? ort::kBool : static_cast<const Op*>(o)->type; };
  op.GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return 4; };
  op.GetOutputType = [](const ort::CustomOp* o, size_t) { return static_cast<const Op*>(o)->type; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetInputCharacteristic = [](const ort::CustomOp*, size_t i) { return i == 3 ? 1 : 0; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return 0; };
  auto one = [](const ort::CustomOp*) { return 1; };
  op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = one;
  op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity = one;
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.InferOutputShape = infer;
  op.GetStartVersion = one;
  op.GetEndVersion = [](const ort::CustomOp*) { return INT32_MAX; };
  op.type = type;
  op.provider = provider;
  return op;
}

constexpr const char* kCuda = "CUDAExecutionProvider";
#ifdef TSA_DEVICE_ON_HOST  // a test build: the launches of the CUDA kernel, under the CPU provider
const char* const kProviders[] = {nullptr};
#else
const char* const kProviders[] = {nullptr, kCuda};
#endif

std::vector<Op> all_ops() {
  std::vector<Op> ops;
  for (const char* provider : kProviders)
    for (Element type : {ort::kFloat, ort::kFloat16, ort::kBFloat16}) ops.push_back(make(type, provider));
  return ops;
}

// The domain "ai.tsa" with all operators. It lives as long as the process, as sessions keep the operators' addresses (which stay
// when the vector moves).
struct Registered {
  std::vector<Op> ops = all_ops();
  ort::Domain* domain = nullptr;
  std::string failure;  // empty: none
};

Registered register_all() {
  Registered made;
  Status* status = call<Status*(const char*, ort::Domain**)>(Slot::kCreateCustomOpDomain)("ai.tsa", &made.domain);
  for (auto& op : made.ops)
    if (!status) status = call<Status*(ort::Domain*, ort::CustomOp*)>(Slot::kCustomOpDomainAdd)(made.domain, &op);
  if (status) made.failure = call<const char*(const Status*)>(Slot::kGetErrorMessage)(status);
  if (status) call<void(Status*)>(Slot::kReleaseStatus)(status);
  return made;
}

}  // namespace
}  // namespace tsa

// Called by ONNX Runtime when a session registers this library.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  using namespace ort;
  Table found = base->GetApi(kApiVersion);
  table = found ? found : base->GetApi(1);  // CreateStatus is in every version
  if (!found) {
    return error(kFail, "libtsa_ort needs ONNX Runtime 1." + std::to_string(kApiVersion) + " or newer; this is " +
                            base->GetVersionString());
  }
  static const tsa::Registered all = tsa::register_all();  // once, also if sessions register at the same time
  if (!all.failure.empty()) return error(kFail, all.failure);
  return call<Status*(SessionOptions*, Domain*)>(kAddCustomOpDomain)(options, all.domain);
}
