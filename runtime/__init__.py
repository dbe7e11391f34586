"""Run planned models: clock, caches, calibration, lowering."""
