"""interop.prefetch: what the loader gave, in its order, as JAX arrays; and threads that end."""

import re
import threading
import time
import traceback
from typing import NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch's loaders are what is read")

from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import interop  # noqa: E402
from tests import ROOT, child  # noqa: E402


class Pair(NamedTuple):
    x: object
    y: object


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    until = time.monotonic() + 5
    while (left := [t for t in threading.enumerate() if t.name == "interop.prefetch"]) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left


@pytest.mark.parametrize("copy", [True, None])
def test_every_kind_of_batch(copy):
    x, y = torch.randn(4, 3), torch.arange(4)
    bf16 = x.to(torch.bfloat16)
    batch = {"p": Pair(x, y), "n": [np.float32(2) * x.numpy(), "text", 3, None], "b": (bf16, x > 0, np.array(["a"]))}
    (found,) = interop.prefetch([batch], copy=copy)
    assert isinstance(found["p"], Pair)
    np.testing.assert_array_equal(found["p"].x, x)
    assert found["p"].y.dtype == np.int32
    np.testing.assert_array_equal(found["p"].y, y)
    np.testing.assert_array_equal(found["n"][0], 2 * x.numpy())
    assert found["n"][1:] == ["text", 3, None]
    np.testing.assert_array_equal(found["b"][0].astype(np.float32), bf16.float())
    np.testing.assert_array_equal(found["b"][1], x > 0)
    assert found["b"][2] is batch["b"][2]


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_in_order_again_and_again(workers):
    data = TensorDataset(torch.arange(20.0).view(10, 2), torch.arange(10))
    context = "forkserver" if workers else None
    loader = DataLoader(data, batch_size=4, num_workers=workers, multiprocessing_context=context)
    batches = interop.prefetch(loader, copy=None)
    assert len(batches) == 3
    for _ in range(1 if workers else 2):
        for found, expected in zip(batches, loader, strict=True):
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)


def test_two_passes_at_once():
    batches = interop.prefetch([np.int32([i]) for i in range(5)], size=1)
    assert [(int(a[0]), int(b[0])) for a, b in zip(batches, batches, strict=True)] == [(i, i) for i in range(5)]


def test_a_snapshot_does_not_see_a_reused_batch():
    for make in (lambda: torch.zeros(1000), lambda: np.zeros(1000, np.float32)):
        reused = make()

        def loader(reused=reused):
            for i in range(6):
                reused[:] = i
                yield reused

        assert [float(x[0]) for x in interop.prefetch(loader())] == [0, 1, 2, 3, 4, 5]


def test_sharing_is_sharing():
    x = torch.zeros(1024)
    assert x.data_ptr() % 64 == 0
    (found,) = interop.prefetch([x], copy=False)
    assert found.unsafe_buffer_pointer() == x.data_ptr()
    for bad in (x[1:], x[1:].numpy(), torch.arange(3), np.arange(3)):
        with pytest.raises(ValueError, match=r"batch\[0\]: cannot share"):
            next(iter(interop.prefetch([(bad,)], copy=False)))


def test_64_bits():
    edge = [2**31 - 1, -(2**31)]
    for x in (torch.tensor(edge), np.array(edge)):
        (found,) = interop.prefetch([x])
        assert found.dtype == np.int32
        assert found.tolist() == edge
    for x in (torch.tensor([2**31]), np.array([-(2**31) - 1]), np.array([2**32], np.uint64)):
        with pytest.raises(OverflowError, match=r"batch\['y'\]: u?int64 values"):
            next(iter(interop.prefetch([{"y": x}])))
    for x in (torch.zeros(2, dtype=torch.float64), np.zeros(2)):
        with pytest.raises(TypeError, match=r"batch\['x'\]: .*float64 would be narrowed"):
            next(iter(interop.prefetch([{"x": x}])))


def test_x64_is_the_callers(x64):
    for x in (torch.tensor([2**40]), np.array([2**40]), np.array([0.1])):
        (found,) = interop.prefetch([x])
        assert found.dtype.itemsize == 8
        assert found[0] == x[0].item()


