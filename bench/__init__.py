"""Benchmarks, run from the source tree: ``python -m bench COMMAND``, and ``pytest bench/ --benchmark-only``.

Compare ratios within one run; every time is shown with the bytes that the step moves.

`kernels`: one AdamW step on the device. `offload`: a step with moments in host memory, measured and simulated.
`host`: host time of a step, and steps on the CPU. `gpu`: all of them on a machine with a GPU. `report`: the page.
"""
