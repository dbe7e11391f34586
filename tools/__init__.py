"""The command line, the demo and its model, benchmarks and the survey of models."""
