"""Files hold the run: what goes on from one is the run that never stopped, bit by bit; what is wrong is said."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="files of torch's runs")
pytest.importorskip("safetensors", reason="of the files extra")

import interop  # noqa: E402
import jopt  # noqa: E402
from interop import optim  # noqa: E402
from interop.runs import classes  # noqa: E402
from interop.runs.files import CheckpointError  # noqa: E402
from interop.runs.files.difference import differences  # noqa: E402
from tests import cases  # noqa: E402
from tests.checkpoints import network, trained, two_groups  # noqa: E402
from tests.interop.runs.test_moving import Model, torch_leg  # noqa: E402

STEPS = 4
FILES = ["run.pt", "run.safetensors"]
CLASSES = {case.torch: case for case in reversed(cases.TORCH_CASES)} | {
    "SGD": next(case for case in cases.CASES if case.id == "sgd-momentum")
}


def run_of(case, module=torch.optim, steps=STEPS, dtype="float32"):
    problem = cases.Problem(dtype, matrices=case.matrices)
    model = Model(problem)
    optimizer = getattr(module, case.torch)(model.parameters(), **{"lr": case.lr} | case.arguments)
    torch_leg(problem, model, optimizer, range(steps))
    return problem, model, optimizer


def blank(case, module=torch.optim):
    """A run of other values, from which nothing must stay."""
    problem, model, optimizer = run_of(case, module, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7)
    for group in optimizer.param_groups:
        group["lr"] = 123.0
    return problem, model, optimizer


def assert_same(a, b):
    """Two live runs, bit by bit."""
    found = differences(*(interop.Checkpoint.from_torch(model, optimizer) for model, optimizer in (a, b)))
    assert not found, found[0]


# --- there and back ------------------------------------------------------------------------------------------------


RUNS = [(case, "run.pt") for case in cases.TORCH_CASES] + [(CLASSES[n], "run.safetensors") for n in sorted(CLASSES)]


@pytest.mark.parametrize(("case", "file"), RUNS, ids=lambda x: getattr(x, "id", x))
def test_a_run_goes_on_from_a_file(case, file, tmp_path):
    _, model, optimizer = run_of(case)
    interop.save_checkpoint(interop.Checkpoint.from_torch(model, optimizer), tmp_path / file)
    problem, resumed, opt = blank(case)
    interop.load_checkpoint(tmp_path / file).to_torch(resumed, opt)
    assert_same((resumed, opt), (model, optimizer))
    torch_leg(problem, resumed, opt, range(STEPS, 2 * STEPS))
    _, expected, reference = run_of(case, steps=2 * STEPS)
    assert_same((resumed, opt), (expected, reference))


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_jax_has_the_run_of_the_file(name, tmp_path):
    """As `optimizer_to_jax` gives it of the live run; and from JAX comes the same run again."""
    _, model, optimizer = run_of(CLASSES[name])
    saved = interop.Checkpoint.from_torch(model, optimizer, step=STEPS)
    interop.save_checkpoint(saved, tmp_path / "run.safetensors")
    tx, params, state = interop.load_checkpoint(tmp_path / "run.safetensors").to_jax()
    _, expected_params, expected = interop.optimizer_to_jax(optimizer, model, step=saved.step)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves((expected_params, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    back = interop.Checkpoint.from_jax(tx, params, state, step=saved.step)
    assert not differences(saved, back)


def test_groups_schedules_and_averages_go_into_jax_and_files(tmp_path):
    model, optimizer = trained(groups=two_groups)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    saved = interop.Checkpoint.from_torch(
        model, optimizer, lr_scheduler=scheduler.state_dict(), ema={"n": (1, torch.ones(3)), 7: [float("inf"), None]}
    )
    tx, params, state = saved.to_jax(lr=jopt.schedules.cosine_annealing_lr(0.01, T_max=10))
    back = interop.Checkpoint.from_jax(tx, params, state)
    assert [group["params"] for group in back.optimizer.groups] == [group["params"] for group in saved.optimizer.groups]
    expected = 0.01 * (1 + np.cos(np.pi * 3 / 10)) / 2  # the schedule at step 3
    assert back.optimizer.groups[0]["lr"] == pytest.approx(expected, rel=cases.SCHEDULES["closed"])
    assert [group["weight_decay"] for group in back.optimizer.groups] == [0.1, 0.0]
    for file in FILES:
        interop.save_checkpoint(saved, tmp_path / file, verify=True)
        assert not differences(saved, interop.load_checkpoint(tmp_path / file))
    loaded = interop.load_checkpoint(tmp_path / "run.safetensors")
    scheduler.load_state_dict(loaded.extra["lr_scheduler"])


@pytest.mark.parametrize("file", ["run.pt", "run.safetensors", "run.dcp"])
def test_interop_optimizers_keep_wide_state_and_averages(file, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).bfloat16()
    optimizer = optim.AdamW(model.parameters(), lr=0.01, ema=0.9)
    model(torch.ones(2, 4).bfloat16()).sum().backward()
    optimizer.step()
    for p in model.parameters():
        optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].float() * 1.001
        optimizer.state[p]["exp_avg_sq"] = optimizer.state[p]["exp_avg_sq"].float() * 1.001
    saved = interop.Checkpoint.from_torch(model, optimizer)
    interop.save_checkpoint(saved, tmp_path / file)
    loaded = interop.load_checkpoint(tmp_path / file)
    resumed = torch.nn.Linear(4, 3).bfloat16()
    opt = optim.AdamW(resumed.parameters(), ema=0.9)
    loaded.to_torch(resumed, opt)
    assert_same((model, optimizer), (resumed, opt))
    with pytest.raises(CheckpointError, match=r"found torch.float32, which torch.optim would round"):
        loaded.to_torch(resumed, torch.optim.AdamW(resumed.parameters()))


def test_sparse_adam(tmp_path):
    def embedding():
        torch.manual_seed(0)
        model = torch.nn.Embedding(6, 2, sparse=True)
        return model, torch.optim.SparseAdam(model.parameters(), lr=0.1)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.tensor([1, 4, 1])).square().sum().backward()
        optimizer.step()

    model, optimizer = embedding()
    step(model, optimizer)
    for file in FILES:
        interop.save_checkpoint(interop.Checkpoint.from_torch(model, optimizer), tmp_path / file)
    step(model, optimizer)
    for file in FILES:
        resumed, opt = embedding()
        interop.load_checkpoint(tmp_path / file).to_torch(resumed, opt)
        step(resumed, opt)
        assert_same((resumed, opt), (model, optimizer))


def test_every_class_and_its_state_is_known():
    assert set(classes.CLASSES) == set(optim.CLASSES) - {"LBFGS"} | set(optim.OTHERS)
    for case in cases.TORCH_CASES:
        _, _, optimizer = run_of(case, steps=1)
        known = classes.CLASSES[case.torch]
        for values in optimizer.state.values():
            assert known.always <= set(values) <= known.always | known.sometimes, case.id


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_class_is_told_by_its_options(name, tmp_path):
    """A state_dict of torch's own, which does not name it."""
    _, model, optimizer = run_of(CLASSES[name])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    assert interop.load_checkpoint(tmp_path / "run.pt").optimizer.name == name


