"""torch's own table of optimizers (torch.testing): its bad inputs, and the parity figures that are on record."""

import json
import re

import pytest

torch = pytest.importorskip("torch", reason="torch's table")
pytest.importorskip("expecttest", reason="torch.testing._internal needs it")

from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db  # noqa: E402

import jopt  # noqa: E402
from benchmarks import parity  # noqa: E402
from interop import optim  # noqa: E402
from interop._compat import TORCH  # noqa: E402
from jopt._compat import enable_x64  # noqa: E402
from tests import cases  # noqa: E402

BAD_INPUTS = [
    pytest.param(info.optim_cls.__name__, item, id=f"{info.optim_cls.__name__}-{i}")
    for info in optim_db
    for i, item in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float32))
]


def test_the_table_is_all_there():
    assert len(BAD_INPUTS) == 124
    assert len(parity.configurations()) == (187 if TORCH < (2, 14) else 191)
    assert {info.optim_cls.__name__ for info in optim_db} == set(optim.CLASSES)


@pytest.mark.parametrize(("name", "item"), BAD_INPUTS)
def test_bad_inputs_of_the_drop_in(name, item):
    """The exception's type and torch's expression for its text."""
    cls, given = getattr(optim, name), item.optimizer_error_input
    raises = pytest.warns if issubclass(item.error_type, Warning) else pytest.raises
    if item.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with raises(item.error_type, match=item.error_regex):
            cls(given.params, **given.kwargs)
    else:
        optimizer = cls(given.params, **given.kwargs)
        with raises(item.error_type, match=item.error_regex):
            optimizer.step()


def is_plain(value):
    return isinstance(value, int | float | str | None) or (isinstance(value, tuple) and all(map(is_plain, value)))


NUMBERS = [
    p
    for p in BAD_INPUTS
    if (given := p.values[1].optimizer_error_input).params is None
    and given.kwargs
    and all(map(is_plain, given.kwargs.values()))
    and "foreach" not in given.kwargs
]


@pytest.mark.parametrize(("name", "item"), NUMBERS)
def test_bad_numbers_in_jax(name, item):
    function = getattr(jopt, parity.Configuration(name, {}, {}).lower)
    with pytest.raises(item.error_type, match=item.error_regex):
        function(**item.optimizer_error_input.kwargs)


def test_most_bad_numbers_are_among_them():
    assert {p.values[0] for p in NUMBERS} >= set(optim.CLASSES) - {"LBFGS", "Muon", "SGD"}


RECORDED = {r["configuration"]: r for r in json.loads((parity.DATA / "parity.json").read_text())["short"]}
AGAIN = [c for c in parity.distinct(parity.configurations()) if str(c) in RECORDED]


def test_all_that_was_recorded_is_measured_again():
    assert len(AGAIN) == len(RECORDED)


@pytest.mark.parametrize("c", cases.mostly_slow(AGAIN, AGAIN[::9], lambda c: re.sub(r"\W+", "-", str(c))))
def test_no_figure_worsens(c):
    """The short table again: of each optimizer two configurations, 100 steps on 4 problems."""
    import jax

    with enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        row = parity.measure(c, *parity.SHORT.values())
    before = RECORDED[str(c)]
    # Where an ulp grows, torch's own error is as much larger or smaller if it starts an ulp away.
    scatter = row["float32"].get("torch, an ulp away", 1)
    scatter = max(scatter, 1 / scatter)
    for side in ("jopt", "interop"):
        # Another processor sums and contracts in other places: a few ulp. What feeds back grows from there.
        assert row["float64"][side] <= max(1e-13, 10 * before["float64"][side])
        # Of 4 seeds the median scatters by some percent.
        assert row["float32"][side] <= max(1.15, 1.1 * before["float32"][side], 1.1 * scatter)
    if "bfloat16" in row:
        assert row["bfloat16"]["equal"] >= before["bfloat16"]["equal"] - 0.01
