"""Run TensorRT engines: find the library, read what was built, answer as the transformer."""
