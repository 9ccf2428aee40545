#include "group_norm/op.h"

#include "common/custom_op.h"
#include "ops.h"

namespace scm {
namespace {

// What the three operators share. `modulated` and `silu` are their differences.
class GroupNormBase {
 public:
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array kInplace{Inplace{0, 0}};

 protected:
  explicit GroupNormBase(const Attributes& attributes) : groups_(attributes.integer("groups")), eps_(attributes.real("eps")), allocator_(attributes.allocator()) {
    if (groups_ < 1) throw Error{"groups must be at least 1, got " + std::to_string(groups_)};
  }

  Shapes infer(const Shapes& inputs, bool modulated) const {
    const Shape& x = inputs[0];
    check_rank_at_least("x", x, 2);
    check_rank("scale", inputs[1], 1);
    check_rank("bias", inputs[2], 1);
    if (!x.ranked) return {x};
    const Dim& channels = x[1];
    if (channels.known() && (channels.value < 1 || channels.value % groups_ != 0)) {
      fail("x", x, "channels, on axis 1, that are a multiple of groups = " + std::to_string(groups_));
    }
    check_dim("scale", inputs[1], 0, channels, "the channels of x");
    check_dim("bias", inputs[2], 0, channels, "the channels of x");
    if (modulated) {
      check_rank("modulation", inputs[3], 2);
      check_dim("modulation", inputs[3], 0, x[0], "the samples of x");
      check_dim("modulation", inputs[3], 1, sum(channels, channels), "twice the channels of x");
    }
    return {x};
  }

  template <typename T>
  group_norm::Params<T> params(Context& run, bool modulated, bool silu) const {
    const Input x = run.input(0), scale = run.input(1), bias = run.input(2);
    Shapes shapes{x.shape, scale.shape, bias.shape};
    const T* modulation = nullptr;
    if (modulated) {
      const Input given = run.input(3);
      shapes.push_back(given.shape);
      modulation = given.as<T>();
    }
    infer(shapes, modulated);
    return {x.as<T>(),         scale.as<float>(),   bias.as<float>(),                          modulation, run.output<T>(0, x.shape),
            x.shape[0].value,  x.shape[1].value,    elements(x.shape, 2, x.shape.rank()),      groups_,    eps_,
            silu};
  }

  template <typename T>
  void run_cpu(Context& run, bool modulated, bool silu) const {
    const auto p = params<T>(run, modulated, silu);
    run_on_cpu(run, p, group_norm::cpu_kernel<T>(), p.samples * p.groups, grain_in_rows(p.group_elements()));
  }

  template <typename T>
  void run_cuda(Context& run, bool modulated, bool silu) const {
    auto p = params<T>(run, modulated, silu);
    if (p.samples * p.pixels == 0) return;
    Memory partials;
    if (const std::int64_t floats = group_norm::partial_floats(p); floats > 0) {
      partials = run.scratch(*allocator_, static_cast<std::size_t>(floats) * sizeof(float));
      p.partials = static_cast<float*>(partials.data());
    }
    check_launch(group_norm::cuda(p, run.cuda_stream()));
  }

 private:
  std::int64_t groups_;
  float eps_;
  std::unique_ptr<Allocator> allocator_;
};

template <bool kSiLU>
struct GroupNorm : GroupNormBase {
  static constexpr const char* kName = kSiLU ? "GroupNormSiLU" : "GroupNorm";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"scale", Type::float32}, Argument{"bias", Type::float32}};

  explicit GroupNorm(const Attributes& attributes) : GroupNormBase(attributes) {}

  Shapes infer(const Shapes& inputs) const { return GroupNormBase::infer(inputs, false); }

  template <typename T>
  void cpu(Context& run) const {
    run_cpu<T>(run, false, kSiLU);
  }

  template <typename T>
  void cuda(Context& run) const {
    run_cuda<T>(run, false, kSiLU);
  }
};

struct GroupNormModulateSiLU : GroupNormBase {
  static constexpr const char* kName = "GroupNormModulateSiLU";
  static constexpr std::array kInputs{Argument{"x"}, Argument{"scale", Type::float32}, Argument{"bias", Type::float32}, Argument{"modulation"}};

  explicit GroupNormModulateSiLU(const Attributes& attributes) : GroupNormBase(attributes) {}

  Shapes infer(const Shapes& inputs) const { return GroupNormBase::infer(inputs, true); }

  template <typename T>
  void cpu(Context& run) const {
    run_cpu<T>(run, true, true);
  }

  template <typename T>
  void cuda(Context& run) const {
    run_cuda<T>(run, true, true);
  }
};

}  // namespace

void add_group_norm(CustomOps& ops, const OrtApi& api) {
  add_all<GroupNorm<false>, float, float16, bfloat16>(ops, api);
  add_all<GroupNorm<true>, float, float16, bfloat16>(ops, api);
  add_all<GroupNormModulateSiLU, float, float16, bfloat16>(ops, api);
}

}  // namespace scm
