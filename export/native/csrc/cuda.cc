// ai.tsa::TokenSparseAttention on ONNX Runtime's CUDA stream: the launches, in order, with their grids and scratch memory.
//
// The kernels are the project's own, compiled ahead of time (tsa_compile/export/aot.py); this file mirrors the host code in
// kernels/*/host.py, fused.py, strip.py and hopper.py, and a test compares the launches of the two. Counts stay on the
// device: nothing here waits for it.
#ifdef TSA_CUDA
#include "kernel_names.h"
#include "launch.h"

namespace tsa {
namespace {

void rank_order(Call& c) {
  const Problem& p = c.p;
  if (!p.key_mask) return;
  c.values.ranks = c.take<int32_t>(p.batch * p.k_len);
  c.values.order = c.take<int32_t>(p.batch * p.k_len);
  c.launch(Kernel::rank, p.batch);
  c.launch(Kernel::order, p.batch, ceil_div(p.k_len, c.image(Kernel::order).block_m));
}

void last_query_scores(Call& c) {
  const Problem& p = c.p;
  const bool hopper = c.has(Kernel::score_lse_hopper);
  const Image& image = c.image(hopper ? Kernel::score_lse_hopper : Kernel::score_lse);
  constexpr int64_t kPrograms = 528, kMinSpan = 512, kMaxSplits = 32;
  const int64_t programs = hopper ? p.batch * p.heads / image.block_m : p.batch * p.heads;
  const int64_t most = hopper ? std::min(c.gpu.multiprocessors / programs, kMaxSplits)
                              : std::min(ceil_div(kPrograms, programs), ceil_div(p.k_len, kMinSpan));
  c.values.span = ceil_div(ceil_div(p.k_len, std::max<int64_t>(1, most)), image.block_n) * image.block_n;
  c.values.splits = std::max<int64_t>(1, ceil_div(p.k_len, c.values.span));
  const int64_t parts = p.batch * p.heads * c.values.splits * c.a.window;
  c.values.part_max = c.take<float>(parts);
  c.values.part_sum = c.take<float>(parts);
  c.values.mean = c.take<float>(p.batch * p.heads * p.k_len);
  if (hopper) {
    c.launch(Kernel::score_lse_hopper, programs, c.values.splits);
    c.launch(Kernel::score_mean_hopper, programs, c.values.splits);
  } else {
    c.launch(Kernel::score_lse, programs, c.values.splits, ceil_div(c.a.window, image.block_m));
    c.launch(Kernel::score_mean, programs, c.values.splits);
  }
}

void select_from_means(Call& c) {
  const Problem& p = c.p;
  constexpr int64_t kMassRow = 2052;
  c.values.scores = c.take<float>(p.batch * p.heads * p.k_len);
  c.values.masses = c.take<int64_t>(p.batch * p.k_len);
  c.values.candidates = c.take<int64_t>(p.batch * p.k_len);
  c.values.mass_bins = c.take<int64_t>(p.batch * kMassRow);
  c.fill8(c.values.mass_bins, 0, p.batch * kMassRow * 8);
  for (Kernel kernel : {Kernel::pool, Kernel::count})
    c.launch(kernel, ceil_div(p.k_len, c.image(kernel).block_m) * p.batch);
}

// Each list, by programs of its own for each chunk of a row; rows of one chunk, or all of whose tokens are kept, at once.
void write_lists(Call& c, bool by_score) {
  const Problem& p = c.p;
  constexpr int64_t kBins = 256;
  const int64_t chunks = ceil_div(p.k_len, c.image(Kernel::select).block_m), rows = p.batch * p.heads;
  const int64_t lists = c.a.heavy > 0 ? 2 : 1;
  if (by_score) c.values.gathered = c.take<float>(lists * rows * p.k_len);
  if (chunks == 1 || !by_score) {
    c.launch(Kernel::select, chunks * lists * rows);
    return;
  }
  c.values.bins = c.take<int32_t>(rows * chunks * kBins);
  c.values.cuts = c.take<int32_t>(rows * 2 * 4);
  c.fill8(c.values.cuts, 0, rows * 2 * 4 * 4);
  c.launch(Kernel::bin, chunks * rows);
  c.launch(Kernel::cut, chunks * lists * rows);
  c.launch(Kernel::write, chunks * lists * rows);
}

// Every real token of every row; known on the host, so nothing is scored.
void count_all(Call& c) {
  const Problem& p = c.p;
  c.values.scores = c.values.indices;  // not read
  if (p.key_mask) {
    cuda::gather_int32(c.values.ranks, 4 * (p.k_len - 1), 4 * p.k_len, c.values.counts, p.batch, c.stream);
  } else {
    c.fill32(c.values.counts, static_cast<unsigned>(p.k_len), p.batch);
  }
}

void select_tokens(Call& c) {
  const Problem& p = c.p;
  c.values.indices = c.take<int32_t>(p.batch * p.heads * p.k_len);
  c.values.counts = c.take<int32_t>(p.batch);
  c.values.heavy_indices = c.take<int32_t>(p.batch * p.heads * c.a.heavy);
  const bool by_score = p.k_len > c.a.min_tokens + c.a.window && c.a.coverage != 0;
  if (by_score) {
    last_query_scores(c);
    select_from_means(c);
  } else {
    count_all(c);
  }
  write_lists(c, by_score);
}

// Query heads that advance together (kernels/attend/tokens/configs.py, section_heads).
int64_t section_heads(const Problem& p) {
  const int64_t bytes = (p.dim + p.v_dim) * (p.type == ort::kFloat ? 4 : 2);
  const int64_t fit = std::max<int64_t>(1, (int64_t{32} << 20) / std::max<int64_t>(1, p.k_len * bytes));
  int64_t best = 1;
  for (int64_t n = 1; n <= p.kv_heads && n <= fit; ++n)
    if (p.kv_heads % n == 0) best = n;
  return best * (p.heads / p.kv_heads);
}

constexpr int64_t kQueuedFrom = 16;  // sparse_prefill/hopper.py: QUEUED_FROM

void prefill(Call& c) {
  const Problem& p = c.p;
  const bool hopper = c.has(Kernel::prefill_hopper);
  const Kernel kernel = hopper ? Kernel::prefill_hopper : Kernel::prefill;
  const int64_t block_m = c.image(kernel).block_m;
  c.values.tiles = std::min(ceil_div(p.k_len, block_m), ceil_div(p.q_len, block_m) + 1);
  c.values.total = p.batch * p.heads * c.values.tiles;
  c.values.section = section_heads(p);
  if (has_strip(c.a)) c.values.lse = c.take<float>(p.batch * p.heads * p.q_len);
  c.values.lse_or_out = has_strip(c.a) ? c.values.lse : c.values.out;
  const int64_t programs = hopper ? std::min<int64_t>(c.values.total, c.gpu.multiprocessors) : c.values.total;
  c.values.queue = c.values.counts;  // not read unless tiles are queued, as in sparse_prefill/hopper.py
  if (hopper && c.values.total >= kQueuedFrom * programs) {
    c.values.queued = 1;
    c.values.queue = c.take<int32_t>(1);
    c.fill32(c.values.queue, 0, 1);
  }
  c.launch(kernel, programs);
}

void add_strip(Call& c) {
  const Problem& p = c.p;
  const int64_t lists = p.batch * p.heads;
  c.values.slots = c.take<int32_t>(lists * p.k_len);
  c.fill32(c.values.slots, 0xffffffffu, lists * p.k_len);
  c.launch(Kernel::invert, lists, ceil_div(p.k_len, c.image(Kernel::invert).block_m));
  c.values.strip_order = p.key_mask ? c.values.order : c.values.slots;
  c.values.strip_ranks = p.key_mask ? c.values.ranks : c.values.slots;
  c.launch(Kernel::strip, ceil_div(p.q_len, c.image(Kernel::strip).block_m) * lists);
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
  rank_order(c);
  select_tokens(c);
  prefill(c);
  if (has_strip(a)) add_strip(c);
  return nullptr;
}

}  // namespace tsa
#endif