def test_an_error_comes_at_its_place_with_its_traceback():
    def failing_loader():
        yield np.float32([0])
        yield np.float32([1])
        raise KeyError("broken")

    batches = iter(interop.prefetch(failing_loader(), size=4))
    assert [float(next(batches)[0]) for _ in range(2)] == [0, 1]
    with pytest.raises(KeyError, match="broken") as info:
        next(batches)
    assert "failing_loader" in [f.name for f in traceback.extract_tb(info.value.__traceback__)]
    assert list(batches) == []


@pytest.mark.parametrize("how", ["break", "del", "close", "interrupt"])
def test_stopping_early_ends_the_thread_and_the_loader(how):
    closed, made = threading.Event(), []

    def endless():
        try:
            while True:
                made.append(0)
                yield np.float32([1])
        finally:
            closed.set()

    def consume():
        batches = iter(interop.prefetch(endless(), size=2))
        for _ in batches:
            if how == "interrupt":
                raise KeyboardInterrupt
            break
        if how == "close":
            batches.close()
            assert list(batches) == []

    if how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            consume()
    else:
        consume()
    assert closed.wait(5)
    assert len(made) <= 4


def test_it_runs_ahead_by_size():
    made = []
    batches = iter(interop.prefetch((made.append(i) or np.int32([i]) for i in range(9)), size=3))
    until = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2]
    batches.close()


def test_uneven_last_batch():
    data = [{"x": x, "n": torch.tensor(7)} for x in torch.arange(1.0, 6).split(2)]
    assert [b["x"].tolist() for b in interop.prefetch(data)] == [[1, 2], [3, 4], [5]]
    assert [b["x"].tolist() for b in interop.prefetch(data, last="drop")] == [[1, 2], [3, 4]]
    padded = [(b["x"].tolist(), m.tolist(), int(b["n"])) for b, m in interop.prefetch(data, last="pad")]
    assert padded == [([1, 2], [True] * 2, 7), ([3, 4], [True] * 2, 7), ([5, 0], [True, False], 7)]


@pytest.mark.parametrize("last", ["drop", "pad"])
def test_what_cannot_be_evened_out(last):
    with pytest.raises(ValueError, match="at most the first batch's 2 rows, found 3"):
        list(interop.prefetch([np.zeros(2, np.float32), np.zeros(3, np.float32)], last=last))
    with pytest.raises(ValueError, match="one size along axis 0"):
        list(interop.prefetch([(np.zeros(2, np.float32), np.zeros(3, np.float32))], last=last))


def test_bad_arguments():
    with pytest.raises(ValueError, match="size: expected at least 1, found 0"):
        interop.prefetch([], size=0)
    with pytest.raises(ValueError, match="last: expected"):
        interop.prefetch([], last="repeat")
    with pytest.raises(TypeError):
        len(interop.prefetch(iter([])))
    assert list(interop.prefetch([])) == []


def test_the_page_runs():
    page = (ROOT / "docs" / "data.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})


SHARDED = """
import jax, numpy as np, torch, interop
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding
mesh = jax.make_mesh((4, 2), ("data", "model"))
rows, both, none = (NamedSharding(mesh, s) for s in (P("data"), P(("data", "model")), P()))
x, y = torch.randn(16, 3), torch.arange(16)
for sharding in (rows, both, none, (both, rows), (rows, None)):
    for copy in (True, None):
        ((a, b),) = interop.prefetch([(x, y)], sharding, copy=copy)
        np.testing.assert_array_equal(a, x)
        np.testing.assert_array_equal(b, y)
        first, second = sharding if isinstance(sharding, tuple) else (sharding, sharding)
        assert a.sharding == first, a.sharding
        assert b.devices() == {jax.devices()[0]} if second is None else b.sharding == second
*_, (b, m) = interop.prefetch(x.split(12), rows, last="pad")
assert m.sharding == rows and b.sharding == rows and m.sum() == 4
np.testing.assert_array_equal(np.asarray(b)[:4], x[12:])
try:
    list(interop.prefetch([{"x": x[:6]}], rows))
except ValueError as error:
    assert "batch['x']: axis 0 of size 6 is not divided by the mesh's 'data' of size 4" in str(error), error
else:
    raise AssertionError
left = iter(interop.prefetch([x] * 9, rows))  # and the process ends all the same
next(left)
"""


def test_sharded_over_eight_devices():
    """In a process of its own: the devices are made as JAX starts."""
    child.run(8, "-c", SHARDED, timeout=120)
