"""PyTorch's own optimizer machinery, run on `grass.AdamW`.

`torch.testing._internal.common_optimizers` brings the configurations, the mistakes with the messages they
must raise, and the device types; what is checked with them is written here. With ``TRITON_INTERPRET=1``
CPU tensors take the Triton kernels, so the same tests run on them.

Would catch:

- a mistake that torch refuses and we take, or refuse in other words;
- an update, a moment or a counter that differs from torch's for-loop: with any flag, in any real dtype, in
  the step after one without gradients, for parameters with no dimension or no element;
- a path that reads or writes parameters and gradients as if they were contiguous, or complex ones as real;
- moments or counters whose dtype follows torch's default dtype, or the parameter's low precision;
- a group's own lr or weight_decay that is not used; a parameter without a gradient that is changed;
- a checkpoint that does not resume to the bit, of an older torch, or with counters that are no tensors;
- hooks on `state_dict` and `load_state_dict` that are not called, or whose work is overwritten;
- copies that have lost public attributes;
- kernels that are not taken where they should be: every other check would pass without them.
"""

import contextlib
from copy import deepcopy
from unittest import mock

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.testing import assert_close

import grass
from grass_kernels import _triton

pytest.importorskip(
    "torch.testing._internal.common_optimizers",
    reason="a private module of torch, which a version of it may move",
    exc_type=ImportError,
)
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    TensorTracker,
    optim_error_inputs_func_adamw,
    optim_inputs_func_adamw,
    optims,
)
from torch.testing._internal.common_utils import TestCase

IMPLEMENTATIONS = ("foreach", "fused", "differentiable")

ADAMW = OptimizerInfo(
    grass.AdamW,
    optim_inputs_func=optim_inputs_func_adamw,
    optim_error_inputs_func=optim_error_inputs_func_adamw,
    supported_impls=IMPLEMENTATIONS,
    not_og_supported_flags=(*IMPLEMENTATIONS, "maximize", "capturable"),
    supports_fused_on=("cpu", "cuda"),
    has_capturable_arg=True,
)

# torch adds a tensor to a Python number in double, our kernels round once an operation: a few ulp in
# seven steps, of numbers near 1. What float64 takes is torch's own code, so no bit may differ.
TOLERANCE = {
    torch.float64: {"rtol": 0, "atol": 0},
    torch.float32: {"rtol": 2e-6, "atol": 1e-7},
}


def configurations(device, info, *flags):
    """Torch's configurations for the device: as they are, then with each of `flags` set.

    The interpreter is slow, and no flag changes what the kernels are given: there they are left out.
    """
    given = [config.kwargs for config in info.optim_inputs_func(device=device)]
    yield from given
    for flag in () if _triton.INTERPRETING else flags:
        for kwargs in given:
            refused = flag == "foreach" and torch.is_tensor(kwargs.get("lr")) and not kwargs.get("capturable")
            if not refused:
                yield {**kwargs, flag: True}


def loop(kwargs):
    """The same configuration for torch's for-loop, on the CPU and on a GPU."""
    return {**kwargs, "foreach": False, "fused": False}


def normal(*shape, seed, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)


def parameters(device, dtype):
    """Of several shapes, the last two with no dimension and no element."""
    shapes = [(4, 5), (17,), (1, 3, 2), (), (0, 3)]
    return [torch.nn.Parameter(normal(*s, seed=i, dtype=dtype, device=device)) for i, s in enumerate(shapes)]


def set_grads(params, step):
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=1000 * step + i, dtype=p.dtype, device=p.device)


def linear_problem(device, dtype, contiguous):
    """Parameters, and a loss of them that an optimizer can lower or raise."""
    weight, bias = (
        normal(6, 4, 2, seed=0, dtype=dtype, device=device),
        normal(6, 2, seed=1, dtype=dtype, device=device),
    )
    weight, bias = weight[..., 0], bias[..., 0]
    if contiguous:
        weight, bias = weight.clone(memory_format=torch.contiguous_format), bias.contiguous()
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    x = normal(4, seed=2, dtype=dtype, device=device)
    return [weight, bias], lambda: (weight.mv(x) + bias).square().sum()


@contextlib.contextmanager
def spied_launches():
    """Names of the kernels launched meanwhile."""
    names = []
    launch = _triton.launch

    def spy(kernel, *args, **kwargs):
        names.append(kernel.__name__)
        return launch(kernel, *args, **kwargs)

    with mock.patch.object(_triton, "launch", spy):
        yield names


