"""Benchmarks of the kernels: cases (what is to be done) x variants (by which optimizer).

``python -m bench kernels`` runs all of it, interleaved; `test_kernels.py` is the short form for pytest-benchmark.
"""
