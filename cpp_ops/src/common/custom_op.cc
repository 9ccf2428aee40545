#include "common/custom_op.h"

#include <algorithm>

namespace scm {

Inferred infer_inputs(const OrtApi& api, OrtShapeInferContext* context) {
  std::size_t count = 0;
  check(api, api.ShapeInferContext_GetInputCount(context, &count));
  Inferred inputs{Shapes(count), std::vector<ONNXTensorElementDataType>(count, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED)};
  for (std::size_t i = 0; i < count; ++i) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    OrtStatus* status = api.ShapeInferContext_GetInputTypeShape(context, i, &info);
    if (status || !info) {  // neither type nor shape of this input is known
      if (status) api.ReleaseStatus(status);
      inputs.shapes[i].ranked = false;
      continue;
    }
    std::size_t rank = 0;
    check(api, api.GetDimensionsCount(info, &rank));
    // ONNX Runtime reports both a scalar and a tensor of unknown rank as having 0 axes. Kernels check the rank again.
    inputs.shapes[i].ranked = rank > 0;
    std::vector<std::int64_t> sizes(rank);
    std::vector<const char*> symbols(rank);
    check(api, api.GetDimensions(info, sizes.data(), rank));
    check(api, api.GetSymbolicDimensions(info, symbols.data(), rank));
    for (std::size_t axis = 0; axis < rank; ++axis) inputs.shapes[i].dims.push_back({sizes[axis], symbols[axis]});
    check(api, api.GetTensorElementType(info, &inputs.types[i]));
  }
  return inputs;
}

void set_outputs(const OrtApi& api, OrtShapeInferContext* context, const Inferred& outputs) {
  const Shapes& shapes = outputs.shapes;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    // ONNX Runtime would take an unknown dimension without a name for a size of -1. Do not set such a shape.
    const std::vector<Dim>& dims = shapes[i].dims;
    const bool fully_named = std::all_of(dims.begin(), dims.end(), [](const Dim& dim) { return dim.known() || (dim.symbol && *dim.symbol); });
    if (!shapes[i].ranked || !fully_named) continue;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api, api.CreateTensorTypeAndShapeInfo(&info));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api.ReleaseTensorTypeAndShapeInfo)> owner(info, api.ReleaseTensorTypeAndShapeInfo);
    std::vector<std::int64_t> sizes;
    std::vector<const char*> symbols;
    for (const Dim& dim : shapes[i].dims) {
      sizes.push_back(dim.value);
      symbols.push_back(dim.known() || !dim.symbol ? "" : dim.symbol);
    }
    check(api, api.SetTensorElementType(info, outputs.types[i]));
    check(api, api.SetDimensions(info, sizes.data(), sizes.size()));
    check(api, api.SetSymbolicDimensions(info, symbols.data(), symbols.size()));
    OrtStatus* status = api.ShapeInferContext_SetOutputTypeShape(context, i, info);
    if (status) api.ReleaseStatus(status);  // the node does not have this optional output
  }
}

}  // namespace scm
