"""Tests run twice: by torch's operations, which step what is as small as most tests' tensors, and by programs.

Those that start a process run once, for in that process nothing is set.
"""

import inspect

import pytest

from tests.conftest import TORCHS_MEMORY

# As on a GPU, as far as that goes without one.
NOT_THERE = {
    "test_reader",  # in C++, of the host's memory
    "test_slow_ways",  # which parameters are copied there is another question: tests/interop/memory/test_owned.py
    "test_a_second_optimizer_steps_in_place",  # both do: parameters stay where they are
    "test_memory_goes_with_the_last_view",  # a parameter's is torch's own; tests/interop/memory/test_owned.py
    "test_memory_cannot_be_resized_away",  # likewise
    "test_two_programs_ten_passes_and_no_array",  # the first is torch's; tests/interop/memory/test_cuda.py
    "test_operations_take_the_steps_until_compiling_pays",  # they do not
}
OWNED = pytest.param("torch's memory", marks=pytest.mark.slow)


def pytest_generate_tests(metafunc):
    if "stepped_by" in metafunc.fixturenames and "stepped_by" not in vars(metafunc.module):
        starts_a_process = "subprocess_run(" in inspect.getsource(metafunc.function)
        ways = ["operations"] if starts_a_process else ["operations", "programs"]
        if not starts_a_process and not NOT_THERE & {
            metafunc.function.__name__,
            metafunc.module.__name__.split(".")[-1],
        }:
            ways.append(OWNED)
        metafunc.parametrize("stepped_by", ways, indirect=True)


@pytest.fixture(autouse=True)
def stepped_by(request, monkeypatch):
    eager = pytest.importorskip("interop.dropin.eager", reason="the drop-in is for torch")
    if request.param == "torch's memory":
        from interop import memory
        from tests.interop.memory.owned import OnCpu

        monkeypatch.setitem(memory.DEVICES, memory.HOST.torch_device, OnCpu())
        monkeypatch.setenv(TORCHS_MEMORY, "1")
    if request.param != "operations":
        monkeypatch.setattr(eager, "ROOM", -1)
        monkeypatch.setattr(eager, "RENT", 0)
    return request.param
