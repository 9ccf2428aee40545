// Which kernel and which tile a shape gets: a table of measured shapes, and for all others an estimate from the device's rates.
#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>

#include "convolution/shapes.h"

namespace scm::convolution {
namespace {

// Rates of a device. Sources: NVIDIA's architecture white papers, dense float16 with float32 accumulators at boost clocks. On Hopper, mma reaches 62 % of
// wgmma's rate (arXiv 2402.13499, table 9).
struct Rates {
  double mma, wgmma;  // operations a second and multiprocessor
  double memory;      // bytes a second
  int shared_kib;     // of a multiprocessor
};

Rates rates_of(const Device& device) {
  switch (device.capability) {
    case 80:
      return {312e12 / 108, 0, 1.94e12, 164};
    case 86:
      return {71e12 / 82, 0, 0.94e12, 100};
    case 89:
      return {165e12 / 128, 0, 1.0e12, 100};
    case 90:
      return {0.62 * 989e12 / 132, 989e12 / 132, 4.3e12, 228};
    default:  // newer devices
      return {3e12, 0, 1.8e12, device.capability < 120 ? 228 : 100};
  }
}

// What the estimate knows of a shape. The efficiency is the share of a multiprocessor's rate that is left by the copies and the loads of operands with as many
// blocks as fit: a guess, to be replaced by measured rows in tiles.inc.
struct Traits {
  double efficiency;
  int shared_kib, max_blocks;  // shared memory of a block; blocks of a multiprocessor that the registers permit
};

Traits traits_of(Shape shape) {
  switch (shape) {
    case Shape::mma_128x128:
      return {0.78, 64, 2};
    case Shape::mma_128x64:
      return {0.74, 72, 3};
    case Shape::mma_64x64:
      return {0.60, 64, 5};
    case Shape::mma_64x32:
      return {0.40, 48, 4};
    case Shape::wgmma_128x128:
      return {0.70, 128, 1};
    case Shape::wgmma_128x64:
      return {0.62, 96, 2};
    case Shape::wgmma_64x64:
      return {0.50, 64, 3};
  }
  return {};
}

constexpr double kLaunch = 2e-6;               // between two kernels of a CUDA graph
constexpr double kSplit = 1e-6, kPart = 2.5e-7;  // the last block waits for the others, and reads the parts one after another
constexpr double kReachable = 0.85;            // of the memory's bandwidth
constexpr double kCache = 2.5;                 // bandwidth of the cache by that of the memory
// A library's kernel must be expected to be clearly faster: it may give other bits for another number of samples.
constexpr double kPreference = 1.15;
constexpr int kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16};
constexpr std::int64_t kManySamples = 4;

// Bytes of the input, the weights and the output.
double bytes(const Sizes& s) { return 2.0 * static_cast<double>(s.samples * s.pixels() * (s.in + s.out) + packed_size(s)); }

double seconds(const Sizes& s, const Tile& tile, const Device& device) {
  const Rates rates = rates_of(device);
  const Traits traits = traits_of(tile.shape);
  const auto [pixels, channels] = size_of(tile.shape);
  const int split = effective_split(s, tile), resident = std::max(1, std::min(rates.shared_kib / traits.shared_kib, traits.max_blocks));
  const double block = 2.0 * pixels * channels * 64 * std::ceil(static_cast<double>(steps(s)) / split);
  const double blocks = static_cast<double>(tiles(s, tile.shape)) * split, most = std::ceil(blocks / device.multiprocessors);  // on one multiprocessor
  // One block alone does not hide its own latencies.
  const double full = resident == 1 ? 1.0 : std::min(1.0, 0.55 + 0.45 * (most - 1) / (resident - 1));
  const double compute = most * block / ((family(tile.shape) == Family::wgmma ? rates.wgmma : rates.mma) * traits.efficiency * full);
  const double memory = bytes(s) / (rates.memory * kReachable);
  const double parts = split == 1 ? 0.0 : blocks * pixels * channels * 8 / (rates.memory * kCache) + kSplit + split * kPart;
  return kLaunch + std::max(compute, memory) + parts;
}

template <typename Each>
void for_each_shape(const Device& device, const Each& each) {
  for (int i = 0; i < kShapes; ++i) {
    if (supported(static_cast<Shape>(i), device)) each(static_cast<Shape>(i));
  }
}

struct Row {
  int capability;
  std::int64_t pixels, in, out;
  int taps;
  bool own;
  int split;
  Shape shape, shape_of_many;
};

const Row* row_of(const Sizes& s, const Device& device) {
  static constexpr Row rows[] = {
#define SCM_TILE(capability, pixels, in, out, taps, own, split, shape, shape_of_many) \
  {capability, pixels, in, out, taps, own, split, Shape::shape, Shape::shape_of_many},
#include "convolution/tiles.inc"
#undef SCM_TILE
      {},
  };
  const auto* found = std::find_if(std::begin(rows), std::end(rows) - 1, [&](const Row& row) {
    return row.capability == device.capability && row.pixels == s.pixels() && row.in == s.in && row.out == s.out && row.taps == s.taps;
  });
  return found == std::end(rows) - 1 ? nullptr : found;
}

}  // namespace

