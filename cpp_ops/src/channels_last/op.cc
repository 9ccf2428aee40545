#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

#include "channels_last/product.h"
#include "ops.h"

namespace scm {
namespace {

using channels_last::kBlock;
using channels_last::kChunk;
using channels_last::Params;
using channels_last::Sizes;
using channels_last::Strides;

constexpr std::int64_t kLeastChunk = 128;  // of positions: the smaller, the more often the weights are read

// Weights in the units' order, in memory of their own.
class Packed {
 public:
  Packed() = default;
  Packed(const Input& weight, const Strides& strides, const Sizes& sizes, bool exact) {
    constexpr std::size_t kAlignment = 4096;  // tiles that are read one after the other do not share a page with strangers
    const std::size_t bytes = static_cast<std::size_t>(channels_last::packed_size(sizes, exact)) * sizeof(std::uint16_t);
    if (bytes == 0) return;
    data_.reset(static_cast<std::uint16_t*>(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment)));
    if (!data_) throw std::bad_alloc();
    if (weight.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      channels_last::pack(weight.as<float>(), strides, sizes, exact, data_.get());
    } else {
      channels_last::pack(weight.as<float16>(), strides, sizes, exact, data_.get());
    }
  }

  const std::uint16_t* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(std::uint16_t* data) const { std::free(data); }
  };
  std::unique_ptr<std::uint16_t, Free> data_;
};

template <typename T>
void run_product(Context& run, const T* x, const std::uint16_t* weight, T* y, const Sizes& s, bool exact) {
  if (s.samples * s.height * s.width * s.outputs == 0) return;
  const std::size_t count = static_cast<std::size_t>(s.slots() * s.padded_inputs());
  const Scratch scratch = run.scratch(count * sizeof(std::uint16_t) * (exact ? 2 : 1));
  auto* const high = static_cast<std::uint16_t*>(scratch.data());
  const Params<T> p{x, weight, y, s, high, exact ? high + count : nullptr};
  run.parallel(s.padded_rows(), grain_in_rows(s.row() * s.padded_inputs()), [&](std::int64_t begin, std::int64_t end) { channels_last::split(p, begin, end); });

  const auto multiply = channels_last::units() == channels_last::Units::tiles ? channels_last::multiply_tiles<T> : channels_last::multiply_dots<T>;
  // A piece is 32 outputs of a chunk of positions.
  static const std::int64_t threads = std::thread::hardware_concurrency();  // those of the session are not known here
  const std::int64_t positions = s.positions() - s.pad() * (s.row() + 1), blocks = (s.outputs + kBlock - 1) / kBlock;
  std::int64_t chunk = kChunk;
  while (chunk > kLeastChunk && blocks * ((positions + chunk - 1) / chunk) < threads) chunk /= 2;
  const std::int64_t chunks = (positions + chunk - 1) / chunk;
  run.parallel(blocks * chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t piece = begin; piece < end; ++piece) {
      const std::int64_t position = piece / blocks * chunk;
      multiply(p, piece % blocks, position, std::min(position + chunk, positions));
    }
  });
}

// What the two have in common. A class `Product` derives from it with kName, infer() and
//   kAxis                                               the axis of w that the channels of x are multiplied along
//   static Sizes sizes(const Shape& x, const Shape& w)
//   static Strides strides(const Shape& w)
template <class Product, bool kExact>
class ChannelsLast {
 public:
  static constexpr std::array kInputs{Argument{"x"}, Argument{"w"}};
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array<Inplace, 0> kInplace{};

  explicit ChannelsLast(const Attributes& attributes) {
    const Input w = attributes.constant(1);
    if (!w.data) return;
    Shape x{std::vector<Dim>(4, Dim{0}), true};  // its size does not matter here
    x.dims.back() = w.shape[Product::kAxis];
    packed_ = Packed(w, Product::strides(w.shape), Product::sizes(x, w.shape), kExact);
  }

  template <typename T>
  void cpu(Context& run) const {
    const Input x = run.input(0), w = run.input(1);
    const Shape y = static_cast<const Product*>(this)->infer({x.shape, w.shape})[0];
    const Sizes sizes = Product::sizes(x.shape, w.shape);
    Packed now;  // for weights that are computed in the graph
    if (!packed_.get()) now = Packed(w, Product::strides(w.shape), sizes, kExact);
    run_product(run, x.as<T>(), packed_.get() ? packed_.get() : now.get(), run.output<T>(0, y), sizes, kExact);
  }

 private:
  Packed packed_;
};

template <bool kExact>
struct Conv3x3 : ChannelsLast<Conv3x3<kExact>, kExact> {
  static constexpr const char* kName = "Conv3x3";
  static constexpr std::size_t kAxis = 1;
  using ChannelsLast<Conv3x3, kExact>::ChannelsLast;

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &w = inputs[1];
    check_rank("x", x, 4);
    check_rank("w", w, 4);
    if (!x.ranked || !w.ranked) return {Shape{{}, false}};
    check_dim("w", w, 1, x[3], "the channels of x");
    check_dim("w", w, 2, Dim{3}, "the height of the window");
    check_dim("w", w, 3, Dim{3}, "its width");
    return {Shape{{x[0], x[1], x[2], w[0]}, true}};
  }

  static Sizes sizes(const Shape& x, const Shape& w) { return {x[0].value, x[1].value, x[2].value, x[3].value, w[0].value, 3}; }
  static Strides strides(const Shape& w) { return {1, 9, 9 * w[1].value}; }
};

template <bool kExact>
struct MatMul : ChannelsLast<MatMul<kExact>, kExact> {
  static constexpr const char* kName = "MatMul";
  static constexpr std::size_t kAxis = 0;
  using ChannelsLast<MatMul, kExact>::ChannelsLast;

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &w = inputs[1];
    check_rank_at_least("x", x, 1);
    check_rank("w", w, 2);
    if (!x.ranked || !w.ranked) return {Shape{{}, false}};
    check_dim("w", w, 0, x.back(), "the channels of x");
    Shape y = x;
    y.dims.back() = w[1];
    return {y};
  }

  static Strides strides(const Shape& w) { return {0, w[1].value, 1}; }
  static Sizes sizes(const Shape& x, const Shape& w) { return {1, 1, elements(x, 0, x.rank() - 1), x.back().value, w[1].value, 1}; }
};

template <bool kExact>
void add_products(CustomOps& ops, const OrtApi& api) {
  add<Conv3x3<kExact>, float, Device::cpu>(ops, api);
  add<Conv3x3<kExact>, float16, Device::cpu>(ops, api);
  add<MatMul<kExact>, float, Device::cpu>(ops, api);
  add<MatMul<kExact>, float16, Device::cpu>(ops, api);
}

}  // namespace

bool has_channels_last(bool exact) {
  const channels_last::Units units = channels_last::units();
  return units == channels_last::Units::tiles || (units == channels_last::Units::dots && !exact);
}

void add_channels_last(CustomOps& ops, const OrtApi& api) { add_products<true>(ops, api); }
void add_channels_last_bfloat16(CustomOps& ops, const OrtApi& api) { add_products<false>(ops, api); }

}  // namespace scm