class TestTorchContract(TestCase):
    @optims([ADAMW])
    def test_mistakes_raise_what_torch_raises(self, device, dtype, optim_info):
        param = torch.nn.Parameter(normal(1, 1, seed=0, dtype=dtype, device=device))
        for mistake in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = mistake.optimizer_error_input
            params = [param] if given.params is None else given.params
            assert mistake.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
            if issubclass(mistake.error_type, Warning):
                with self.assertWarnsRegex(mistake.error_type, mistake.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)
                continue
            with pytest.raises(mistake.error_type, match=mistake.error_regex):
                optim_info.optim_cls(params, **given.kwargs)

    @optims([ADAMW])
    def test_implementations_that_exclude_each_other(self, device, dtype, optim_info):
        param = torch.nn.Parameter(normal(2, seed=0, dtype=dtype, device=device))
        for other in ("foreach", "differentiable"):
            with pytest.raises(RuntimeError) as of_torch:
                torch.optim.AdamW([param], fused=True, **{other: True})
            with pytest.raises(RuntimeError) as ours:
                optim_info.optim_cls([param], fused=True, **{other: True})
            assert str(ours.value) == str(of_torch.value)

    def _compare_to_loop(self, device, dtype, kwargs):
        """Seven steps, parameters and all state compared after each; no gradients at one of them."""
        reference, params = parameters(device, dtype), parameters(device, dtype)
        torch_optimizer = torch.optim.AdamW(reference, **loop(kwargs))
        optimizer = grass.AdamW(params, **kwargs)
        for step in range(7):
            if step == 3:
                torch_optimizer.zero_grad()
                optimizer.zero_grad()
            else:
                set_grads(reference, step)
                set_grads(params, step)
            torch_optimizer.step()
            optimizer.step()
            tracker = TensorTracker(assert_eq_kwargs=TOLERANCE[dtype])
            for p in reference:
                tracker.add(p)
            for p in params:
                tracker.pop_check_set(p, self)
            assert tracker.all_popped()
            for p_reference, p in zip(reference, params, strict=True):
                expected, state = torch_optimizer.state[p_reference], optimizer.state[p]
                assert state.keys() == expected.keys()
                for key, value in expected.items():
                    assert state[key].shape == value.shape
                    if key == "step":
                        assert state[key].dtype == torch.float32
                        assert state[key].item() == value.item()
                        continue
                    assert state[key].dtype == dtype
                    assert state[key].stride() == value.stride()
                    cancels = {} if key == "exp_avg" else {"atol": 0}  # squares do not
                    assert_close(state[key], value, **{**TOLERANCE[dtype], **cancels})
                    state[key].copy_(value)

    @optims([ADAMW], dtypes=[torch.float32, torch.float64])
    def test_equals_torchs_loop_whatever_the_flags(self, device, dtype, optim_info):
        for kwargs in configurations(device, optim_info, "foreach", "fused"):
            tolerance = TOLERANCE[dtype]
            if dtype == torch.float64 and (kwargs.get("fused") or torch.device(device).type != "cpu"):
                tolerance = {"rtol": 1e-12, "atol": 1e-12}  # torch's other implementations of it
            with self.subTest(**kwargs), mock.patch.dict(TOLERANCE, {dtype: tolerance}):
                self._compare_to_loop(device, dtype, kwargs)

    @optims([ADAMW])
    def test_the_default_dtype_is_not_ours(self, device, dtype, optim_info):
        before = torch.get_default_dtype()
        for default in (torch.float64, torch.float16):
            try:
                torch.set_default_dtype(default)
                self._compare_to_loop(device, dtype, {"amsgrad": True})
            finally:
                torch.set_default_dtype(before)

    @optims([ADAMW], dtypes=[torch.bfloat16, torch.float16])
    def test_low_precision_is_float32_rounded_once(self, device, dtype, optim_info):
        """Torch's loop in float64, its parameters rounded after each step, gives the same to half an ulp."""
        for kwargs in configurations(device, optim_info, "foreach", "fused"):
            shadows, params = parameters(device, dtype), parameters(device, dtype)
            shadows = [torch.nn.Parameter(p.detach().double()) for p in shadows]
            reference = torch.optim.AdamW(shadows, **loop({**kwargs, "capturable": False}))
            optimizer = optim_info.optim_cls(params, **kwargs)
            for step in range(5):
                set_grads(params, step)
                for shadow, p in zip(shadows, params, strict=True):
                    shadow.grad = p.grad.double()
                reference.step()
                optimizer.step()
                for shadow, p in zip(shadows, params, strict=True):
                    # one representable number away where float32 arithmetic tips a tie, and no further
                    assert_close(p.double(), shadow.detach(), rtol=0.501 * torch.finfo(dtype).eps, atol=1e-7)
                    for key, value in reference.state[shadow].items():
                        assert optimizer.state[p][key].dtype == torch.float32
                        atol = 1e-7 if key == "exp_avg" else 0  # whose terms may cancel
                        assert_close(optimizer.state[p][key].double(), value.double(), rtol=2e-6, atol=atol)
                    with torch.no_grad():
                        shadow.copy_(p)

    @optims([ADAMW])
    def test_one_group_of_many_dtypes(self, device, dtype, optim_info):
        dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32)
        together = [
            torch.nn.Parameter(normal(3, 4, seed=i, dtype=d, device=device)) for i, d in enumerate(dtypes)
        ]
        apart = [torch.nn.Parameter(p.detach().clone()) for p in together]
        optimizer = optim_info.optim_cls(together, lr=0.01)
        each = [optim_info.optim_cls([p], lr=0.01) for p in apart]
        for step in range(3):
            set_grads(together, step)
            set_grads(apart, step)
            optimizer.step()
            for one in each:
                one.step()
        for p, alone, one in zip(together, apart, each, strict=True):
            assert_close(p, alone, rtol=0, atol=0)
            assert_close(optimizer.state[p], one.state[alone], rtol=0, atol=0)

    @optims([ADAMW], dtypes=[torch.float32, torch.float64])
    def test_the_loss_goes_the_right_way(self, device, dtype, optim_info):
        for contiguous in (True, False):
            for kwargs in configurations(device, optim_info, "foreach", "fused"):
                params, loss = linear_problem(device, dtype, contiguous)
                assert params[0].is_contiguous() == contiguous
                optimizer = optim_info.optim_cls(params, **kwargs)
                schedulers = [StepLR(optimizer, step_size=5, gamma=0.9), ReduceLROnPlateau(optimizer)]

                def closure(optimizer=optimizer, loss=loss):
                    optimizer.zero_grad()
                    value = loss()
                    value.backward()
                    return value

                first = closure().item()
                for _ in range(4):
                    value = optimizer.step(closure)
                    for scheduler in schedulers:
                        if isinstance(scheduler, ReduceLROnPlateau):
                            scheduler.step(value.item())
                        else:
                            scheduler.step()
                if kwargs.get("maximize"):
                    assert closure().item() > first
                else:
                    assert closure().item() < first

    @optims([ADAMW], dtypes=[torch.complex64])
    def test_complex_parameters_are_pairs_of_real_ones(self, device, dtype, optim_info):
        for kwargs in configurations(device, optim_info, "foreach"):
            for contiguous in (True, False):
                numbers = torch.view_as_complex(normal(3, 4, 2, seed=0, device=device))
                numbers = numbers if contiguous else numbers.t()
                pairs = torch.nn.Parameter(torch.view_as_real(numbers.clone()))
                numbers = torch.nn.Parameter(numbers.clone())
                optimizer = optim_info.optim_cls([numbers], **kwargs)
                reference = torch.optim.AdamW([pairs], **loop(kwargs))
                for step in range(3):
                    grad = torch.view_as_complex(normal(*numbers.shape, 2, seed=step, device=device))
                    numbers.grad, pairs.grad = grad, torch.view_as_real(grad).clone()
                    optimizer.step()
                    reference.step()
                    assert_close(torch.view_as_real(numbers.detach()), pairs.detach())
                    for key, value in reference.state[pairs].items():
                        state = optimizer.state[numbers][key]
                        assert_close(torch.view_as_real(state) if state.is_complex() else state, value)

    @optims([ADAMW])
    def test_a_groups_own_weight_decay(self, device, dtype, optim_info):
        """With no gradient to follow, only the group that decays moves, and by the factor."""
        for flag in (None, "foreach", "fused"):
            decayed, other = parameters(device, dtype), parameters(device, dtype)
            before = [p.detach().clone() for p in decayed]
            groups = [{"params": decayed, "weight_decay": 0.5}, {"params": other}]
            flags = {} if flag is None else {flag: True}
            optimizer = optim_info.optim_cls(groups, lr=0.1, weight_decay=0.0, **flags)
            for p in (*decayed, *other):
                p.grad = torch.zeros_like(p)
            optimizer.step()
            for start, p, q in zip(before, decayed, other, strict=True):
                assert_close(p.detach(), start * (1 - 0.1 * 0.5), rtol=2e-7, atol=0)
                assert_close(q.detach(), start, rtol=0, atol=0)

    @optims([ADAMW])
    def test_a_groups_own_lr(self, device, dtype, optim_info):
        """The first step of Adam is lr, whatever the gradient."""
        for flag in (None, "foreach", "fused"):
            slow, fast = parameters(device, dtype), parameters(device, dtype)
            before = [p.detach().clone() for p in slow]
            groups = [{"params": slow}, {"params": fast, "lr": 0.25}]
            flags = {} if flag is None else {flag: True}
            optimizer = optim_info.optim_cls(groups, lr=0.0625, weight_decay=0.0, eps=0.0, **flags)
            set_grads([*slow, *fast], 0)
            optimizer.step()
            for start, p in zip(before, slow, strict=True):
                assert_close((p.detach() - start), -0.0625 * p.grad.sign(), rtol=0, atol=1e-6)
            for start, p in zip(before, fast, strict=True):
                assert_close((p.detach() - start), -0.25 * p.grad.sign(), rtol=0, atol=1e-6)

    @optims([ADAMW])
    def test_without_gradients_nothing_happens(self, device, dtype, optim_info):
        for kwargs in configurations(device, optim_info, *IMPLEMENTATIONS):
            params = parameters(device, dtype)
            before = [p.detach().clone() for p in params]
            optimizer = optim_info.optim_cls(params, **kwargs)
            optimizer.step()
            assert len(optimizer.state) == 0
            for p, start in zip(params, before, strict=True):
                assert_close(p.detach(), start, rtol=0, atol=0)
                assert p.grad is None

    @optims([ADAMW])
    def test_zero_gradients_only_decay(self, device, dtype, optim_info):
        for kwargs in configurations(device, optim_info, "foreach", "fused"):
            params = parameters(device, dtype)
            before = [p.detach().clone() for p in params]
            optimizer = optim_info.optim_cls(params, **kwargs)
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            decay = 1 - float(kwargs.get("lr", 1e-3)) * kwargs.get("weight_decay", 1e-2)
            for p, start in zip(params, before, strict=True):
                assert_close(p.detach(), start * decay, rtol=2e-7, atol=0)
                assert_close(optimizer.state[p]["exp_avg"], torch.zeros_like(p), rtol=0, atol=0)
                assert optimizer.state[p]["step"].item() == 1

    @optims([ADAMW])
    def test_prints_as_torchs_does(self, device, dtype, optim_info):
        for kwargs in configurations(device, optim_info, *IMPLEMENTATIONS):
            params = parameters(device, dtype)
            ours, of_torch = optim_info.optim_cls(params, **kwargs), torch.optim.AdamW(params, **kwargs)
            assert repr(ours) == repr(of_torch)

    @optims([ADAMW], dtypes=[torch.float32, torch.bfloat16, torch.float64])
    def test_resumes_to_the_bit(self, device, dtype, optim_info):
        for kwargs in configurations(device, optim_info, "foreach", "fused"):
            params = parameters(device, dtype)
            groups = [{"params": params[:2], "lr": 0.03}, {"params": params[2:]}]
            optimizer = optim_info.optim_cls(groups, **kwargs)
            for step in range(2):
                set_grads(params, step)
                optimizer.step()
            copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
            resumed = optim_info.optim_cls([{"params": copies[:2]}, {"params": copies[2:]}])
            resumed.load_state_dict(deepcopy(optimizer.state_dict()))
            assert_close(resumed.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
            set_grads(params, 2)
            set_grads(copies, 2)
            optimizer.step()
            resumed.step()
            for p, copy in zip(params, copies, strict=True):
                assert_close(p, copy, rtol=0, atol=0)
            assert_close(resumed.state_dict(), optimizer.state_dict(), rtol=0, atol=0)

    @optims([ADAMW])
    def test_an_implementation_resumes_anothers_checkpoint(self, device, dtype, optim_info):
        for before, after in (("foreach", "fused"), ("fused", "foreach")):
            params = parameters(device, dtype)
            optimizer = optim_info.optim_cls(params, **{before: True})
            for step in range(2):
                set_grads(params, step)
                optimizer.step()
            saved = deepcopy(optimizer.state_dict())
            for group in saved["param_groups"]:
                group.update({before: False, after: True})
            optimizer.load_state_dict(saved)
            for p in params:
                assert optimizer.state[p]["step"].device == p.device
                assert optimizer.state[p]["step"].dtype == torch.float32
            set_grads(params, 2)
            optimizer.step()
            for p in params:
                assert optimizer.state[p]["step"].item() == 3

    @optims([ADAMW], dtypes=[torch.float32, torch.float64])
    def test_checkpoints_of_older_versions(self, device, dtype, optim_info):
        """Their groups lack what was added since; torch gives the flags their defaults."""
        for kwargs in configurations(device, optim_info):
            params = parameters(device, dtype)
            optimizer = optim_info.optim_cls(params, **kwargs)
            set_grads(params, 0)
            optimizer.step()
            older = deepcopy(optimizer.state_dict())
            for group in older["param_groups"]:
                for flag in (*optim_info.not_og_supported_flags, "decoupled_weight_decay"):
                    group.pop(flag, None)
            optimizer.load_state_dict(older)
            assert optimizer.param_groups[0]["decoupled_weight_decay"]
            set_grads(params, 1)
            optimizer.step()
            assert optimizer.state[params[0]]["step"].item() == 2

    @optims([ADAMW], dtypes=[torch.float32, torch.bfloat16, torch.float64])
    def test_counters_that_are_no_tensors(self, device, dtype, optim_info):
        for kwargs in ({}, {"fused": True}):
            params = parameters(device, dtype)
            optimizer = optim_info.optim_cls(params, **kwargs)
            set_grads(params, 0)
            optimizer.step()
            expected = deepcopy(optimizer.state_dict())
            old = deepcopy(expected)
            for state in old["state"].values():
                state["step"] = state["step"].item()
            optimizer.load_state_dict(old)
            assert_close(optimizer.state_dict(), expected, rtol=0, atol=0)
            for p in params:
                assert isinstance(optimizer.state[p]["step"], torch.Tensor)
            set_grads(params, 1)
            optimizer.step()

    @optims([ADAMW])
    def test_hooks_on_the_state_dict(self, device, dtype, optim_info):
        params = parameters(device, dtype)
        optimizer = optim_info.optim_cls(params)
        set_grads(params, 0)
        optimizer.step()
        calls = []
        optimizer.register_state_dict_pre_hook(lambda _: calls.append("before save"))
        optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": len(calls)})
        optimizer.register_load_state_dict_pre_hook(
            lambda _, given: {**given, "state": {k: {**v, "step": 40} for k, v in given["state"].items()}}
        )
        optimizer.register_load_state_dict_post_hook(lambda o: o.state[params[0]]["exp_avg"].fill_(7))
        saved = optimizer.state_dict()
        assert calls == ["before save"]
        assert saved.pop("note") == 1
        optimizer.load_state_dict(deepcopy(saved))
        assert optimizer.state[params[0]]["step"].item() == 40
        assert_close(optimizer.state[params[0]]["exp_avg"], torch.full_like(params[0], 7))
        assert_close(optimizer.state[params[1]]["exp_avg"], saved["state"][1]["exp_avg"])

    @optims([ADAMW])
    def test_copies_have_every_public_attribute(self, device, dtype, optim_info):
        for kwargs in configurations(device, optim_info, *IMPLEMENTATIONS):
            optimizer = optim_info.optim_cls(parameters(device, dtype), **kwargs)
            copy = deepcopy(optimizer)
            public = {name for name in dir(optimizer) if not name.startswith("_")}
            assert public - set(dir(copy)) == set()
            assert repr(copy) == repr(optimizer)

    @optims([ADAMW], dtypes=[torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_takes_the_path_it_should(self, device, dtype, optim_info):
        """One main pass for both groups on a GPU and when interpreting; torch alone on the CPU."""
        params = parameters(device, dtype)
        optimizer = optim_info.optim_cls([{"params": params[:2]}, {"params": params[2:]}])
        set_grads(params, 0)
        with spied_launches() as launched:
            optimizer.step()
        passes = launched.count("_masked_adamw_kernel")
        takes_triton = torch.device(device).type == "cuda" or _triton.INTERPRETING
        assert passes == (1 if takes_triton and dtype != torch.float64 else 0)


instantiate_device_type_tests(TestTorchContract, globals(), only_for=("cpu", "cuda"))
