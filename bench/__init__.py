"""Benchmarks. Ratios within one run are what counts; each number stands beside the bytes it moves.

`kernels`: one AdamW step on the device; `grass bench kernels`, or `pytest bench --benchmark-only` for its short form.
"""
