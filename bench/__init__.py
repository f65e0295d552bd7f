"""Benchmarks: `pytest bench --benchmark-only`. Ratios within one run are what counts."""
