"""The memory that the drop-in needs beside parameters, gradients and state."""

import sys

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

from interop import memory, optim  # noqa: E402
from interop.dropin.slots import first_slots  # noqa: E402
from interop.memory import cpu  # noqa: E402
from interop.memory.tensors import DTYPES  # noqa: E402
from interop.memory.values import to_jax, to_torch  # noqa: E402
from jopt._compat import enable_x64  # noqa: E402
from jopt.leaf import init_leaf  # noqa: E402
from jopt.quantized import ABSMAX, CODES  # noqa: E402
from tests import cases  # noqa: E402
from tests.interop.dropin.test_optimizer import subprocess_run  # noqa: E402


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_first_step_has_no_tensor_twice():
    """256 MB of tensors: 8 big ones of as many shapes, and 256 small. A copy of the parameters would be 64 MB."""
    result = subprocess_run(
        """
        import ctypes, pathlib, torch
        from interop import optim

        def memory(name):
            text = pathlib.Path("/proc/self/status").read_text()
            return int(text.split(name + ":")[1].split()[0]) / 1000

        def model(shapes):
            params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
            for p in params:
                p.grad = torch.randn(p.shape)
            return optim.AdamW(params)

        torch.set_num_threads(2)
        model([(8, 8), (1500, 1500)]).step()  # starts JAX
        start = memory("VmRSS")
        optimizer = model([(1000, 1001 + i) for i in range(8)] + [(125, 256)] * 256)
        tensors = 16 * sum(p.numel() for p in optimizer.param_groups[0]["params"]) / 1e6
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        optimizer.step()
        print(tensors, memory("VmHWM") - start - tensors)
        """
    )
    assert result.returncode == 0, result.stderr
    tensors, beside = map(float, result.stdout.split())
    assert tensors > 250
    assert beside < 45  # MB


def test_a_buffer_is_zero_donated_in_place_and_compiles_nothing():
    """Of one element too, which XLA would take as it is, were it aligned."""
    compiled, counting = [], True

    def count(name, *_, **__):  # the oldest JAX cannot take a listener out again
        compiled.append(name) if counting and "backend_compile" in name else None

    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    jax.monitoring.register_event_duration_secs_listener(count)
    shapes = (0, 1, 2, 12347, (1, 64), (3, 64))
    buffers = [memory.HOST.buffer(shape, dtype) for shape in shapes for dtype in DTYPES.values()]
    assert not compiled
    add(np.zeros(99, np.float32))
    assert compiled
    counting = False
    for buffer in buffers:
        assert not np.asarray(buffer.array).astype(np.complex128).any()
        with enable_x64(True):
            out = add(buffer.array)
        assert out.size == 0 or out.unsafe_buffer_pointer() == buffer.address


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.id)
def test_the_first_state_of_a_leaf_is_one_element_repeated(case):
    transform = case.jopt()
    h = {name: 0.25 + i for i, name in enumerate(transform.rule.hyperparameters)}
    dtypes = [torch.float32, torch.bfloat16] + [torch.complex64] * case.takes_complex
    for shape in ((3, 4),) if case.matrices else ((3, 4), (5,), (), (2, 3, 4)):
        for dtype in dtypes:
            param = to_jax(torch.randn(shape).to(dtype))
            whole = to_torch(init_leaf(transform.rule, {k: np.float32(x) for k, x in h.items()}, param))
            one = first_slots(transform.rule, shape, dtype, tuple(h.items()))
            assert {name for name in one if not name.endswith((CODES, ABSMAX))} == whole.keys()
            for name, expected in whole.items():
                assert one[name].untyped_storage().nbytes() == expected.itemsize
                assert one[name].dtype is expected.dtype
                assert torch.equal(one[name], expected)


def test_a_libc_that_cannot_give_memory_back_is_let_be(monkeypatch):
    monkeypatch.setattr(cpu, "_malloc_trim", lambda: None)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optim.SGD([p], lr=0.5).step()
    assert torch.equal(p, torch.full((3,), 0.5))
