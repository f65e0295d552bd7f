"""Benchmarks of offloading: a training step whose optimizer states live in host memory, measured and simulated.

``python -m bench offload`` runs it. The simulation needs no GPU: it drives the same pipeline over tensors that hold no
memory, records what the pipeline asks of the copy engine, and runs that log against the clock. Tests use the same log
to prove that no two conflicting operations are unordered.
"""
