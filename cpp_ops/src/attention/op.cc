#include "attention/op.h"

#include <new>

#include "ops.h"

namespace scm {
namespace {

constexpr std::int64_t kMaxSize = 256;  // channels per head
constexpr std::int64_t kProductsPerPiece = std::int64_t{1} << 20;  // multiplications that are worth a thread's wake-up

struct AttentionBase {
  static constexpr std::array kOutputs{Argument{"y"}};
  static constexpr std::array<Inplace, 0> kInplace{};

  float scale;

  explicit AttentionBase(const Attributes& attributes) : scale(attributes.real("scale")) {}

  Shapes infer(const Shapes& inputs) const {
    const Shape &q = inputs[0], &k = inputs[1], &v = inputs[2];
    constexpr const char* kNames[] = {"q", "k", "v"};
    for (std::size_t i = 0; i < 3; ++i) {
      check_rank(kNames[i], inputs[i], 4);
      check_has_channels(kNames[i], inputs[i]);
      if (inputs[i].ranked && inputs[i][2].value == 0) fail(kNames[i], inputs[i], "at least 1 head");
      if (inputs[i].ranked && inputs[i][3].value > kMaxSize) fail(kNames[i], inputs[i], "at most " + std::to_string(kMaxSize) + " channels per head");
    }
    if (!q.ranked || !k.ranked || !v.ranked) return {Shape{{}, false}};
    check_dim("k", k, 0, q[0], "the samples of q");
    check_dim("k", k, 3, q[3], "the channels of q");
    check_dim("v", v, 0, q[0], "the samples of q");
    check_dim("v", v, 1, k[1], "the keys of k");
    check_dim("v", v, 2, k[2], "the heads of k");
    if (q[2].known() && k[2].known() && q[2].value % k[2].value != 0) {
      fail("k", k, "a number of heads that divides the " + std::to_string(q[2].value) + " heads of q");
    }
    if (inputs.size() > 3 && inputs[3].ranked) check_mask(inputs[3], q, k);
    return {Shape{{q[0], q[1], q[2], v[3]}}};
  }

  template <typename T>
  attention::Params<T> params(Context& run, std::size_t count) const {
    std::vector<Input> inputs;
    Shapes shapes;
    for (std::size_t i = 0; i < count; ++i) {
      inputs.push_back(run.input(i));
      shapes.push_back(inputs[i].shape);
    }
    attention::Params<T> p{};
    p.y = run.output<T>(0, infer(shapes)[0]);
    p.q = inputs[0].as<T>();
    p.k = inputs[1].as<T>();
    p.v = inputs[2].as<T>();
    p.samples = shapes[0][0].value;
    p.queries = shapes[0][1].value;
    p.keys = shapes[1][1].value;
    p.heads = shapes[0][2].value;
    p.key_heads = shapes[1][2].value;
    p.size = shapes[0][3].value;
    p.value_size = shapes[2][3].value;
    p.scale = scale;
    if (count > 3) {
      p.mask = inputs[3].as<T>();
      std::int64_t stride = p.keys;
      for (std::size_t axis = 3; axis-- > 0;) {
        if (shapes[3][axis].value > 1) p.mask_strides[axis] = stride;
        stride *= shapes[3][axis].value;
      }
    }
    return p;
  }

  template <typename T>
  static void run_cpu(Context& run, attention::Params<T> p) {
    bool out_of_memory = false;
    p.out_of_memory = &out_of_memory;
    const std::int64_t products = attention::kQueries * (p.keys + 1) * (p.size + p.value_size);  // of one unit
    const std::int64_t grain = products < kProductsPerPiece ? kProductsPerPiece / products : 1;
    run_on_cpu(run, p, attention::cpu_kernel<T>(), p.samples * p.heads * attention::query_blocks(p.queries), grain);
    if (out_of_memory) throw std::bad_alloc();
  }

  template <typename T>
  static void run_cuda(Context& run, const attention::Params<T>& p) {
    if (p.samples * p.queries > 0) check_launch(attention::cuda(p, run.cuda_stream()));
  }

 private:
  static void check_mask(const Shape& mask, const Shape& q, const Shape& k) {
    check_rank("mask", mask, 4);
    constexpr const char* kAxes[] = {"the samples of q, or 1", "the heads of q, or 1", "the queries, or 1"};
    const Dim* const sizes[] = {&q[0], &q[2], &q[1]};
    for (std::size_t axis = 0; axis < 3; ++axis) {
      if (mask[axis].value != 1) check_dim("mask", mask, axis, *sizes[axis], kAxes[axis]);
    }
    check_dim("mask", mask, 3, k[1], "the keys");
  }
};

struct Attention : AttentionBase {
  static constexpr const char* kName = "Attention";
  static constexpr std::array kInputs{Argument{"q"}, Argument{"k"}, Argument{"v"}};

  using AttentionBase::AttentionBase;

  template <typename T>
  void cpu(Context& run) const {
    run_cpu(run, params<T>(run, kInputs.size()));
  }

  template <typename T>
  void cuda(Context& run) const {
    run_cuda(run, params<T>(run, kInputs.size()));
  }
};

struct MaskedAttention : AttentionBase {
  static constexpr const char* kName = "MaskedAttention";
  static constexpr std::array kInputs{Argument{"q"}, Argument{"k"}, Argument{"v"}, Argument{"mask"}};

  using AttentionBase::AttentionBase;

  template <typename T>
  void cpu(Context& run) const {
    run_cpu(run, params<T>(run, kInputs.size()));
  }

  template <typename T>
  void cuda(Context& run) const {
    run_cuda(run, params<T>(run, kInputs.size()));
  }
};

}  // namespace

void add_attention(CustomOps& ops, const OrtApi& api) {
  add_all<Attention, float, float16, bfloat16>(ops, api);
  add_all<MaskedAttention, float, float16, bfloat16>(ops, api);
}

}  // namespace scm
