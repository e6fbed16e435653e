"""A GPU without one: errors before anything changed, streams as they are asked for, and programs compiled for an H100.

torch's side is faked where it says that it is on a GPU; nothing runs there. What only a GPU can show is in tests/gpu.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

import interop  # noqa: E402
from interop import memory, optim  # noqa: E402
from interop.memory import cuda, owned  # noqa: E402
from tests import ROOT  # noqa: E402


class OnCuda(torch.nn.Parameter):
    """A parameter that says that it lies on the second GPU."""

    device = property(lambda self: torch.device("cuda", 1))


@pytest.fixture
def parameter():
    p = OnCuda(torch.ones(3))
    p.grad = torch.ones(3)
    return p


@pytest.fixture(autouse=True)
def found_anew():
    cuda.cuda_device.cache_clear()
    yield
    cuda.cuda_device.cache_clear()
    memory.DEVICES.pop(torch.device("cuda", 1), None)


def refused(parameter, error, text, step):
    with pytest.raises(error, match=text):
        step(parameter)
    assert torch.equal(torch.Tensor(parameter), torch.ones(3))


STEPS = {"AdamW": lambda p: optim.AdamW([p]).step(), "LBFGS": lambda p: optim.LBFGS([p]).step(lambda: p.sum())}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_gpu_that_jax_has_not(parameter, monkeypatch, step):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    text = r"found cuda:1, and JAX has no CUDA here \(its .*\); pip install 'jax\[cuda13\]', of torch's CUDA 13.0"
    refused(parameter, TypeError, text, step)


def test_a_wrapped_optimizer_on_a_gpu_that_jax_has_not(parameter):
    import optax

    refused(parameter, TypeError, "JAX has no CUDA here", lambda p: interop.wrap(optax.sgd(0.1), [p]))


def test_values_on_a_gpu_that_jax_has_not(parameter):
    refused(parameter, TypeError, "x: expected a tensor in CPU memory or on a GPU, found cuda:1", interop.to_jax)


def test_another_process_gpu(parameter, monkeypatch):
    """JAX has the first GPU, torch's tensor is on the second."""
    gpu = types.SimpleNamespace(local_hardware_id=0, platform="gpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [gpu])
    monkeypatch.setattr(jax, "devices", lambda backend=None: [gpu])
    refused(parameter, TypeError, "found cuda:1, and JAX has .* let both see the same GPUs", STEPS["AdamW"])


def test_while_a_graph_is_captured(parameter, monkeypatch):
    monkeypatch.setitem(memory.DEVICES, torch.device("cuda", 1), object.__new__(cuda.Cuda))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    refused(parameter, RuntimeError, r"while a CUDA graph is captured: .* call step\(\) after", STEPS["AdamW"])


def test_a_wrapped_optimizer_while_a_graph_is_captured(monkeypatch, relaxed):
    """Before its first step moves or makes anything."""
    import optax

    from tests.interop.memory.owned import OnCpu

    monkeypatch.setitem(memory.DEVICES, memory.HOST.torch_device, device := OnCpu())
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = interop.wrap(optax.adam(0.1), [p])

    def check():
        raise RuntimeError("while a CUDA graph is captured")

    monkeypatch.setattr(device, "check", check)
    for call in (optimizer.step, lambda: interop.to_jax(p), lambda: interop.to_torch(jax.numpy.ones(2))):
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            call()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


def test_sweeps_are_of_the_host(parameter, monkeypatch):
    monkeypatch.setitem(memory.DEVICES, torch.device("cuda", 1), device := object.__new__(cuda.Cuda))
    monkeypatch.setattr(type(device), "check", lambda self: None)
    model = torch.nn.Module()
    model.register_parameter("p", parameter)
    with pytest.raises(TypeError, match="p: expected a parameter in CPU memory, where the runs are, found cuda:1;"):
        interop.sweep(model, lambda f, batch: f(batch).sum(), [torch.ones(1)], lr=[0.1], steps=1)


# --- streams -------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """The second GPU, with torch's streams recorded."""
    calls = []

    class Stream:
        def __init__(self, handle, device=None):
            self.cuda_stream = handle

        def wait_stream(self, other):
            calls.append(("waits", self.cuda_stream, "for", other.cuda_stream))

        def synchronize(self):
            calls.append(("host waits for", self.cuda_stream))

    device = object.__new__(cuda.Cuda)
    device.torch_device, device.calls, device.current = torch.device("cuda", 1), calls, 0
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: Stream(device.current))
    monkeypatch.setattr(torch.cuda, "device", lambda x: _Within(calls, x))
    return device


