"""Benchmarks. Ratios within one run are what counts; each number stands beside the bytes it moves.

`kernels`: one AdamW step on the device; `grass bench kernels`, or `pytest bench --benchmark-only` for its short form.
`offload`: a step with moments in host memory, measured and simulated; `grass bench offload`.
`host`: what a step costs the host. `gpu_suite`: all of it on a machine with a GPU; `make gpu`.
"""
