#include "convolution/layer.h"

#include <cstdio>
#include <cstdlib>

#include "common/custom_op.h"
#include "convolution/device.h"

namespace scm {
namespace {

constexpr std::size_t kElement = 2;  // bytes of a float16 or bfloat16

std::size_t packed_bytes(const convolution::Sizes& sizes) { return static_cast<std::size_t>(convolution::packed_size(sizes)) * kElement; }

// Packs weights of either element type.
void pack_weight(const Input& w, const convolution::Sizes& sizes, void* packed, void* stream) {
  if (w.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
    check_launch(convolution::pack(w.as<float16>(), sizes, static_cast<float16*>(packed), stream));
  } else {
    check_launch(convolution::pack(w.as<bfloat16>(), sizes, static_cast<bfloat16*>(packed), stream));
  }
}

// Returns the tile that is to be measured in place of the chosen one, if the environment names one (benchmarks/autotune.py).
std::optional<convolution::Tile> forced_tile(const convolution::Device& device) {
  constexpr const char* kVariable = "SCM_CONVOLUTION_TILE";
  const char* const value = std::getenv(kVariable);
  if (!value) return std::nullopt;
  int shape = 0, split = 0;
  char rest = 0;
  const bool valid = std::sscanf(value, "%d,%d%c", &shape, &split, &rest) == 2 && shape >= 0 && shape < convolution::kShapes && split >= 1 &&
                     split <= convolution::kMaxSplit && convolution::supported(static_cast<convolution::Shape>(shape), device);
  if (!valid) throw Error{std::string(kVariable) + " must be the number of a tile that this device can run and a split, such as 2,4; got " + value};
  return convolution::Tile{static_cast<convolution::Shape>(shape), split};
}

}  // namespace

ConvolutionLayer::ConvolutionLayer(const Attributes& attributes, int taps) : taps_(taps), allocator_(attributes.allocator()) {
  if (!allocator_) return;
  check_launch(convolution::read_device(device_));
  if (!convolution::supported(convolution::Shape::mma_64x64, device_)) {
    const std::string got = std::to_string(device_.capability / 10) + "." + std::to_string(device_.capability % 10);
    throw Error{"the GPU must have compute capability 8.0 or newer, got " + got + ". Without the session entry scm.convolution, cuDNN computes the convolutions"};
  }
  forced_ = forced_tile(device_);
  const Input w = attributes.constant(1);
  if (!w.data) return;
  check(Shape{{}, false}, w.shape);
  const convolution::Sizes weight_sizes{0, 0, 0, w.shape[in_axis()].value, w.shape[out_axis()].value, taps_};  // packing needs no others
  const std::size_t bytes = packed_bytes(weight_sizes);
  if (bytes == 0) return;
  packed_ = allocator_->allocate(bytes);
  void* const stream = convolution::thread_stream();
  pack_weight(w, weight_sizes, packed_.data(), stream);
  check_launch(convolution::synchronize(stream));
}

void ConvolutionLayer::check(const Shape& x, const Shape& w) const {
  if (taps_ == 9) {
    check_rank("x", x, 4);
    check_rank("w", w, 4);
  } else {
    check_rank_at_least("x", x, 1);
    check_rank("w", w, 2);
  }
  check_has_channels("x", x);
  if (x.ranked) check_dim("w", w, in_axis(), x.back(), "the channels of x");
  if (taps_ == 9) {
    check_dim("w", w, 2, Dim{3}, "the kernel height");
    check_dim("w", w, 3, Dim{3}, "the kernel width");
  }
}

Shape ConvolutionLayer::output(const Shape& x, const Shape& w) const {
  if (!x.ranked || !w.ranked) return Shape{{}, false};
  Shape y = x;
  y.dims.back() = w[out_axis()];
  return y;
}

convolution::Sizes ConvolutionLayer::sizes(const Shape& x, const Shape& w) const {
  const std::int64_t in = w[in_axis()].value, out = w[out_axis()].value;
  if (taps_ == 9) return {x[0].value, x[1].value, x[2].value, in, out, taps_};
  const std::size_t rank = x.rank();  // the rows of a product are all axes but the last, of which the first is the batch
  return {rank > 1 ? x[0].value : 1, rank > 1 ? elements(x, 1, rank - 1) : 1, 1, in, out, taps_};
}

convolution::Tile ConvolutionLayer::tile(const convolution::Sizes& s) const {
  if (forced_) return *forced_;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto [known, is_new] = tiles_.try_emplace({s.samples, s.pixels(), s.in, s.out});
  if (is_new) known->second = convolution::choose(s, device_);
  return known->second;
}

std::uint32_t* ConvolutionLayer::counters(void* stream) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const StreamCounters& known : counters_) {
    if (known.stream == stream) return static_cast<std::uint32_t*>(known.memory.data());
  }
  Memory memory = allocator_->allocate(convolution::kCounterBytes);
  check_launch(convolution::clear(memory.data(), convolution::kCounterBytes, stream));
  counters_.push_back({stream, std::move(memory)});
  return static_cast<std::uint32_t*>(counters_.back().memory.data());
}

template <typename T>
convolution::Params<T> ConvolutionLayer::params(const Context& run, const Input& x, const Input& w, Memory& weight) const {
  convolution::Params<T> p{};
  p.x = x.as<T>();
  p.sizes = sizes(x.shape, w.shape);
  if (!packed_.data() && packed_bytes(p.sizes) > 0) {
    weight = run.scratch(*allocator_, packed_bytes(p.sizes));
    pack_weight(w, p.sizes, weight.data(), run.cuda_stream());
  }
  p.weight = static_cast<const T*>(packed_.data() ? packed_.data() : weight.data());
  return p;
}

template <typename T>
void ConvolutionLayer::run(const Context& run, convolution::Params<T> p) const {
  const convolution::Sizes& s = p.sizes;
  if (s.samples * s.pixels() * s.out == 0) return;
  void* const stream = run.cuda_stream();
  const convolution::Tile tile = this->tile(s);
  Memory partials;
  if (const std::int64_t bytes = convolution::partials_bytes(s, tile); bytes > 0) {
    partials = run.scratch(*allocator_, static_cast<std::size_t>(bytes));
    p.partials = static_cast<float*>(partials.data());
    p.counters = counters(stream);
  }
  check_launch(convolution::cuda(p, tile, stream));
}

template convolution::Params<float16> ConvolutionLayer::params(const Context&, const Input&, const Input&, Memory&) const;
template convolution::Params<bfloat16> ConvolutionLayer::params(const Context&, const Input&, const Input&, Memory&) const;
template void ConvolutionLayer::run(const Context&, convolution::Params<float16>) const;
template void ConvolutionLayer::run(const Context&, convolution::Params<bfloat16>) const;

}  // namespace scm
