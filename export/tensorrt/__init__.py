"""Build TensorRT engines from a bundle, each in a process of its own, and read its build log."""
