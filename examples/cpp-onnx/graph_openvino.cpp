// Graphs run by OpenVINO, on the CPU.
#include <openvino/openvino.hpp>

#include "graph.hpp"

namespace {
const std::map<std::string, ov::element::Type> kTypes = {{"float32", ov::element::f32},
                                                         {"int64", ov::element::i64},
                                                         {"int32", ov::element::i32},
                                                         {"bool", ov::element::boolean}};

ov::Core& core() {
  static ov::Core made;  // by default a CPU that has bfloat16 computes in that
  made.set_property("CPU", ov::hint::execution_mode(ov::hint::ExecutionMode::ACCURACY));
  return made;
}
}  // namespace

struct Graph::Loaded {
  ov::CompiledModel model;
  ov::InferRequest request;
};

Graph::Graph(const std::string& path)
    : loaded_(new Loaded{core().compile_model(path, "CPU"), {}}) {
  loaded_->request = loaded_->model.create_infer_request();
}

Graph::~Graph() = default;

Tensors Graph::run(const Tensors& inputs) {
  for (const auto& [name, tensor] : inputs)
    loaded_->request.set_tensor(
        name, ov::Tensor(kTypes.at(tensor.dtype), tensor.shape, tensor.bytes->data()));
  loaded_->request.infer();
  Tensors found;
  for (const auto& output : loaded_->model.outputs()) {
    const ov::Tensor result = loaded_->request.get_tensor(output);
    for (const auto& [dtype, type] : kTypes)
      if (type == result.get_element_type())
        for (const std::string& name : output.get_names())
          found[name] = Tensor(dtype, result.get_shape(), result.data());
  }
  return found;
}
