"""A whole optimizer step, ours beside torch's, on the parameters of a small Llama.

Each case gives bytes (what the update must move once) as extra information, so that seconds can be read as
bandwidth: `pytest bench/test_step.py --benchmark-only --benchmark-json=out.json`.

Size: GRASS_BENCH_LAYERS blocks of 3.2 M parameters (default 4). Dtype: bfloat16 and float32. Torch's AdamW
keeps moments in the parameter's dtype, ours in float32: the bytes differ, and say so.
"""

import os

import pytest
import torch

import grass

LAYERS = int(os.environ.get("GRASS_BENCH_LAYERS", "4"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 512
SHAPES = [(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH)] * 2 + [(WIDTH,)] * 2

OPTIMIZERS = {
    "torch_single": lambda params: torch.optim.AdamW(params, foreach=False),
    "torch_foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "torch_fused": lambda params: torch.optim.AdamW(params, fused=True),
    "grass": grass.AdamW,
}


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in SHAPES * LAYERS:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype))
        p.grad = torch.randn(shape, generator=generator).to(DEVICE, dtype)
        params.append(p)
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step(benchmark, name, dtype):
    params = parameters(dtype)
    optimizer = OPTIMIZERS[name](params)
    optimizer.step()  # state exists, kernels are compiled

    def step() -> None:
        optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"step {sum(p.numel() for p in params):,} parameters {dtype} {DEVICE}"
    moment = optimizer.state[params[0]]["exp_avg"].element_size()
    weight = params[0].element_size()
    benchmark.extra_info["bytes"] = sum(p.numel() for p in params) * (3 * weight + 4 * moment)
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    benchmark.extra_info["torch"] = torch.__version__
    benchmark(step)
    assert all(torch.isfinite(p).all() for p in params)
