#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

#include "products/product.h"
#include "ops.h"

namespace scm {
namespace {

using products::kBlock;
using products::kChunk;
using products::Params;
using products::Sizes;
using products::Strides;

constexpr std::int64_t kLeastChunk = 128;  // of positions: the smaller, the more often the weights are read

// Weights in the units' order, in memory of their own.
class Packed {
 public:
  Packed() = default;
  Packed(const Input& weight, const Strides& strides, const Sizes& sizes, bool exact) {
    constexpr std::size_t kAlignment = 4096;  // tiles that are read one after the other do not share a page with strangers
    const std::size_t bytes = static_cast<std::size_t>(products::packed_size(sizes, exact)) * sizeof(std::uint16_t);
    if (bytes == 0) return;
    data_.reset(static_cast<std::uint16_t*>(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment)));
    if (!data_) throw std::bad_alloc();
    if (weight.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      products::pack(weight.as<float>(), strides, sizes, exact, data_.get());
    } else {
      products::pack(weight.as<float16>(), strides, sizes, exact, data_.get());
    }
  }

  const std::uint16_t* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(std::uint16_t* data) const { std::free(data); }
  };
  std::unique_ptr<std::uint16_t, Free> data_;
};

// `p` lacks the memory for bfloat16, which is made here: also for what is left of it, if `exact`.
template <typename T>
void run_product(Context& run, Params<T> p, bool exact) {
  const Sizes& s = p.sizes;
  if (s.samples * s.height * s.width * s.outputs == 0) return;
  const std::size_t count = static_cast<std::size_t>(s.slots() * s.padded_inputs());
  const Scratch scratch = run.scratch(count * sizeof(std::uint16_t) * (exact ? 2 : 1));
  p.high = static_cast<std::uint16_t*>(scratch.data());
  p.low = exact ? p.high + count : nullptr;
  run.parallel(s.padded_rows(), grain_in_rows(s.row() * s.padded_inputs()), [&](std::int64_t begin, std::int64_t end) { products::split(p, begin, end); });

  const auto multiply = products::units() == products::Units::tiles ? products::multiply_tiles<T> : products::multiply_dots<T>;
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

// What they have in common. A class `Product` derives from it with kName, infer() and
//   kAxis                                               the axis of w that the channels of x are multiplied along
//   static Sizes sizes(const Shape& x, const Shape& w)
//   static Strides strides(const Shape& w)
// and, where maps are planes, with kInputs and kPlanes.
template <class Product, bool kExact>
class Base {
 public:
  static constexpr std::array kInputs{Argument{"x"}, Argument{"w"}};
  static constexpr bool kPlanes = false;
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array<Inplace, 0> kInplace{};

  explicit Base(const Attributes& attributes) {
    const Input w = attributes.constant(1);
    if (!w.data) return;
    Shape x{std::vector<Dim>(4, Dim{0}), true};  // its size does not matter here
    x.dims[Product::kPlanes ? 1 : 3] = w.shape[Product::kAxis];
    packed_ = Packed(w, Product::strides(w.shape), Product::sizes(x, w.shape), kExact);
  }

  template <typename T>
  void cpu(Context& run) const {
    const Input x = run.input(0), w = run.input(1);
    Shapes inputs{x.shape, w.shape};
    const T* bias = nullptr;
    if constexpr (Product::kPlanes) {
      const Input b = run.input(2);
      inputs.push_back(b.shape);
      bias = b.as<T>();
    }
    const Shape y = static_cast<const Product*>(this)->infer(inputs)[0];
    const Sizes sizes = Product::sizes(x.shape, w.shape);
    Packed now;  // for weights that are computed in the graph
    if (!packed_.get()) now = Packed(w, Product::strides(w.shape), sizes, kExact);
    const std::uint16_t* const weight = packed_.get() ? packed_.get() : now.get();
    run_product(run, Params<T>{x.as<T>(), weight, bias, run.output<T>(0, y), sizes, Product::kPlanes, nullptr, nullptr}, kExact);
  }

 private:
  Packed packed_;
};

template <bool kExact>
struct Conv3x3 : Base<Conv3x3<kExact>, kExact> {
  static constexpr const char* kName = "Conv3x3";
  static constexpr std::size_t kAxis = 1;
  using Base<Conv3x3, kExact>::Base;

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &w = inputs[1];
    check_rank("x", x, 4);
    check_rank("w", w, 4);
    check_some_channels("x", x);
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
struct MatMul : Base<MatMul<kExact>, kExact> {
  static constexpr const char* kName = "MatMul";
  static constexpr std::size_t kAxis = 0;
  using Base<MatMul, kExact>::Base;

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &w = inputs[1];
    check_rank_at_least("x", x, 1);
    check_rank("w", w, 2);
    check_some_channels("x", x);
    if (!x.ranked || !w.ranked) return {Shape{{}, false}};
    check_dim("w", w, 0, x.back(), "the channels of x");
    Shape y = x;
    y.dims.back() = w[1];
    return {y};
  }

  static Strides strides(const Shape& w) { return {0, w[1].value, 1}; }
  static Sizes sizes(const Shape& x, const Shape& w) { return {1, elements(x, 0, x.rank() - 1), 1, x.back().value, w[1].value, 1}; }
};

template <bool kExact>
struct Conv : Base<Conv<kExact>, kExact> {
  static constexpr const char* kName = "Conv";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"w"}, Argument{"b"}};
  static constexpr bool kPlanes = true;
  static constexpr std::size_t kAxis = 1;

  explicit Conv(const Attributes& attributes) : Base<Conv, kExact>(attributes), pads(attributes.integers("pads")) {
    if (pads != std::vector<std::int64_t>(4, 0) && pads != std::vector<std::int64_t>(4, 1)) throw Error{"pads must be four times 0 or 1"};
  }

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &w = inputs[1], &b = inputs[2];
    check_rank("x", x, 4);
    check_rank("w", w, 4);
    check_rank("b", b, 1);
    if (!x.ranked || !w.ranked) return {Shape{{}, false}};
    if (x[1].value == 0) fail("x", x, "at least 1 channel");
    check_dim("w", w, 1, x[1], "the channels of x");
    const Dim side{2 * pads[0] + 1};
    check_dim("w", w, 2, side, "the height of the window");
    check_dim("w", w, 3, side, "its width");
    if (b.ranked) check_dim("b", b, 0, w[0], "the outputs");
    return {Shape{{x[0], w[0], x[2], x[3]}, true}};
  }

  static Sizes sizes(const Shape& x, const Shape& w) { return {x[0].value, x[2].value, x[3].value, x[1].value, w[0].value, w[2].value}; }
  static Strides strides(const Shape& w) {
    const std::int64_t places = w[2].value * w[3].value;
    return {1, places, places * w[1].value};
  }

  std::vector<std::int64_t> pads;
};

template <template <bool> class Product, bool kExact>
void add_product(CustomOps& ops, const OrtApi& api) {
  add<Product<kExact>, float, Device::cpu>(ops, api);
  add<Product<kExact>, float16, Device::cpu>(ops, api);
}

}  // namespace

bool has_products(bool exact) {
  const products::Units units = products::units();
  return units == products::Units::tiles || (units == products::Units::dots && !exact);
}

template <bool kExact>
void add_channels_last(CustomOps& ops, const OrtApi& api) {
  add_product<Conv3x3, kExact>(ops, api);
  add_product<MatMul, kExact>(ops, api);
}

template <bool kExact>
void add_channels_first(CustomOps& ops, const OrtApi& api) {
  add_product<Conv, kExact>(ops, api);
}

template void add_channels_last<true>(CustomOps&, const OrtApi&);
template void add_channels_last<false>(CustomOps&, const OrtApi&);
template void add_channels_first<true>(CustomOps&, const OrtApi&);
template void add_channels_first<false>(CustomOps&, const OrtApi&);

}  // namespace scm