def test_options_of_others_are_no_class_of_torch(tmp_path):
    model, optimizer = trained(torch.optim.RAdam)
    state_dict = optimizer.state_dict()
    for group in state_dict["param_groups"]:  # as LAMB has them
        for key in set(group) - {"params", "lr", "betas", "eps", "weight_decay"}:
            del group[key]
    torch.save({"model": model.state_dict(), "optimizer": state_dict}, tmp_path / "run.pt")
    loaded = interop.load_checkpoint(tmp_path / "run.pt")
    assert loaded.optimizer.name is None
    assert "the optimizer's class is not known" in loaded.oddities()
    with pytest.raises(CheckpointError, match=r"expected one of torch.optim's but LBFGS, found one of class unknown"):
        loaded.to_jax()


def test_tied_weights_are_written_once(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(300, 40)
            self.head = torch.nn.Linear(40, 300, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    model.embed.weight.grad = torch.ones(300, 40)
    optimizer.step()
    for file in FILES:
        interop.save_checkpoint(interop.Checkpoint.from_torch(model, optimizer), tmp_path / file)
        assert (tmp_path / file).stat().st_size < 4 * 3.2 * 300 * 40  # it and two moments
        loaded = interop.load_checkpoint(tmp_path / file)
        assert loaded.params["embed.weight"].data_ptr() == loaded.params["head.weight"].data_ptr()
        other = Tied()
        loaded.to_torch(other, torch.optim.Adam(other.parameters()))
        assert torch.equal(other.head.weight, model.head.weight)
    _, params, _ = loaded.to_jax()
    assert list(params) == ["embed.weight"]


def test_torch_reads_what_is_written(tmp_path):
    """With torch's own calls and nothing of ours."""
    model, optimizer = trained(groups=two_groups)
    saved = interop.Checkpoint.from_torch(model, optimizer)
    interop.save_checkpoint(saved, tmp_path / "run.pt")
    raw = torch.load(tmp_path / "run.pt", weights_only=True)
    other = network()
    opt = torch.optim.AdamW(two_groups(other))
    other.load_state_dict(raw["model"])
    opt.load_state_dict(raw["optimizer"])
    assert_same((model, optimizer), (other, opt))
    from safetensors.torch import load_file

    interop.save_checkpoint(saved, tmp_path / "run.safetensors")
    tensors = load_file(tmp_path / "run.safetensors")
    assert set(tensors) == set(saved.tensors())
    assert all(torch.equal(x, saved.tensors()[name]) for name, x in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("file", [*FILES, "run.dcp"])
def test_types_and_shapes(dtype, file, tmp_path):
    params = {
        "matrix": torch.arange(6.0).reshape(2, 3).to(dtype),
        "scalar": torch.tensor(2.0).to(dtype),
        "none": torch.zeros(0, 4).to(dtype),
        "turned": torch.arange(6.0).reshape(2, 3).to(dtype).t(),
        "part": torch.arange(6.0).to(dtype)[2:4],
    }
    if dtype.is_complex:
        params["conjugate"] = params["matrix"].conj()
    saved = interop.Checkpoint(params, {"flag": torch.tensor([True, False]), "count": torch.tensor(2**40 + 1)})
    interop.save_checkpoint(saved, tmp_path / file, verify=True)
    loaded = interop.load_checkpoint(tmp_path / file)
    assert not differences(saved, loaded)
    assert list(loaded.buffers) == ["flag", "count"]


# --- folders -------------------------------------------------------------------------------------------------------


def test_dcp(tmp_path):
    """Between torch's own save and load and ours, with the names of get_optimizer_state_dict."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = trained(groups=two_groups)
    saved = interop.Checkpoint.from_torch(model, optimizer)
    interop.save_checkpoint(saved, tmp_path / "ours.dcp", verify=True)
    other = network()
    opt = torch.optim.AdamW(two_groups(other))
    model_state, optim_state = get_state_dict(other, opt)
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(
            {"model": model_state, "optimizer": {"state": optim_state["state"]}}, checkpoint_id=tmp_path / "ours.dcp"
        )
    set_state_dict(other, opt, model_state_dict=model_state, optim_state_dict=optim_state)
    for name, x in interop.Checkpoint.from_torch(other, opt).tensors().items():
        assert torch.equal(x, interop.load_checkpoint(tmp_path / "ours.dcp").tensors()[name]), name

    model, optimizer = trained(groups=two_groups)
    theirs = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.save(theirs | {"epoch": 3}, checkpoint_id=tmp_path / "theirs")
    loaded = interop.load_checkpoint(tmp_path / "theirs")
    assert loaded.extra == {"epoch": 3}
    assert not differences(interop.Checkpoint.from_torch(model, optimizer, epoch=3), loaded)


def test_a_tensor_among_the_options(tmp_path):
    for file in [*FILES, "run.dcp"]:
        model, optimizer = trained(lr=torch.tensor(0.01))
        interop.save_checkpoint(interop.Checkpoint.from_torch(model, optimizer), tmp_path / file, verify=True)
        other = network()
        opt = torch.optim.AdamW(other.parameters(), lr=torch.tensor(5.0))
        interop.load_checkpoint(tmp_path / file).to_torch(other, opt)
        assert isinstance(opt.param_groups[0]["lr"], torch.Tensor)
        assert opt.param_groups[0]["lr"].item() == pytest.approx(0.01)


ORBAX = "of the ecosystem and files extras: make test-all installs them"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_orbax(name, tmp_path):
    """What is read is the run; and a JAX program restores `jopt.State` itself by the abstract state of `tx.init`."""
    ocp = pytest.importorskip("orbax.checkpoint", reason=ORBAX)
    _, model, optimizer = run_of(CLASSES[name])
    saved = interop.Checkpoint.from_torch(model, optimizer, step=STEPS, epoch=2)
    interop.save_checkpoint(saved, tmp_path / "run.orbax")
    assert not differences(saved, interop.load_checkpoint(tmp_path / "run.orbax"))
    tx, params, state = saved.to_jax()
    abstract = jax.eval_shape(lambda: {"params": params, "state": tx.init(params)})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(tree=ocp.args.StandardRestore(abstract))
        restored = checkpointer.restore(tmp_path / "run.orbax", args=args).tree
    assert isinstance(restored["state"], jopt.State)
    assert jax.tree.structure(restored["state"]) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves({"params": params, "state": state}), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_orbax_has_groups_buffers_and_all_types(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason=ORBAX)
    model, optimizer = trained(groups=two_groups)
    model.double()
    saved = interop.Checkpoint.from_torch(model, optimizer, ema={"w": torch.ones(3), "at": (1, None)})
    for values in saved.optimizer.state.values():
        values |= {key: x.double() for key, x in values.items() if x.dim()} | {"ema": values["exp_avg"].double()}
    saved.params["another"] = saved.params["0.weight"]
    saved.params["low"] = torch.ones(2, dtype=torch.bfloat16)
    interop.save_checkpoint(saved, tmp_path / "run.orbax", verify=True)
    loaded = interop.load_checkpoint(tmp_path / "run.orbax")
    assert not differences(saved, loaded)
    assert loaded.optimizer.groups == saved.optimizer.groups
    with pytest.raises(CheckpointError, match=r"'params.empty': orbax has no arrays of no elements"):
        interop.save_checkpoint(interop.Checkpoint({"empty": torch.zeros(0)}), tmp_path / "empty.orbax")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.orbax"]


def test_orbax_of_others(tmp_path):
    """Parameters by their path."""
    ocp = pytest.importorskip("orbax.checkpoint", reason=ORBAX)
    tree = {
        "params": {"dense": {"kernel": jax.numpy.ones((2, 3))}, "scale": jax.numpy.zeros(2)},
        "step": jax.numpy.int32(7),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", tree)
    loaded = interop.load_checkpoint(tmp_path / "theirs")
    assert {name: tuple(x.shape) for name, x in loaded.params.items()} == {"dense.kernel": (2, 3), "scale": (2,)}
    assert loaded.extra["step"].item() == 7
