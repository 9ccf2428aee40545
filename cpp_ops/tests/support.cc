#include "support.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

namespace scm::testing {

double half_to_double(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

std::uint16_t double_to_half(double x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return sign | 0x7e00;
  const double magnitude = std::fabs(x);
  if (magnitude >= 65520) return sign | 0x7c00;
  int exponent = -13;  // of the lower end of the binade, plus 1
  if (magnitude > 0x1p-14) std::frexp(magnitude, &exponent);
  const double steps = std::nearbyint(std::ldexp(magnitude, 11 - exponent));
  // A carry out of the fraction correctly increments the exponent.
  return static_cast<std::uint16_t>(sign | (static_cast<int>(steps) + (exponent + 13) * 1024));
}

std::int64_t elements(const Sizes& shape) {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

std::string text(const Sizes& shape) { return fake_ort::spec(Tensor{kFloat, shape, {}}).shape; }

namespace {

template <typename T, typename Convert>
Tensor convert(ONNXTensorElementDataType type, const Sizes& shape, const Values& values, const Convert& one) {
  EXPECT_EQ(elements(shape), static_cast<std::int64_t>(values.size()));
  Tensor tensor{type, shape, std::vector<std::byte>(values.size() * sizeof(T))};
  for (std::size_t i = 0; i < values.size(); ++i) {
    const T value = one(values[i]);
    std::memcpy(tensor.bytes.data() + i * sizeof value, &value, sizeof value);
  }
  return tensor;
}

template <typename T, typename Convert>
Values convert(const Tensor& tensor, const Convert& one) {
  Values values(tensor.bytes.size() / sizeof(T));
  for (std::size_t i = 0; i < values.size(); ++i) {
    T value;
    std::memcpy(&value, tensor.bytes.data() + i * sizeof value, sizeof value);
    values[i] = one(value);
  }
  return values;
}

}  // namespace

Tensor tensor(ONNXTensorElementDataType type, const Sizes& shape, const Values& values) {
  if (type == kHalf) return convert<std::uint16_t>(type, shape, values, double_to_half);
  EXPECT_EQ(type, kFloat);
  return convert<float>(type, shape, values, [](double x) { return static_cast<float>(x); });
}

Tensor scalar(float value) { return tensor(kFloat, {}, {value}); }

Tensor integers(const Sizes& shape, const std::vector<std::int64_t>& values) {
  EXPECT_EQ(elements(shape), static_cast<std::int64_t>(values.size()));
  Tensor tensor{kInt64, shape, std::vector<std::byte>(values.size() * sizeof(std::int64_t))};
  if (!values.empty()) std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
  return tensor;
}

Tensor empty_like(ONNXTensorElementDataType type, const Sizes& shape) {
  const std::size_t width = type == kHalf ? 2 : type == kUint8 ? 1 : 4;
  return {type, shape, std::vector<std::byte>(static_cast<std::size_t>(elements(shape)) * width, std::byte{0xa5})};
}

Tensor random(ONNXTensorElementDataType type, const Sizes& shape, double scale, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  Values values(static_cast<std::size_t>(elements(shape)));
  for (double& value : values) value = normal(generator);
  return tensor(type, shape, values);
}

Tensor slice(const Tensor& tensor, std::int64_t begin, std::int64_t end) {
  const std::int64_t stride = static_cast<std::int64_t>(tensor.bytes.size()) / tensor.shape.at(0);
  Tensor part{tensor.type, tensor.shape, {tensor.bytes.begin() + begin * stride, tensor.bytes.begin() + end * stride}};
  part.shape[0] = end - begin;
  return part;
}

Values values(const Tensor& tensor) {
  switch (tensor.type) {
    case kHalf:
      return convert<std::uint16_t>(tensor, half_to_double);
    case kUint8:
      return convert<std::uint8_t>(tensor, [](std::uint8_t x) { return x; });
    default:
      EXPECT_EQ(tensor.type, kFloat);
      return convert<float>(tensor, [](float x) { return x; });
  }
}

std::vector<Sizes> feature_maps(std::int64_t channels) {
  std::vector<Sizes> shapes;
  for (const std::int64_t batch : {0, 1, 3}) {
    for (const Sizes& spatial : {Sizes{}, {1}, {5}, {8, 8}, {77}, {16, 16}, {0}, {5, 0}}) {
      shapes.push_back({batch});
      shapes.back().insert(shapes.back().end(), spatial.begin(), spatial.end());
      shapes.back().push_back(channels);
    }
  }
  return shapes;
}

double mp_silu(double x) { return x / (1 + std::exp(-x)) / 0.596; }

Values mp_silu(const Values& x) {
  Values y(x.size());
  std::transform(x.begin(), x.end(), y.begin(), [](double value) { return mp_silu(value); });
  return y;
}

Values pixel_norm(const Values& x, std::int64_t channels, double eps) {
  Values y(x.size());
  const auto width = static_cast<std::size_t>(channels);
  for (std::size_t row = 0; row < x.size(); row += width) {
    double sum = 0;
    for (std::size_t c = 0; c < width; ++c) sum += x[row + c] * x[row + c];
    for (std::size_t c = 0; c < width; ++c) y[row + c] = x[row + c] / (eps + std::sqrt(sum / static_cast<double>(channels)));
  }
  return y;
}

void expect_close(const Tensor& actual, const Sizes& shape, const Values& expected, double absolute) {
  ASSERT_EQ(text(actual.shape), text(shape));
  const Values got = values(actual);
  ASSERT_EQ(got.size(), expected.size());
  const bool half = actual.type == kHalf;
  const double relative = half ? 0x1p-11 + 2e-6 : 2e-6, spacing = half ? 0x1p-25 : 0;
  int wrong = 0;
  for (std::size_t i = 0; i < got.size() && wrong < 5; ++i) {
    if (std::isnan(got[i]) && std::isnan(expected[i])) continue;
    if (got[i] == expected[i] || std::fabs(got[i] - expected[i]) <= relative * std::fabs(expected[i]) + spacing + absolute) continue;
    if (half && got[i] == half_to_double(double_to_half(expected[i]))) continue;  // infinity
    ADD_FAILURE() << "element " << i << " of " << text(shape) << " is " << got[i] << ", expected " << expected[i];
    ++wrong;
  }
}

void expect_same_bits(const Tensor& actual, const Tensor& expected) {
  EXPECT_EQ(actual.type, expected.type);
  EXPECT_EQ(text(actual.shape), text(expected.shape));
  EXPECT_TRUE(actual.bytes == expected.bytes) << "the bits differ, shape " << text(actual.shape);
}

namespace {

void expect_error(const std::string& error, const std::string& op, const std::vector<std::string>& fragments) {
  EXPECT_EQ(error.rfind("scm::" + op + ": ", 0), 0u) << "'" << error << "'";
  for (const std::string& fragment : fragments) EXPECT_NE(error.find(fragment), std::string::npos) << "'" << error << "' lacks '" << fragment << "'";
}

std::string inference_error(const std::string& op, const std::vector<Tensor>& inputs, const Attributes& attributes) {
  std::vector<Spec> specs;
  for (const Tensor& input : inputs) specs.push_back(spec(input));
  return fake_ort::infer(op, specs, attributes).error;
}

}  // namespace

void expect_rejected(const std::string& op, const std::vector<Tensor>& inputs, const Attributes& attributes, const std::vector<std::string>& fragments) {
  expect_error(fake_ort::run(op, inputs, attributes).error, op, fragments);
  expect_error(inference_error(op, inputs, attributes), op, fragments);
}

void expect_scalar_rejected(const std::string& op, const std::vector<Tensor>& inputs, const Attributes& attributes, const std::vector<std::string>& fragments) {
  expect_error(fake_ort::run(op, inputs, attributes).error, op, fragments);
  EXPECT_EQ(inference_error(op, inputs, attributes), "");
}

std::vector<std::string> inferred(const std::string& op, const std::vector<Spec>& inputs, const Attributes& attributes, std::size_t outputs) {
  const fake_ort::Inference inference = fake_ort::infer(op, inputs, attributes, outputs);
  EXPECT_EQ(inference.error, "");
  std::vector<std::string> shapes;
  for (const Spec& output : inference.outputs) shapes.push_back(output.shape);
  return shapes;
}

void expect_reproducible(const std::string& op, const std::vector<Tensor>& inputs, const Attributes& attributes, std::size_t outputs) {
  Options options = with_outputs(std::vector<bool>(outputs, true));
  const Outcome expected = fake_ort::run(op, inputs, attributes, options);
  ASSERT_EQ(expected.error, "");
  EXPECT_GT(expected.pieces, 1u) << "the work is too small to be divided";
  const auto compare = [&](const char* how) {
    SCOPED_TRACE(how);
    const Outcome outcome = fake_ort::run(op, inputs, attributes, options);
    ASSERT_EQ(outcome.error, "");
    for (std::size_t i = 0; i < outputs; ++i) expect_same_bits(outcome.outputs.at(i), expected.outputs.at(i));
  };
  options.threads = Threads::one_reversed;
  compare("one thread, reversed");
  options.threads = Threads::many;
  compare("many threads");
  std::vector<ONNXTensorElementDataType> types;
  for (const Tensor& input : inputs) types.push_back(input.type);
  for (const auto& [input, output] : fake_ort::may_inplace(*fake_ort::find(op, types))) {
    EXPECT_EQ(output, 0);
    options.inplace_input = input;
    compare("in place");
  }
  options = with_outputs(std::vector<bool>(outputs, true));
  const std::int64_t samples = expected.outputs.at(0).shape.at(0);
  for (std::int64_t sample = 0; sample < samples; ++sample) {
    SCOPED_TRACE(::testing::Message() << "sample " << sample << " alone");
    std::vector<Tensor> alone;
    for (const Tensor& input : inputs) alone.push_back(input.shape.empty() || input.shape[0] != samples ? input : slice(input, sample, sample + 1));
    const Outcome outcome = fake_ort::run(op, alone, attributes, options);
    ASSERT_EQ(outcome.error, "");
    for (std::size_t i = 0; i < outputs; ++i) expect_same_bits(outcome.outputs.at(i), slice(expected.outputs.at(i), sample, sample + 1));
  }
}

}  // namespace scm::testing
