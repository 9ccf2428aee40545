#include "cosine_attention/op.h"

#include <new>

#include "ops.h"

namespace scm {
namespace {

constexpr std::int64_t kMaxHeadSize = 4096;  // scores are at most 64: exponentials, their sums, and products with values do not overflow float

struct CosineAttention {
  static constexpr const char* kName = "CosineAttention";
  static constexpr std::array kInputs{Argument{"qkv"}};
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array<Inplace, 0> kInplace{};

  std::int64_t heads;
  float eps;

  explicit CosineAttention(const Attributes& attributes) : heads(attributes.integer("heads")), eps(attributes.real("eps")) {
    if (heads < 1 || heads > 0x7fffffff) throw Error{"heads must be in [1, 2^31), got " + std::to_string(heads)};
  }

  Shapes infer(const Shapes& inputs) const {
    const Shape& qkv = inputs[0];
    check_rank("qkv", qkv, 3);
    check_has_channels("qkv", qkv);
    if (!qkv.ranked) return {qkv};
    Shape y = qkv;
    if (qkv[2].known()) {
      if (qkv[2].value % (3 * heads) != 0) fail("qkv", qkv, "channels that are a multiple of 3 * heads = " + std::to_string(3 * heads));
      if (qkv[2].value / (3 * heads) > kMaxHeadSize) fail("qkv", qkv, "at most " + std::to_string(kMaxHeadSize) + " channels per head");
      y.dims[2] = {qkv[2].value / 3};
    } else {
      y.dims[2] = {};
    }
    return {y};
  }

  template <typename T>
  cosine_attention::Params<T> params(Context& run) const {
    const Input qkv = run.input(0);
    T* y = run.output<T>(0, infer({qkv.shape})[0]);
    return {qkv.as<T>(), y, qkv.shape[0].value, qkv.shape[1].value, heads, qkv.shape[2].value / (3 * heads), eps, nullptr};
  }

  template <typename T>
  void cpu(Context& run) const {
    auto p = params<T>(run);
    bool out_of_memory = false;
    p.out_of_memory = &out_of_memory;
    const std::int64_t blocks = cosine_attention::query_blocks(p.length);
    run_on_cpu(run, p, cosine_attention::cpu_kernel<T>(), p.samples * p.heads * blocks, blocks < 8 ? blocks : blocks / 2);  // blocks of one head share the norms of its keys
    if (out_of_memory) throw std::bad_alloc();
  }

  template <typename T>
  void cuda(Context& run) const {
    const auto p = params<T>(run);
    if (p.samples * p.length > 0) check_launch(cosine_attention::cuda(p, run.cuda_stream()));
  }
};

}  // namespace

void add_cosine_attention(CustomOps& ops, const OrtApi& api) { add_all<CosineAttention, float, float16, bfloat16>(ops, api); }

}  // namespace scm
