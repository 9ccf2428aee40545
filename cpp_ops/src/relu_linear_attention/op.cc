#include "relu_linear_attention/op.h"

#include <new>

#include "ops.h"

namespace scm {
namespace {

constexpr std::int64_t kMaxHeadSize = 256;  // the state of a head, a matrix of this size in float32, fits into the L2 cache

struct ReLULinearAttention {
  static constexpr const char* kName = "ReLULinearAttention";
  static constexpr std::array kInputs{Argument{"q"}, Argument{"k"}, Argument{"v"}};
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array<Inplace, 0> kInplace{};

  std::int64_t heads;
  float eps;

  explicit ReLULinearAttention(const Attributes& attributes) : heads(attributes.integer("heads")), eps(attributes.real("eps")) {
    if (heads < 1 || heads > 0x7fffffff) throw Error{"heads must be in [1, 2^31), got " + std::to_string(heads)};
  }

  Shapes infer(const Shapes& inputs) const {
    const Shape &q = inputs[0], &k = inputs[1], &v = inputs[2];
    check_rank("q", q, 3);
    check_has_channels("q", q);
    check_same("q", q, "k", k);
    check_same("q", q, "v", v);
    if (q.ranked && q[2].known()) {
      if (q[2].value % heads != 0) fail("q", q, "channels that are a multiple of heads = " + std::to_string(heads));
      if (q[2].value / heads > kMaxHeadSize) fail("q", q, "at most " + std::to_string(kMaxHeadSize) + " channels per head");
    }
    return {q};
  }

  template <typename T>
  relu_linear_attention::Params<T> params(Context& run) const {
    const Input q = run.input(0), k = run.input(1), v = run.input(2);
    const Shape y = infer({q.shape, k.shape, v.shape})[0];
    return {q.as<T>(), k.as<T>(), v.as<T>(), run.output<T>(0, y), y[0].value, y[1].value, heads, y[2].value / heads, eps, nullptr};
  }

  template <typename T>
  void cpu(Context& run) const {
    auto p = params<T>(run);
    if (p.length == 0) return;
    bool out_of_memory = false;
    p.out_of_memory = &out_of_memory;
    run_on_cpu(run, p, relu_linear_attention::cpu_kernel<T>(), p.samples * p.heads, grain_in_rows(p.length * p.head_size));
    if (out_of_memory) throw std::bad_alloc();
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.samples * p.length > 0) check_launch(relu_linear_attention::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_relu_linear_attention(CustomOps& ops, const OrtApi& api) { add_all<ReLULinearAttention, float, float16, bfloat16>(ops, api); }

}  // namespace scm
