"""Benchmarks, run from the source tree: ``python -m bench COMMAND``, and ``pytest bench/ --benchmark-only``.

Ratios within one run are what counts; each number stands beside the bytes it moves.

`kernels`: one AdamW step on the device. `offload`: a step with moments in host memory, measured and simulated.
`host`: the host's time of a step, and steps on the CPU. `gpu`: all of it on a machine with a GPU. `report`: the page.
"""
