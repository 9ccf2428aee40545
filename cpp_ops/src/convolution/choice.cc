// Which tile a shape gets: a table of measured shapes, and for all others an estimate from the device's rates.
#include <algorithm>
#include <cmath>
#include <iterator>

#include "convolution/choice.h"
#include "convolution/shapes.h"

namespace scm::convolution {
namespace {

// Rates of a device that kernels reach. The estimate and its figures are those of benchmarks/_paper/own.py and gpus.py, and a test compares the choices.
// Sources: NVIDIA's architecture white papers, dense float16 with float32 accumulators at boost clocks; on Hopper, mma reaches 62.9 % of wgmma's rate (arXiv
// 2402.13499). The cache of other devices than A100 and H200, and newer devices are a guess.
struct Rates {
  double mma, wgmma;     // operations a second and multiprocessor
  double cache, memory;  // bytes a second
  double cache_alone;    // the cache's for one multiprocessor
  int shared_kib;        // of a multiprocessor
};

constexpr double kMma = 0.85, kWgmma = 0.7;  // reached by the loops of the kernels, with operands in time: a guess
constexpr double kReachable = 0.88;          // of the memory's bandwidth

Rates rates_of(const Device& device) {
  const auto rates = [](double mma, double wgmma, double cache, double cache_alone, double memory, int shared_kib) {
    return Rates{kMma * mma, kWgmma * wgmma, cache, kReachable * memory, cache_alone, shared_kib};
  };
  switch (device.capability) {
    case 80:
      return rates(312e12 / 108, 0, 3.5e12, 75e9, 2.04e12, 164);
    case 86:
      return rates(71e12 / 82, 0, 1.8e12, 92e9, 0.94e12, 100);
    case 89:
      return rates(165e12 / 128, 0, 3.5e12, 137e9, 1.0e12, 100);
    case 90:
      return rates(0.629 * 989e12 / 132, 989e12 / 132, 7.0e12, 95e9, 4.8e12, 228);
    default:
      return rates(3e12, 0, 5e12, 100e9, 1.8e12, device.capability < 120 ? 228 : 100);
  }
}

// What a block of a shape needs: shared memory, and registers, which permit so many blocks on a multiprocessor.
struct Traits {
  int shared_kib, max_blocks;
};

Traits traits_of(Shape shape) {
  switch (shape) {
    case Shape::mma_128x128:
      return {64, 2};
    case Shape::mma_128x64:
      return {72, 3};
    case Shape::mma_64x64:
      return {64, 4};
    case Shape::mma_64x32:
      return {48, 4};
    case Shape::wgmma_256x128:
      return {192, 1};
    case Shape::wgmma_128x128:
      return {128, 1};
    case Shape::wgmma_128x64:
      return {96, 2};
    case Shape::wgmma_64x64:
      return {64, 3};
  }
  return {};
}

constexpr double kLaunch = 2.5e-6;               // from the last kernel of a CUDA graph, and filling the pipeline
constexpr double kSplit = 1e-6, kPart = 2.5e-7;  // the last block waits for the others, and reads the parts one after another
constexpr int kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16};
constexpr std::int64_t kManySamples = 4, kLargeBatch = 8;

// Bytes of the input, the weights and the output.
double bytes(const Sizes& s) { return 2.0 * static_cast<double>(s.samples * s.pixels() * (s.in + s.out) + packed_size(s)); }

// Blocks run in waves. A block takes the time of its operations, or of the loads of its operands from the cache, which all multiprocessors share.
double seconds(const Sizes& s, const Tile& tile, const Device& device) {
  const Rates rates = rates_of(device);
  const Traits traits = traits_of(tile.shape);
  const auto [pixels, channels] = size_of(tile.shape);
  const int split = effective_split(s, tile), resident = std::max(1, std::min(rates.shared_kib / traits.shared_kib, traits.max_blocks));
  const double terms = 64.0 * static_cast<double>((steps(s) + split - 1) / split);
  const double blocks = static_cast<double>(tiles(s, tile.shape)) * split, most = std::ceil(blocks / device.multiprocessors);  // on one multiprocessor
  // One block of several that fit does not hide its own latencies.
  const double full = resident == 1 ? 1.0 : std::min(1.0, 0.55 + 0.45 * (most - 1) / (resident - 1));
  const double compute = 2.0 * pixels * channels * terms / ((family(tile.shape) == Family::wgmma ? rates.wgmma : rates.mma) * full);
  const double loads = 2.0 * (pixels + channels) * terms / std::min(rates.cache / std::min<double>(blocks, device.multiprocessors), rates.cache_alone);
  const double parts = split == 1 ? 0.0 : blocks * pixels * channels * 8 / rates.cache + kSplit + split * kPart;
  return kLaunch + std::max(most * std::max(compute, loads), bytes(s) / rates.memory) + parts;
}

struct Estimate {
  Shape shape;
  double seconds;
};

// Returns the fastest shape of a family that the device supports, for sizes that it can have.
Estimate fastest(Family wanted, const Sizes& sizes, int split, const Device& device) {
  Estimate best{Shape::mma_64x64, HUGE_VAL};
  for (int i = 0; i < kShapes; ++i) {
    const auto shape = static_cast<Shape>(i);
    if (family(shape) != wanted || !supported(shape, device) || (shape != kNarrowShape && !wide(sizes))) continue;
    const double time = seconds(sizes, {shape, split}, device);
    if (time < best.seconds) best = {shape, time};
  }
  return best;
}

constexpr Row kRows[] = {
#define SCM_TILE(capability, pixels, in, out, taps, split, shape, shape_of_many) {capability, pixels, in, out, taps, split, Shape::shape, Shape::shape_of_many},
#include "convolution/tiles.inc"
#undef SCM_TILE
    {},  // the table may be empty, an array not
};
static_assert(independent_of_batch(std::begin(kRows), std::end(kRows)), "both tiles of a row must be of the same family, mma or wgmma");

}  // namespace

