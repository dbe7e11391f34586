"""Measure a model: errors, sensitivities, latencies."""
