"""Benchmarks of the kernels: cases (what is to be done) x variants (who does it).

``grass bench kernels`` and ``python -m bench.kernels`` run all of it, interleaved; `test_kernels.py` is the
short form for pytest-benchmark.
"""
