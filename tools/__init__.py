"""Provide the command line, the demo and its model."""