bool supported(Shape shape, const Device& device) {
#ifdef SCM_OPS_SM90A
  if (family(shape) == Family::wgmma) return device.capability == 90;
#endif
  return family(shape) == Family::mma && device.capability >= 80;
}

std::optional<Tile> look_up(const Row* begin, const Row* end, const Sizes& s, const Device& device) {
  const Row* const row = std::find_if(begin, end, [&](const Row& known) {
    return known.capability == device.capability && known.pixels == s.pixels() && known.in == s.in && known.out == s.out && known.taps == s.taps;
  });
  if (row == end || !supported(row->shape, device) || !supported(row->shape_of_many, device)) return std::nullopt;
  return Tile{s.samples < kManySamples ? row->shape : row->shape_of_many, row->split};
}

Tile choose(const Sizes& sizes, const Device& device) {
  const auto measured = look_up(std::begin(kRows), std::end(kRows) - 1, sizes, device);
  return measured ? *measured : estimate(sizes, device);
}

Tile estimate(const Sizes& sizes, const Device& device) {
  // The family and the split serve batches of any size: the mean of the times per sample, of one sample and of a large batch, decides.
  Sizes one = sizes, many = sizes;
  one.samples = 1;
  many.samples = kLargeBatch;
  Family best = Family::mma;
  int best_split = 1;
  double shortest = HUGE_VAL;
  for (const Family wanted : {Family::mma, Family::wgmma}) {
    for (const int split : kSplits) {
      if (split > steps(one)) continue;
      const double time = fastest(wanted, one, split, device).seconds + fastest(wanted, many, split, device).seconds / kLargeBatch;
      if (time >= shortest) continue;
      shortest = time;
      best = wanted;
      best_split = split;
    }
  }
  return {fastest(best, sizes, best_split, device).shape, best_split};
}

std::int64_t partials_bytes(const Sizes& sizes, const Tile& tile) {
  const int split = effective_split(sizes, tile);
  if (split == 1) return 0;
  const auto [pixels, channels] = size_of(tile.shape);
  return std::min<std::int64_t>(tiles(sizes, tile.shape), kCounters) * split * pixels * channels * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace scm::convolution