bool supported(Shape shape, const Device& device) {
#ifdef SCM_OPS_SM90A
  if (family(shape) == Family::wgmma) return device.capability == 90;
#endif
  return family(shape) == Family::mma && device.capability >= 80;
}

double estimated_microseconds(const Sizes& sizes, const Tile& tile, const Device& device) { return 1e6 * seconds(sizes, tile, device); }

double library_microseconds(const Sizes& s, const Device& device) {
  const Rates rates = rates_of(device);
  const double rate = 0.8 * std::max(rates.mma, rates.wgmma), pixels = static_cast<double>(s.samples * s.pixels());
  double compute = HUGE_VAL;
  for (const auto& [m, n, share] : {std::array{256.0, 128.0, 1.0}, std::array{128.0, 128.0, 0.9}, std::array{128.0, 64.0, 0.75}, std::array{64.0, 64.0, 0.55}}) {
    for (const int split : kSplits) {
      if (split > 1 && steps(s) < 8 * split) continue;
      const double blocks = std::ceil(pixels / m) * std::ceil(static_cast<double>(s.out) / n) * split;
      const double block = 2.0 * m * n * static_cast<double>(s.taps * s.in) / split;
      const double parts = split == 1 ? 0.0 : split * pixels * static_cast<double>(s.out) * 8 / (rates.memory * kCache) + kLaunch;
      compute = std::min(compute, std::ceil(blocks / device.multiprocessors) * block / (rate * share) + parts);
    }
  }
  const double epilogue = kLaunch + 6 * pixels * static_cast<double>(s.out) / (rates.memory * kReachable);
  return 1e6 * (kLaunch + std::max(compute, bytes(s) / (rates.memory * kReachable)) + epilogue);
}

Choice choose(const Sizes& sizes, const Device& device) {
  if (const Row* row = row_of(sizes, device)) return {row->own, {sizes.samples < kManySamples ? row->shape : row->shape_of_many, row->split}};
  Sizes one = sizes;
  one.samples = 1;
  Choice choice = {false, {Shape::mma_64x64, 1}};
  double best = HUGE_VAL;
  for_each_shape(device, [&](Shape shape) {
    for (const int split : kSplits) {
      if (split > steps(one)) continue;
      const double time = seconds(one, {shape, split}, device);
      if (time < best) {
        best = time;
        choice.tile = {shape, split};
      }
    }
  });
  choice.own = 1e6 * best <= kPreference * library_microseconds(one, device);
  if (sizes.samples == 1) return choice;
  const Tile alone = choice.tile;
  best = HUGE_VAL;
  for_each_shape(device, [&](Shape shape) {
    if (family(shape) != family(alone.shape)) return;
    const double time = seconds(sizes, {shape, alone.split}, device);
    if (time < best) {
      best = time;
      choice.tile.shape = shape;
    }
  });
  return choice;
}

std::int64_t partials_bytes(const Sizes& sizes, const Tile& tile) {
  const int split = effective_split(sizes, tile);
  if (split == 1) return 0;
  const auto [pixels, channels] = size_of(tile.shape);
  return std::min<std::int64_t>(tiles(sizes, tile.shape), kCounters) * split * pixels * channels * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace scm::convolution
