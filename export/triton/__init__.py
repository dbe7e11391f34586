"""Write a bundle's loop as a model of Triton Inference Server."""
