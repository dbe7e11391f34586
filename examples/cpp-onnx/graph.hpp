// What a driver of bundles needs of a runtime: tensors, and graphs that turn some into others.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

// A tensor in memory; copies share it. The dtype is torch's name of it, such as float32.
struct Tensor {
  std::string dtype;
  std::vector<size_t> shape;
  std::shared_ptr<std::vector<std::byte>> bytes;

  Tensor() = default;
  Tensor(const std::string& dtype, const std::vector<size_t>& shape, const void* from = nullptr)
      : dtype(dtype), shape(shape) {
    bytes = std::make_shared<std::vector<std::byte>>(size() * item_size());
    const auto* begin = static_cast<const std::byte*>(from);
    if (from) bytes->assign(begin, begin + bytes->size());
  }
  size_t size() const {
    size_t count = 1;
    for (const size_t each : shape) count *= each;
    return count;
  }
  size_t item_size() const { return dtype == "int64" ? 8 : dtype == "bool" ? 1 : 4; }
  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(bytes->data());
  }
};
using Tensors = std::map<std::string, Tensor>;

// An ONNX graph, loaded. Defined in graph_onnxruntime.cpp, and in graph_openvino.cpp.
class Graph {
 public:
  explicit Graph(const std::string& path);
  ~Graph();
  Tensors run(const Tensors& inputs);  // the outputs, by name

 private:
  struct Loaded;
  std::unique_ptr<Loaded> loaded_;
};
