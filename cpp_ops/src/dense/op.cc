#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "dense/layer.h"
#include "ops.h"
#include "product/run.h"

namespace scm {
namespace {

using dense::kBlock;
using dense::kChunk;
using dense::Params;
using dense::Sizes;
using dense::Strides;

constexpr std::int64_t kMinChunk = 128;  // pixels; smaller chunks read the weights more often

// Owns packed weights.
class Packed {
 public:
  Packed() = default;
  Packed(const Input& weight, const Strides& strides, const Sizes& sizes, bool split_bf16) {
    constexpr std::size_t kAlignment = 4096;  // a page: consecutive tiles share no page with other data
    const std::size_t bytes = static_cast<std::size_t>(dense::packed_size(sizes, split_bf16)) * sizeof(std::uint16_t);
    if (bytes == 0) return;
    data_.reset(static_cast<std::uint16_t*>(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment)));
    if (!data_) throw std::bad_alloc();
    if (weight.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      dense::pack(weight.as<float>(), strides, sizes, split_bf16, data_.get());
    } else {
      dense::pack(weight.as<float16>(), strides, sizes, split_bf16, data_.get());
    }
  }

  const std::uint16_t* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(std::uint16_t* data) const { std::free(data); }
  };
  std::unique_ptr<std::uint16_t, Free> data_;
};

// Runs the operator. Allocates the bfloat16 buffers `p.high` and, with split_bf16, `p.low`.
template <typename T>
void run_dense(Context& run, Params<T> p, bool split_bf16) {
  const Sizes& s = p.sizes;
  if (s.samples * s.height * s.width * s.out_channels == 0) return;
  const std::size_t count = static_cast<std::size_t>(s.padded_pixels() * s.padded_in_channels());
  const Scratch scratch = run.scratch(count * sizeof(std::uint16_t) * (split_bf16 ? 2 : 1));
  p.high = static_cast<std::uint16_t*>(scratch.data());
  p.low = split_bf16 ? p.high + count : nullptr;
  const std::int64_t grain = grain_in_rows(s.row_stride() * s.padded_in_channels());
  run.parallel(s.padded_rows(), grain, [&](std::int64_t begin, std::int64_t end) { dense::split(p, begin, end); });

  const auto multiply = dense::isa() == dense::Isa::amx ? dense::multiply_amx<T> : dense::multiply_avx512_bf16<T>;
  // A piece of work is 32 output channels of a chunk of pixels.
  const std::int64_t threads = hardware_threads();
  const std::int64_t pixels = s.output_pixels() - s.pad() * (s.row_stride() + 1), blocks = (s.out_channels + kBlock - 1) / kBlock;
  std::int64_t chunk = kChunk;
  while (chunk > kMinChunk && blocks * ((pixels + chunk - 1) / chunk) < threads) chunk /= 2;
  const std::int64_t chunks = (pixels + chunk - 1) / chunk;
  run.parallel(blocks * chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t piece = begin; piece < end; ++piece) {
      const std::int64_t pixel = piece / blocks * chunk;
      multiply(p, piece % blocks, pixel, std::min(pixel + chunk, pixels));
    }
  });
}

// Returns whether the product in float32 is faster than three in bfloat16: a 1x1 convolution of few channels takes less time than the conversion and the
// transposes of its map. The limit is measured (benchmarks/NOTES.md, entry 44).
template <class Layer>
bool is_faster_in_float32(const Sizes& s) {
  return Layer::kChannelsFirst && s.kernel_size == 1 && s.in_channels * s.out_channels <= 43 * (s.in_channels + s.out_channels);
}

// The operator `Layer` (dense/layer.h) with bfloat16 kernels.
template <class Layer, bool kSplitBf16>
class DenseOp : public Layer {
 public:
  explicit DenseOp(const Attributes& attributes) : Layer(attributes) {
    const Input w = attributes.constant(1);
    if (!w.data) return;
    Shape x{std::vector<Dim>(4, Dim{0}), true};  // packing depends only on the number of channels
    x.dims[Layer::kChannelsFirst ? 1 : 3] = w.shape[Layer::kInChannelsAxis];
    const Sizes sizes = Layer::sizes(x, w.shape);
    if (kSplitBf16 && is_faster_in_float32<Layer>(sizes)) return;
    packed_ = Packed(w, Layer::strides(w.shape), sizes, kSplitBf16);
  }

  template <typename T>
  void cpu(Context& run) const {
    const Input x = run.input(0), w = run.input(1);
    Shapes inputs{x.shape, w.shape};
    const T* bias = nullptr;
    if constexpr (Layer::kChannelsFirst) {
      const Input b = run.input(2);
      inputs.push_back(b.shape);
      bias = b.as<T>();
    }
    const Shape y = this->infer(inputs)[0];
    const Sizes sizes = Layer::sizes(x.shape, w.shape);
    if (kSplitBf16 && is_faster_in_float32<Layer>(sizes)) {
      product::run(run, product::conv1x1(x.as<T>(), w.as<T>(), bias, run.output<T>(0, y), sizes.samples, sizes.in_channels, sizes.out_channels,
                                         sizes.height * sizes.width));
      return;
    }
    Packed packed_now;  // if the weights are not constant
    if (!packed_.get()) packed_now = Packed(w, Layer::strides(w.shape), sizes, kSplitBf16);
    const std::uint16_t* const weight = packed_.get() ? packed_.get() : packed_now.get();
    run_dense(run, Params<T>{x.as<T>(), weight, bias, run.output<T>(0, y), sizes, Layer::kChannelsFirst, nullptr, nullptr}, kSplitBf16);
  }

 private:
  Packed packed_;
};

template <class Layer, bool kSplitBf16>
void add_dense(CustomOps& ops, const OrtApi& api) {
  add<DenseOp<Layer, kSplitBf16>, float, Device::cpu>(ops, api, kCpuProviders);
  add<DenseOp<Layer, kSplitBf16>, float16, Device::cpu>(ops, api, kCpuProviders);
}

}  // namespace

bool has_dense_kernels(bool split_bf16) {
  const dense::Isa isa = dense::isa();
  return isa == dense::Isa::amx || (isa == dense::Isa::avx512_bf16 && !split_bf16);
}

template <bool kSplitBf16>
void add_channels_last(CustomOps& ops, const OrtApi& api) {
  add_dense<dense::Conv3x3, kSplitBf16>(ops, api);
  add_dense<dense::MatMul, kSplitBf16>(ops, api);
}

template <bool kSplitBf16>
void add_channels_first(CustomOps& ops, const OrtApi& api) {
  add_dense<dense::Conv, kSplitBf16>(ops, api);
}

template void add_channels_last<true>(CustomOps&, const OrtApi&);
template void add_channels_last<false>(CustomOps&, const OrtApi&);
template void add_channels_first<true>(CustomOps&, const OrtApi&);
template void add_channels_first<false>(CustomOps&, const OrtApi&);

}  // namespace scm
