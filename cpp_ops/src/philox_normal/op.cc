#include "philox_normal/op.h"

#include "ops.h"

namespace scm {
namespace {

struct PhiloxNormal {
  static constexpr const char* kName = "PhiloxNormal";
  static constexpr std::array kInputs{Argument{"seeds", Type::int64}, Argument{"draw", Type::int64}, Argument{"scale", Type::float32}};
  static constexpr std::array kOutputs{Argument{"noise", Type::float32}};
  static constexpr std::array<Inplace, 0> kInplace{};

  std::vector<std::int64_t> shape;

  explicit PhiloxNormal(const Attributes& attributes) : shape(attributes.integers("shape")) {
    for (const std::int64_t size : shape) {
      if (size < 0) throw Error{"all values of shape must be at least 0, got " + std::to_string(size)};
    }
  }

  Shapes infer(const Shapes& inputs) const {
    check_rank("seeds", inputs[0], 1);
    check_rank("draw", inputs[1], 0);
    check_rank("scale", inputs[2], 0);
    if (!inputs[0].ranked) return {inputs[0]};
    Shape noise = inputs[0];
    for (const std::int64_t size : shape) noise.dims.push_back({size});
    return {noise};
  }

  template <typename T>
  philox_normal::Params<T> params(Context& run) const {
    const Input seeds = run.input(0), draw = run.input(1), scale = run.input(2);
    const Shape noise = infer({seeds.shape, draw.shape, scale.shape})[0];
    T* data = run.output<T>(0, noise);
    return {seeds.as<std::int64_t>(), draw.as<std::int64_t>(), scale.as<float>(), data, noise[0].value, elements(noise, 1, noise.rank())};
  }

  template <typename T>
  void cpu(Context& run) const {
    const auto p = params<T>(run);
    if (*p.draw < 0 || *p.draw > 0xffffffff) throw Error{"draw must be in [0, 2^32), got " + std::to_string(*p.draw)};
    run_on_cpu(run, p, philox_normal::cpu_kernel<T>(), p.samples * p.size, kGrain / 8);
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.samples * p.size > 0) check_launch(philox_normal::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_philox_normal(CustomOps& ops, const OrtApi& api) { add_all<PhiloxNormal, float>(ops, api); }

}  // namespace scm
