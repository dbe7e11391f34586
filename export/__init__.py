"""Export a model and its plan as a bundle of ONNX graphs, and as TensorRT engines."""
