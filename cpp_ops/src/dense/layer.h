// The operators Conv3x3, MatMul and Conv without their arithmetic: arguments, checks and sizes.
#pragma once

#include "common/custom_op.h"
#include "dense/dense.h"

namespace scm::dense {

// y = conv(x, w), 3x3, of channels-last maps.
struct Conv3x3 {
  static constexpr const char* kName = "Conv3x3";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"w"}};
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array<Inplace, 0> kInplace{};
  static constexpr bool kChannelsFirst = false;
  static constexpr std::size_t kInChannelsAxis = 1;  // of w

  explicit Conv3x3(const Attributes&) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &w = inputs[1];
    check_rank("x", x, 4);
    check_rank("w", w, 4);
    check_has_channels("x", x);
    if (!x.ranked || !w.ranked) return {Shape{{}, false}};
    check_dim("w", w, 1, x[3], "the channels of x");
    check_dim("w", w, 2, Dim{3}, "the kernel height");
    check_dim("w", w, 3, Dim{3}, "the kernel width");
    return {Shape{{x[0], x[1], x[2], w[0]}, true}};
  }

  static Sizes sizes(const Shape& x, const Shape& w) { return {x[0].value, x[1].value, x[2].value, x[3].value, w[0].value, 3}; }
  static Strides strides(const Shape& w) { return {1, 9, 9 * w[1].value}; }
};

// y = x w, over the last axis of x.
struct MatMul {
  static constexpr const char* kName = "MatMul";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"w"}};
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array<Inplace, 0> kInplace{};
  static constexpr bool kChannelsFirst = false;
  static constexpr std::size_t kInChannelsAxis = 0;

  explicit MatMul(const Attributes&) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &w = inputs[1];
    check_rank_at_least("x", x, 1);
    check_rank("w", w, 2);
    check_has_channels("x", x);
    if (!x.ranked || !w.ranked) return {Shape{{}, false}};
    check_dim("w", w, 0, x.back(), "the channels of x");
    Shape y = x;
    y.dims.back() = w[1];
    return {y};
  }

  static Sizes sizes(const Shape& x, const Shape& w) { return {1, elements(x, 0, x.rank() - 1), 1, x.back().value, w[1].value, 1}; }
  static Strides strides(const Shape& w) { return {0, w[1].value, 1}; }
};

// y = conv(x, w) + b, 3x3 or 1x1, of channels-first maps.
struct Conv {
  static constexpr const char* kName = "Conv";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"w"}, Argument{"b"}};
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array<Inplace, 0> kInplace{};
  static constexpr bool kChannelsFirst = true;
  static constexpr std::size_t kInChannelsAxis = 1;

  std::vector<std::int64_t> pads;

  explicit Conv(const Attributes& attributes) : pads(attributes.integers("pads")) {
    if (pads == std::vector<std::int64_t>(4, 0) || pads == std::vector<std::int64_t>(4, 1)) return;
    Shape got;
    for (const std::int64_t pad : pads) got.dims.push_back({pad});
    throw Error{"pads must be [0, 0, 0, 0] or [1, 1, 1, 1], got " + to_string(got)};
  }

  Shapes infer(const Shapes& inputs) const {
    const Shape &x = inputs[0], &w = inputs[1], &b = inputs[2];
    check_rank("x", x, 4);
    check_rank("w", w, 4);
    check_rank("b", b, 1);
    if (!x.ranked || !w.ranked) return {Shape{{}, false}};
    if (x[1].value == 0) fail("x", x, "at least 1 channel");
    check_dim("w", w, 1, x[1], "the channels of x");
    const Dim kernel_size{2 * pads[0] + 1};
    check_dim("w", w, 2, kernel_size, "the kernel height");
    check_dim("w", w, 3, kernel_size, "the kernel width");
    if (b.ranked) check_dim("b", b, 0, w[0], "the outputs");
    return {Shape{{x[0], w[0], x[2], x[3]}, true}};
  }

  static Sizes sizes(const Shape& x, const Shape& w) { return {x[0].value, x[2].value, x[3].value, x[1].value, w[0].value, w[2].value}; }
  static Strides strides(const Shape& w) {
    const std::int64_t taps = w[2].value * w[3].value;
    return {1, taps, taps * w[1].value};
  }
};

}  // namespace scm::dense
