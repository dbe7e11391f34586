"""Rewrite graphs: graph in, graph out."""
