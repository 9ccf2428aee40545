#include "winograd/run.h"

#include <algorithm>
#include <atomic>
#include <thread>

namespace scm::winograd {
namespace {

template <typename T>
Kernels<T> kernels() {
#ifdef SCM_OPS_X86_LEVELS
  if (cpu_level() == CpuLevel::v4) return kernels_v4<T>();
  if (cpu_level() == CpuLevel::v3) return kernels_v3<T>();
#endif
  return kernels_generic<T>();
}

// Runs body(unit, worker) for all units. At most `workers` calls run at the same time, each with its own number of a worker.
template <typename Body>
void for_each(const Context& context, std::int64_t units, std::int64_t workers, const Body& body) {
  std::atomic<std::int64_t> next{0};
  context.parallel(std::min(units, workers), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t worker = begin; worker < end; ++worker) {
      for (std::int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) body(unit, worker);
    }
  });
}

}  // namespace

bool available() {
#if defined(__aarch64__)
  return true;
#else
  return cpu_level() != CpuLevel::generic;
#endif
}

Plan choose_plan(const Sizes& s, std::int64_t threads) {
  // V should stay in the caches: 8 MB, but enough tiles that transforming the weights for every group costs little. M and U of a piece fit into the second-level
  // cache: 64 tiles by 64 outputs are 0.6 MB, and 32 inputs by 64 outputs 0.3 MB.
  constexpr std::int64_t kMaxV = (8 << 20) / sizeof(float), kMinGroup = 64, kChunk = 64, kDepth = 32;
  constexpr std::int64_t kFew = 8;  // tiles for which transforming the weights in registers, for 2 or 4 tiles at a time, takes less time than storing them
  const std::int64_t tiles = s.tiles(), per_tile = round_up(s.in, kStep) * kPoints;
  Plan plan{std::min(tiles, std::max(kMinGroup, kMaxV / per_tile / kChunk * kChunk)), 0, kBlock, kDepth};
  plan.chunk = std::min(plan.group, kChunk);
  // Enough pieces for all threads: first fewer outputs, which makes reading V more expensive, then fewer tiles, which makes transforming the weights so.
  while (plan.block > 16 && pieces(s, plan, plan.group) < threads) plan.block /= 2;
  while (plan.chunk > kFew && pieces(s, plan, plan.group) < threads) plan.chunk = (plan.chunk + 1) / 2;
  if (plan.chunk <= kFew) plan.depth = 0;
  return plan;
}

template <typename T>
void run(const Context& context, Params<T> p) {
  const Sizes& s = p.sizes;
  if (s.samples * s.height * s.width * s.out == 0) return;
  static const std::int64_t threads = std::max(1u, std::thread::hardware_concurrency());  // the API does not tell the session's number of threads
  const auto kernels = winograd::kernels<T>();
  const Plan& plan = p.plan = choose_plan(s, threads);
  const std::int64_t workers = std::min(threads, pieces(s, plan, plan.group)), tiles = s.tiles();
  const std::int64_t scratch_size = round_up(std::max(multiply_scratch(plan), p.channels_first ? transform_scratch(s) : 0), 16);
  const Scratch memory = context.scratch(static_cast<std::size_t>(v_size(s, plan) + workers * scratch_size) * sizeof(float));
  p.v = static_cast<float*>(memory.data());
  float* const scratch = p.v + v_size(s, plan);
  const std::int64_t grain = std::max<std::int64_t>(1, std::min<std::int64_t>(s.tiles_across(), kGrain / (kPoints * s.in)));  // tiles of a unit of `transform`
  for (p.first = 0; p.first < tiles; p.first += plan.group) {
    p.count = std::min(plan.group, tiles - p.first);
    for_each(context, (p.count + grain - 1) / grain, workers, [&](std::int64_t unit, std::int64_t worker) {
      kernels.transform(p, unit * grain, std::min((unit + 1) * grain, p.count), scratch + worker * scratch_size);
    });
    for_each(context, pieces(s, plan, p.count), workers,
             [&](std::int64_t piece, std::int64_t worker) { kernels.multiply(p, piece, scratch + worker * scratch_size); });
  }
}

template void run<float>(const Context&, Params<float>);
template void run<float16>(const Context&, Params<float16>);

}  // namespace scm::winograd