class _Within:
    def __init__(self, calls, device):
        self.calls, self.device = calls, device

    def __enter__(self):
        self.calls.append(("enter", self.device.index))

    def __exit__(self, *_):
        self.calls.append(("leave", self.device.index))


def test_an_import_that_orders_lets_jaxs_stream_wait_for_torchs(gpu):
    described = owned._Memory(gpu, 4096, (1,), np.dtype(np.float32), True)
    assert described.__dlpack_device__() == (2, 1)
    for gpu.current in (0, 11):  # the default stream, and a side stream
        described.__dlpack__(stream=7)
    assert gpu.calls == [("waits", 7, "for", 0), ("waits", 7, "for", 11)]
    owned._Memory(gpu, 4096, (1,), np.dtype(np.float32), False).__dlpack__(stream=7)
    assert len(gpu.calls) == 2
    described.__dlpack__(stream=None)
    assert gpu.calls[2:] == [("host waits for", 11)]


@pytest.mark.parametrize(("current", "given"), [(0, 1), (11, 11)])
def test_torchs_stream_waits_for_a_result_by_its_own_number(gpu, current, given):
    class Result:
        def __dlpack__(self, *, stream):
            gpu.calls.append(("for", stream))

    gpu.current = current
    gpu._ordered = []
    gpu.after([Result()])
    assert gpu.calls == [("enter", 1), ("for", given), ("leave", 1)]


def test_memory_is_described_as_it_is():
    """What `from_dlpack` takes of the description, on the host's memory."""
    from tests.interop.memory.owned import OnCpu

    device = OnCpu()
    for dtype in memory.tensors.DTYPES.values():
        x = device.zero_bytes(24 * dtype.itemsize)
        array = device.alias(x.data_ptr(), (2, 3, 4), dtype)
        assert (array.shape, array.dtype) == ((2, 3, 4), dtype)
        assert array.unsafe_buffer_pointer() == x.data_ptr()


def test_under_torchrun_jax_sees_the_gpu_of_its_process(monkeypatch):
    """Else the first of the processes to start JAX would take memory of all."""
    script = "from interop.memory import cuda; import jax; cuda._alone_under_torchrun(3)\n"
    script += "print(jax.config.read('jax_cuda_visible_devices'))"
    for given, expected in (({}, "all"), ({"LOCAL_RANK": "3"}, "3")):
        env = {k: v for k, v in os.environ.items() if k != "LOCAL_RANK"} | given
        child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
        assert child.stdout.strip() == expected, child.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "false"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, "true"),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, "None"),
    ],
)
def test_jax_takes_no_memory_that_torch_has_to_have(given, expected):
    script = "import os; from interop import optim; print(os.environ.get('XLA_PYTHON_CLIENT_PREALLOCATE'))"
    env = {k: v for k, v in os.environ.items() if not k.startswith("XLA_PYTHON")} | given
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert child.stdout.strip() == expected, child.stderr


# --- programs, compiled for an H100 -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("compiling for an H100 needs jax_cuda12_plugin: pip install '.[aot]'")
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda_programs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


# These read a tensor again: for its norms, for products between two programs, for the largest of a block of codes.
AGAIN = re.compile(r"adafactor|muon|.*int8")


@pytest.mark.slow
def test_programs_are_in_place_and_read_and_write_once(compiled):
    for name, found in compiled.items():
        assert found["in place"] == found["buffers"], name
        if not AGAIN.match(name):
            assert found["copied"] <= 64, name  # numbers
            assert found["bytes"] <= 1.02 * found["least"], name


@pytest.mark.slow
def test_programs_are_few_kernels(compiled):
    most = {"resnet50, AdamW": 20, "gpt2_small, AdamW": 10, "resnet50, AdamW, clipped, unscaled, averaged": 30}
    for name, number in most.items():
        assert compiled[name]["kernels"] <= number, name
