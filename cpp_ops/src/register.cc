// The library's only export: registers the operators of the domain `scm` with a session's options.
#include <cstdio>

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
    add_consistency_step,
    add_philox_normal,
    add_to_image,
};

// ONNX Runtime keeps pointers to the domain and its operators for as long as a session lives, and this library loaded for as long.
class Domain {
 public:
  explicit Domain(const OrtApi& api) : Domain(api, nullptr) {  // from here on the destructor runs, whatever is thrown
    for (const auto add : kOps) add(ops_, api);
    check(api, api.CreateCustomOpDomain("scm", &domain_));
    for (const auto& op : ops_) check(api, api.CustomOpDomain_Add(domain_, op.get()));
  }
  Domain(const Domain&) = delete;
  Domain& operator=(const Domain&) = delete;
  ~Domain() { api_.ReleaseCustomOpDomain(domain_); }

  OrtCustomOpDomain* get() const { return domain_; }

 private:
  Domain(const OrtApi& api, OrtCustomOpDomain* domain) : api_(api), domain_(domain) {}

  const OrtApi& api_;
  CustomOps ops_;
  OrtCustomOpDomain* domain_;
};

}  // namespace
}  // namespace scm

extern "C" SCM_OPS_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(SCM_OPS_ORT_API);
  if (!api) {
    const OrtApi* oldest = base->GetApi(1);  // enough to say what is wrong
    char reason[128];
    std::snprintf(reason, sizeof reason, "scm_ops needs ONNX Runtime 1.%d or newer, got %s", SCM_OPS_ORT_API, base->GetVersionString());
    return oldest->CreateStatus(ORT_FAIL, reason);
  }
  return scm::guarded(*api, "RegisterCustomOps", [&] {
    static const scm::Domain domain(*api);
    scm::check(*api, api->AddCustomOpDomain(options, domain.get()));
  });
}
