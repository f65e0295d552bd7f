"""Guarded buffers for every kernel test.

The directory is run twice: plainly, where CPU tensors take torch's path and kernels are compiled ahead of
time; and with TRITON_INTERPRET=1, where CPU tensors take the Triton path.
"""

from collections.abc import Iterator

import pytest

from grass_kernels import _triton
from tests.support.buffers import Buffers


@pytest.fixture
def buffers() -> Iterator[Buffers]:
    made = Buffers()
    yield made
    made.check()


@pytest.fixture(autouse=True)
def hinted_addresses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every address a kernel calls aligned, checked: a GPU faults on a wrong one, the interpreter does not."""
    hinted: list[int] = []
    if _triton.INTERPRETING:
        from triton.runtime.interpreter import TensorHandle

        def set_attr(handle, key, value):
            if key == "tt.divisibility":
                address, divisor = (
                    int(handle.data.item()),
                    int(value[0] if hasattr(value, "__len__") else value),
                )
                assert divisor in (8, 16)  # 8 bytes of 16-bit arrays beside 32-bit ones
                assert address % divisor == 0, f"{address} is called a multiple of {divisor}"
                hinted.append(address)
            handle.attr[key] = value

        monkeypatch.setattr(TensorHandle, "set_attr", set_attr)
    return hinted
