#include "winograd/run.h"

#include <algorithm>
#include <atomic>

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

// Most tiles whose weights are transformed in registers. Four tiles share a transform with 32 vector registers, two with 16 (multiply_few).
std::int64_t few_tiles() {
#if defined(__aarch64__)
  return 8;
#else
  return cpu_level() == CpuLevel::v4 ? 8 : 2;
#endif
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
  const std::int64_t tiles = total_tiles(s);
  // For few tiles, it takes less time to transform the weights in registers than to store them, though each group of tiles transforms them again. With 16
  // outputs, weights are read along 16 rows.
  if (tiles <= few_tiles()) return {tiles, tiles, 16, 0, false};
  constexpr std::int64_t kFew = 8, kDepthOfFew = 128;
  if (tiles <= kFew) return {tiles, tiles, 16, std::min(kDepthOfFew, round_up(s.in, kStep)), false};
  // A chunk's M (64 tiles by 32 outputs) and U (64 inputs by 32 outputs) take 0.3 MB each and fit into most second-level caches (benchmarks/NOTES.md).
  constexpr std::int64_t kChunk = 64, kBlockOfChunk = 32, kDepth = 64, kMaxSeparateV = (6 << 20) / sizeof(float), kMaxV = (64 << 20) / sizeof(float);
  const std::int64_t chunks = (tiles + kChunk - 1) / kChunk, chunk = (tiles + chunks - 1) / chunks, rounds = (chunks + threads - 1) / threads;
  Plan plan{chunk, chunk, kBlockOfChunk, kDepth, true};
  const bool fits = v_size(s, plan) <= kMaxSeparateV && std::min(threads, chunks) * v_size(s, plan) <= kMaxV;
  if (chunks * 4 >= rounds * threads * 3 && fits) return plan;
  plan.separate = false;
  const auto with_group = [&](std::int64_t group) {
    Plan larger = plan;
    larger.group = std::min(tiles, group);
    return larger;
  };
  while (plan.group < tiles && pieces(s, plan, plan.group) < 3 * threads && v_size(s, with_group(plan.group + chunk)) <= kMaxV) {
    plan = with_group(plan.group + chunk);
  }
  // Enough pieces for all threads: first fewer outputs, which makes reading V more expensive, then fewer tiles, which makes transforming the weights so.
  while (plan.block > 16 && pieces(s, plan, plan.group) < threads) plan.block /= 2;
  while (plan.chunk > kFew && pieces(s, plan, plan.group) < threads) plan.chunk = (plan.chunk + 1) / 2;
  return plan;
}

template <typename T>
void run(const Context& context, Params<T> p) {
  const Sizes& s = p.sizes;
  if (s.samples * s.height * s.width * s.out == 0) return;
  const std::int64_t threads = hardware_threads();
  const auto kernels = winograd::kernels<T>();
  const Plan plan = p.plan = choose_plan(s, threads);
  const std::int64_t tiles = total_tiles(s), groups = (tiles + plan.group - 1) / plan.group, units = plan.separate ? groups : pieces(s, plan, plan.group);
  const std::int64_t workers = std::min(threads, units), v_count = plan.separate ? workers : 1;
  const std::int64_t v_floats = round_up(v_size(s, plan), kPad);
  const std::int64_t scratch_floats = round_up(std::max(multiply_scratch(plan), p.channels_first ? transform_scratch(s) : 0), kPad);
  const Scratch memory = context.scratch(static_cast<std::size_t>(v_count * v_floats + workers * scratch_floats) * sizeof(float));
  float* const v = static_cast<float*>(memory.data());
  const auto scratch = [&](std::int64_t worker) { return v + v_count * v_floats + worker * scratch_floats; };
  const auto group_at = [&](std::int64_t first, float* at) {
    Params<T> group = p;
    group.first = first;
    group.count = std::min(plan.group, tiles - first);
    group.v = at;
    return group;
  };
  if (plan.separate) {
    for_each(context, groups, workers, [&](std::int64_t unit, std::int64_t worker) {
      const Params<T> group = group_at(unit * plan.group, v + worker * v_floats);
      kernels.transform(group, 0, group.count, scratch(worker));
      for (std::int64_t piece = 0; piece < blocks(s, plan); ++piece) kernels.multiply(group, piece, scratch(worker));
    });
    return;
  }
  const std::int64_t grain = std::max<std::int64_t>(1, std::min(tiles_across(s), kGrain / (kPoints * s.in)));  // tiles of a unit of `transform`
  for (std::int64_t first = 0; first < tiles; first += plan.group) {
    const Params<T> group = group_at(first, v);
    for_each(context, (group.count + grain - 1) / grain, workers, [&](std::int64_t unit, std::int64_t worker) {
      kernels.transform(group, unit * grain, std::min((unit + 1) * grain, group.count), scratch(worker));
    });
    for_each(context, pieces(s, plan, group.count), workers, [&](std::int64_t piece, std::int64_t worker) { kernels.multiply(group, piece, scratch(worker)); });
  }
}

template void run<float>(const Context&, Params<float>);
template void run<float16>(const Context&, Params<float16>);

}  // namespace scm::winograd
