"""Benchmarks of offloading: a training step whose optimizer states live in host memory, measured and simulated.

``grass bench offload`` runs it. The simulation needs no GPU: it drives the same pipeline over tensors that hold no
memory, and runs its log against the clock.
"""
