// Graphs run by ONNX Runtime.
#include <onnxruntime_cxx_api.h>

#include "graph.hpp"

namespace {
const std::map<std::string, ONNXTensorElementDataType> kTypes = {
    {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
    {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
    {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL}};

Ort::Env& environment() {
  static Ort::Env made(ORT_LOGGING_LEVEL_WARNING, "bundle");
  return made;
}
}  // namespace

struct Graph::Loaded {
  Ort::Session session;
  std::vector<std::string> outputs;
};

Graph::Graph(const std::string& path)
    : loaded_(new Loaded{Ort::Session(environment(), path.c_str(), Ort::SessionOptions()), {}}) {
  Ort::AllocatorWithDefaultOptions allocator;
  for (size_t i = 0; i < loaded_->session.GetOutputCount(); ++i)
    loaded_->outputs.push_back(loaded_->session.GetOutputNameAllocated(i, allocator).get());
}

Graph::~Graph() = default;

Tensors Graph::run(const Tensors& inputs) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
  std::vector<const char*> names, wanted;
  std::vector<Ort::Value> values;
  for (const auto& [name, tensor] : inputs) {
    const std::vector<int64_t> shape(tensor.shape.begin(), tensor.shape.end());
    names.push_back(name.c_str());
    values.push_back(Ort::Value::CreateTensor(memory, tensor.bytes->data(), tensor.bytes->size(),
                                              shape.data(), shape.size(), kTypes.at(tensor.dtype)));
  }
  for (const std::string& name : loaded_->outputs) wanted.push_back(name.c_str());
  const auto results = loaded_->session.Run(Ort::RunOptions(), names.data(), values.data(),
                                            values.size(), wanted.data(), wanted.size());
  Tensors found;
  for (size_t i = 0; i < results.size(); ++i) {
    const auto kind = results[i].GetTensorTypeAndShapeInfo();
    const auto shape = kind.GetShape();
    for (const auto& [dtype, type] : kTypes)
      if (type == kind.GetElementType())
        found[wanted[i]] = Tensor(dtype, {shape.begin(), shape.end()}, results[i].GetTensorRawData());
  }
  return found;
}
