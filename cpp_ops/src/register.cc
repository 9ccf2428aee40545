// RegisterCustomOps, the library's only exported function: adds the operators to a session's options.
#include <array>
#include <cstdio>
#include <string>

#include "common/cpu_level.h"
#include "ops.h"

#if defined(_WIN32)
#define SCM_OPS_EXPORT __declspec(dllexport)
#else
#define SCM_OPS_EXPORT __attribute__((visibility("default")))
#endif

namespace scm {
namespace {

constexpr void (*kOps[])(CustomOps&, const OrtApi&) = {
    add_pixel_norm,
    add_mp_silu,
    add_mp_sum,
    add_mp_cat,
    add_modulate_silu,
    add_norm_modulate_silu,
    add_cosine_attention,
    add_relu_linear_attention,
    add_depthwise_glu,
    add_geglu,
    add_attention,
    add_consistency_step,
    add_philox_normal,
    add_to_image,
    add_group_norm,
    add_layer_norm,
};

// A custom operator domain and its operators. ONNX Runtime keeps pointers to them, and keeps this library loaded, as long as a session exists.
class Domain {
 public:
  template <typename Add>
  Domain(const OrtApi& api, const char* name, const Add& add) : Domain(api) {  // delegation: the destructor runs even if this body throws
    add(ops_, api);
    check(api, api.CreateCustomOpDomain(name, &domain_));
    for (const auto& op : ops_) check(api, api.CustomOpDomain_Add(domain_, op.get()));
  }
  Domain(const Domain&) = delete;
  Domain& operator=(const Domain&) = delete;
  ~Domain() { api_.ReleaseCustomOpDomain(domain_); }

  OrtCustomOpDomain* get() const { return domain_; }

 private:
  explicit Domain(const OrtApi& api) : api_(api) {}

  const OrtApi& api_;
  CustomOps ops_;
  OrtCustomOpDomain* domain_ = nullptr;
};

void add_scm(CustomOps& ops, const OrtApi& api) {
  for (const auto add : kOps) add(ops, api);
}

// Returns an entry of the session's configuration, or `otherwise` if it is not set.
std::string entry(const OrtApi& api, const OrtSessionOptions* options, const char* key, const char* otherwise) {
  int is_set = 0;
  check(api, api.HasSessionConfigEntry(options, key, &is_set));
  if (!is_set) return otherwise;
  std::array<char, 16> value{};
  std::size_t size = value.size();
  check(api, api.GetSessionConfigEntry(options, key, value.data(), &size));
  return value.data();
}

// The precision that a session on the CPU requests, in the terms of torch.set_float32_matmul_precision. With "highest", the ONNX function bodies run.
constexpr const char* kPrecisionKey = "scm.float32_matmul_precision";

#ifdef SCM_OPS_BFLOAT16
template <bool kSplitBf16>
struct Bf16Domains {
  explicit Bf16Domains(const OrtApi& api)
      : channels_last(api, "scm.channels_last", add_channels_last<kSplitBf16>), channels_first(api, "scm.channels_first", add_channels_first<kSplitBf16>) {}

  Domain channels_last, channels_first;
};

template <bool kSplitBf16>
void add_bf16_domains(const OrtApi& api, OrtSessionOptions* options) {
  static const Bf16Domains<kSplitBf16> domains(api);
  for (const Domain* domain : {&domains.channels_last, &domains.channels_first}) check(api, api.AddCustomOpDomain(options, domain->get()));
}

bool register_bf16_ops(const OrtApi& api, OrtSessionOptions* options, bool split) {
  if (!has_dense_kernels(split)) return false;
  (split ? add_bf16_domains<true> : add_bf16_domains<false>)(api, options);
  return true;
}
#else
bool register_bf16_ops(const OrtApi&, OrtSessionOptions*, bool) { return false; }
#endif

struct Float32Domains {
  explicit Float32Domains(const OrtApi& api)
      : channels_last(api, "scm.channels_last", add_float32_channels_last),
        channels_first(api, "scm.channels_first", add_float32_channels_first),
        fused(api, "scm.fused", add_float32_fused) {}

  Domain channels_last, channels_first, fused;
};

void register_dense_ops(const OrtApi& api, OrtSessionOptions* options) {
  const std::string precision = entry(api, options, kPrecisionKey, "highest");
  if (precision != "highest" && precision != "high" && precision != "medium") {
    throw Error{std::string(kPrecisionKey) + " must be highest, high or medium, got " + precision};
  }
  if (precision == "highest" || register_bf16_ops(api, options, precision == "high") || !has_float32_kernels()) return;
  static const Float32Domains domains(api);
  for (const Domain* domain : {&domains.channels_last, &domains.channels_first, &domains.fused}) check(api, api.AddCustomOpDomain(options, domain->get()));
}

#ifdef SCM_OPS_CUDA
// What computes the convolutions of a session on CUDA: "own", these kernels; "cudnn", the ONNX function bodies. The kernels have no other devices or element
// types, so a session without the entry, which may run anywhere, must not have them.
constexpr const char* kConvolutionKey = "scm.convolution";

// Returns whether the kernels were registered.
bool register_convolutions(const OrtApi& api, OrtSessionOptions* options) {
  const std::string convolution = entry(api, options, kConvolutionKey, "cudnn");
  if (convolution != "own" && convolution != "cudnn") throw Error{std::string(kConvolutionKey) + " must be own or cudnn, got " + convolution};
  if (convolution == "cudnn") return false;
  static const Domain channels_last(api, "scm.channels_last", add_convolution), fused(api, "scm.fused", add_fused);
  for (const Domain* domain : {&channels_last, &fused}) check(api, api.AddCustomOpDomain(options, domain->get()));
  return true;
}
#endif

}  // namespace
}  // namespace scm

extern "C" SCM_OPS_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(SCM_OPS_ORT_API);
  if (!api) {
    const OrtApi* oldest = base->GetApi(1);  // every release supports API 1, which has CreateStatus
    char reason[128];
    std::snprintf(reason, sizeof reason, "scm_ops needs ONNX Runtime 1.%d or newer, got %s", SCM_OPS_ORT_API, base->GetVersionString());
    return oldest->CreateStatus(ORT_FAIL, reason);
  }
  return scm::guarded(*api, "RegisterCustomOps", [&] {
    scm::check_max_isa();
    static const scm::Domain domain(*api, "scm", scm::add_scm);
    scm::check(*api, api->AddCustomOpDomain(options, domain.get()));
#ifdef SCM_OPS_CUDA
    if (scm::register_convolutions(*api, options)) return;  // the operators below are for the CPU, and one of their domains is the same
#endif
    scm::register_dense_ops(*api, options);
  });
}
