"""jopt.shard_state on eight simulated devices: numbers, places, collectives, bytes, and what is refused.

The devices must be asked for before JAX starts: one process runs every `check_*` of this module, each of which is a
test here.
"""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jopt
from tests import cases, child

DEVICES = 8
SHAPES = {"a": (64, 32), "b": (64, 32), "wide": (6, 96), "bias": (16,), "odd": (13, 7)}
MIN_SIZE = 64
REPLICATED = P()
DIVIDED = {"a": P("data", None), "b": P("data", None), "wide": P(None, "data")}
FIRST = [next(c for c in cases.CASES if c.name == name) for name in dict.fromkeys(c.name for c in cases.CASES)]


def mesh_of(sizes=(DEVICES,), names=("data",), explicit=False):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def make(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def replicated(tree, mesh):
    return jax.device_put(tree, NamedSharding(mesh, P()))


def collectives(program):
    """The collective operations of a compiled program, and how many elements each gives."""
    found = []
    for shapes, kind in re.findall(r"= (.+?) (all-to-all|all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", program):
        sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        found.append((kind, int(sum(sizes))))
    return found


def products(program):
    """How many numbers the matrix products of a compiled program give, a loop's counted once."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* dot\(", program)
    return sum(int(np.prod([int(n) for n in dims.split(",")])) for dims in shapes)


def assert_equal(ours, theirs, tolerance=0.0):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype, path
        assert cases.difference(a, b) <= tolerance, (path, cases.difference(a, b))


def run_both(tx, shapes=SHAPES, *, mesh=None, dtype=jnp.float32, params_at=REPLICATED, steps=4, **arguments):
    """Some steps, sharded and alone: both outcomes, the transformation, the compiled step."""
    mesh = mesh or mesh_of()
    host = {name: x.astype(dtype) for name, x in make(shapes).items()}
    at = {name: NamedSharding(mesh, params_at[name] if isinstance(params_at, dict) else params_at) for name in host}
    params = jax.device_put(host, at)
    sharded = jopt.shard_state(tx, params, mesh, min_size=MIN_SIZE, **arguments)
    state = sharded.init(params)
    compiled = jax.jit(sharded.step, donate_argnums=(1, 2)).lower(params, state, params).compile()
    alone, alone_step = jax.tree.map(jnp.asarray, host), jax.jit(functools.partial(jopt.around.chaining.step, tx))
    alone_state = tx.init(alone)
    for i in range(1, steps + 1):
        grads = {name: x.astype(dtype) for name, x in make(shapes, seed=i).items()}
        params, state = compiled(jax.device_put(grads, at), state, params)
        alone, alone_state = alone_step(grads, alone_state, alone)
    return (params, state), (alone, alone_state), sharded, compiled


def in_one_number(state):
    """Prodigy's state without the numbers that hold what float32 leaves of others.

    Its numerator, a sum of either sign, is told by what it makes of the step size: that is rounded as the others are.
    """
    scalars = {name: x for name, x in state.scalars.items() if not name.endswith("_rest")}
    total = sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(state.slots["s"]))
    scalars["d_numerator"] = scalars["d"] + scalars["d_numerator"] / total
    return state._replace(scalars=scalars)


# --- numbers, places, collectives ----------------------------------------------------------------------


def check_step(case):
    shapes = {name: s for name, s in SHAPES.items() if len(s) == 2 or not case.matrices}
    ours, theirs, sharded, compiled = run_both(case.jopt(), shapes)
    exact = case.scope == "element" or case.name == "muon"
    if case.name == "prodigy":
        both = [(params, in_one_number(state)) for params, state in (ours, theirs)]
        assert_equal(*both, cases.FRONT_ENDS["float32"])
    elif case.jopt().rule.by_operations:
        assert_equal(ours, theirs, 0.0 if exact else cases.FRONT_ENDS["float32"])
    else:  # a basis of what no gradient has a part in is anybody's choice
        assert_equal(ours[0], theirs[0], cases.EIGENVECTORS)

    # Places.
    params, state = ours
    assert all(x.sharding.is_fully_replicated for x in params.values())
    assert all(x.sharding.is_fully_replicated for x in [state.count, *state.scalars.values()])
    per_device = 0
    for slot, tree in state.slots.items():
        for name, x in tree.items():
            if x is None:
                continue
            spec = [
                axis if n == m else None
                for axis, n, m in zip(DIVIDED.get(name, [None] * x.ndim), x.shape, shapes[name], strict=True)
            ]
            assert x.sharding.is_equivalent_to(NamedSharding(sharded_mesh(sharded), P(*spec)), x.ndim), (slot, name)
            assert x.sharding.is_equivalent_to(sharded.shardings.slots[slot][name], x.ndim)
            per_device += x.nbytes // (DEVICES if any(spec) else 1)
    assert sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.slots)) == per_device

    # The compiler's count: parameters, gradients and the state's part, and all but the gradients written in place.
    memory = compiled.memory_analysis()
    rest = sum(x.nbytes for x in [state.count, *state.scalars.values()])
    whole = sum(x.nbytes for x in params.values())
    assert memory.argument_size_in_bytes == 2 * whole + per_device + rest
    assert memory.alias_size_in_bytes == whole + per_device + rest

    if not case.jopt().rule.by_operations:  # the partitioner divides the products with the bases as it finds best
        return

    # Each divided parameter is gathered once; tensor rules sum their norms, means of rows or columns.
    found = collectives(compiled.as_text())
    if case.matrices:  # the matrix of a shape of its own; of two alike each goes to a device, and from it
        wide, alike = ("all-gather", 6 * 96), ("all-to-all", 64 * 32)
        to_all = [("all-reduce", 2 * 64 * 32), alike]
        # In parts, which have two norms together; and the parameters to all.
        to_parts = [("all-gather", 64 * 32)] * 2 + [("all-reduce", 4), alike, alike]
        assert sorted(found) == [wide, *(to_all if case.name == "muon" else to_parts)]
        return
    divided = [shapes[name] for name in DIVIDED if state.slots]
    gathered = sum(n for kind, n in found if kind == "all-gather")
    assert gathered == sum(rows * columns for rows, columns in divided), found
    reduced = sum(n for kind, n in found if kind == "all-reduce")
    norms = dict.fromkeys(("lamb", "lars", "prodigy"), 2 * len(divided))
    sums = norms | {"adafactor": sum(4 + max(s) for s in divided), "mars": len(divided)}
    assert reduced <= sums.get(case.name, 0), found
    assert {kind for kind, _ in found} <= {"all-gather", "all-reduce"}, found


def sharded_mesh(sharded):
    return sharded.shardings.count.mesh


def check_sparse_rows():
    """SparseAdam: its rows are gathered, never the table."""
    mesh, tx = mesh_of(), jopt.sparse_adam(lr=0.1)
    table = make({"table": (64, 16)})
    params = replicated(table, mesh)
    sharded = jopt.shard_state(tx, params, mesh)
    state, alone, alone_state = sharded.init(params), table, tx.init(table)
    step_alone = jax.jit(tx.step)
    assert state.slots["exp_avg"]["table"].addressable_shards[0].data.shape == (8, 16)
    for i in range(3):
        rng = np.random.default_rng(i)
        rows, ids = rng.standard_normal((8, 16), np.float32), rng.integers(0, 64, (8, 1), np.int32)
        grads = {"table": BCOO((jnp.asarray(rows), jnp.asarray(ids)), shape=(64, 16))}
        alone, alone_state = step_alone(grads, alone_state, alone)
        compiled = jax.jit(sharded.step).lower(replicated(grads, mesh), state, params).compile()
        params, state = compiled(replicated(grads, mesh), state, params)
    assert_equal((params, state), (alone, alone_state))
    assert sum(n for _, n in collectives(compiled.as_text())) <= 4 * 8 * 16


def check_low_precision():
    """bfloat16 parameters, their master copies and state in float32, divided."""
    tx = jopt.adamw(lr=0.02, master_copy=True, state_dtype=jnp.float32)
    ours, theirs, *_ = run_both(tx, dtype=jnp.bfloat16)
    assert_equal(ours, theirs)
    assert ours[1].slots["master"]["a"].addressable_shards[0].data.shape == (8, 32)


def check_sharded_parameters():
    """FSDP: the state lies where its parameters do, and Adam's step needs no other device."""
    at = {"a": P("data"), "b": P(None, "data"), "wide": P(None, "data"), "bias": P("data"), "odd": P()}
    for axis in ("data", None):
        ours, theirs, _, compiled = run_both(jopt.adamw(lr=0.02), params_at=at, axis=axis)
        assert_equal(ours, theirs)
        for tree in (ours[0], ours[1].slots["exp_avg"]):
            assert all(
                x.sharding.is_equivalent_to(NamedSharding(mesh_of(), at[name]), x.ndim) for name, x in tree.items()
            )
        assert collectives(compiled.as_text()) == []
    shapes = {name: SHAPES[name] for name in ("a", "b", "wide")}
    ours, theirs, _, compiled = run_both(jopt.muon(lr=0.02), shapes, params_at=at | {"b": P("data")})
    assert_equal(ours, theirs)
    found = sorted(collectives(compiled.as_text()))
    assert found == [("all-gather", 6 * 96), ("all-to-all", 64 * 32), ("all-to-all", 64 * 32)]


def check_sums_of_divided_parameters():
    """Each device sums its part: nothing is gathered, also where CPU joins the last axes of a convolution's weight."""
    at = {"outputs": P("data"), "inputs": P(None, "data"), "matrix": P("data", None)}
    shapes = {"outputs": (32, 16, 3, 3), "inputs": (4, 64, 3, 3), "matrix": (64, 32)}
    for axis in ("data", None):
        ours, theirs, _, compiled = run_both(jopt.prodigy(), shapes, params_at=at, axis=axis)
        both = [(params, in_one_number(state)) for params, state in (ours, theirs)]
        assert_equal(*both, cases.FRONT_ENDS["float32"])
        found = collectives(compiled.as_text())
        assert {kind for kind, _ in found} == {"all-reduce"}, found


def check_muon_divided():
    """Each matrix is iterated on one device; to it and back each device sends and gets what it has, and no more."""
    size = 64 * 32
    alone = {"0": (64, 32)}
    tx = jopt.muon(lr=0.02)
    params = make(alone)
    one = products(jax.jit(tx.step).lower(params, tx.init(params), params).compile().as_text())
    both = mesh_of((4, 2), ("data", "model"))
    for count, mesh, axes in ((3, mesh_of(), "data"), (11, mesh_of(), "data"), (16, both, ("data", "model"))):
        shapes = {str(i): (64, 32) for i in range(count)}
        each = -(-count // DEVICES)  # the most that a device has
        for at in (P(), P(axes)):
            ours, theirs, _, compiled = run_both(tx, shapes, mesh=mesh, params_at=at, axis=axes, steps=2)
            assert_equal(ours, theirs)
            program = compiled.as_text()
            assert products(program) == each * one
            found = sorted(collectives(program))
            there = ("all-to-all", each * size)
            gather, add = ("all-gather", DEVICES * each * size), ("all-reduce", count * size)
            allowed = [[there, there]] if at == P(axes) else [[gather, there], [add, there]]
            assert found in allowed, (count, at, found)


def check_large_muon():
    """A matrix too large for a device is divided along its longer side: of it no device ever has all."""
    tx, at = jopt.muon(lr=0.02), {"wide": P(None, "data"), "tall": P("data")}
    shapes = {"wide": (16, 512), "tall": (512, 16)}
    whole = run_both(tx, shapes, params_at=at)[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jopt.numerics, "LARGE", 16 * 512 - 1)
        jax.clear_caches()  # of what was traced with another
        ours, theirs, _, compiled = run_both(tx, shapes, params_at=at)
    jax.clear_caches()
    assert_equal(ours, theirs, cases.MUON["float32"])  # a product is summed in parts
    found = collectives(compiled.as_text())
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert sum(n for _, n in found) == 2 * (16 * 16 + 1)  # in each turn of the loop x @ x.T; the norm
    assert compiled.memory_analysis().temp_size_in_bytes < whole.memory_analysis().temp_size_in_bytes / 4


def check_gathered_in_pieces():
    """As for a TPU: parameters that were divided for a step are gathered piece after piece, where they lay."""
    shapes = {"rows": (512, 33), "narrow": (2400, 6), "columns": (37, 512), "cube": (40, 256, 3), "vector": (64,)}
    for explicit in (False, True):
        for mesh, axes, at in (
            (mesh_of(explicit=explicit), "data", P()),
            (mesh_of((4, 2), ("data", "model"), explicit), "data", {"columns": P(None, "model")}),
            (mesh_of((4, 2), ("data", "model"), explicit), ("model", "data"), P()),
        ):
            places = dict.fromkeys(shapes, P()) | (at if isinstance(at, dict) else {})
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jopt.sharding, "IN_PIECES", {"cpu"})
                patch.setattr(jopt.sharding, "PIECE", 8192)
                for tx in (jopt.adamw(lr=0.02), jopt.chain(jopt.clip_grad_value(0.5), jopt.adagrad(lr=0.1))):
                    ours, theirs, _, compiled = run_both(tx, shapes, mesh=mesh, params_at=places, axis=axes)
                    assert_equal(ours, theirs)
                    for name, x in ours[0].items():
                        assert x.sharding.is_equivalent_to(NamedSharding(mesh, places[name]), x.ndim)
            found = collectives(compiled.as_text())
            assert {kind for kind, _ in found} == {"all-gather"}
            assert max(n for _, n in found) <= 8 * 256 * 3  # eight rows, of arrays of more than twice that


def check_two_axes():
    """Tensor parallelism along one axis, the state along both; and along two axes at once."""
    mesh = mesh_of((4, 2), ("data", "model"))
    at = {name: P(None, "model") if len(s) == 2 and s[1] % 2 == 0 else P() for name, s in SHAPES.items()}
    ours, theirs, sharded, _ = run_both(jopt.adamw(lr=0.02), mesh=mesh, params_at=at)
    assert_equal(ours, theirs)
    assert sharded.shardings.slots["exp_avg"]["a"].spec == P("data", "model")
    assert sharded.shardings.slots["exp_avg"]["wide"].spec == P(None, ("model", "data"))
    assert ours[0]["a"].sharding.spec in (P(None, "model"), P(None, ("model",)))
    both = jopt.shard_state(jopt.adamw(), replicated(make(SHAPES), mesh), mesh, ("data", "model"))
    assert both.shardings.slots["exp_avg"]["a"].spec == P(("data", "model"), None)


def train(mesh, params, tx, steps=5):
    """A network whose batch is divided; mesh None: one device."""
    rng = np.random.default_rng(7)
    sharded = tx if mesh is None else jopt.shard_state(tx, params, mesh, min_size=MIN_SIZE)
    state = sharded.init(params)

    def loss_of(params, x, y):
        hidden = jax.nn.relu(x @ params["w1"] + params["b1"][None])
        return jnp.mean((hidden @ params["w2"] - y) ** 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        params, state = sharded.step(grads, state, params)
        return params, state, loss

    losses = []
    for _ in range(steps):
        batch = rng.standard_normal((32, 16), np.float32), rng.standard_normal((32, 8), np.float32)
        if mesh is not None:
            batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
    return params, state, losses


def check_training():
    """One jitted step with a divided batch, on automatic and on explicit axes, as on one device."""
    shapes = {"w1": (16, 64), "b1": (64,), "w2": (64, 8)}
    tx = jopt.chain(
        jopt.clip_grad_norm(0.5), jopt.param_groups(jopt.adamw, {"w1": jopt.muon(lr=0.01), "b1": {"lr": 0.1}}, lr=0.02)
    )
    expected, _, losses = train(None, jax.tree.map(jnp.asarray, make(shapes)), tx)
    for explicit in (False, True):
        mesh = mesh_of(explicit=explicit)
        params, state, found = train(mesh, replicated(make(shapes), mesh), tx)
        assert np.allclose(found, losses, rtol=cases.FRONT_ENDS["float32"])
        # Gradients, summed over devices, differ by an ulp, on which Muon's iteration in bfloat16 turns.
        for name, tolerance in (("w1", cases.MUON["float32"]), ("b1", 1e-4), ("w2", 1e-4)):
            assert cases.difference(params[name], expected[name]) <= tolerance, (name, explicit)
        momentum = state[1].groups[0].slots["momentum_buffer"]["w1"]
        assert momentum.addressable_shards[0].data.size == momentum.size // DEVICES


def check_compositions():
    """What wraps a step, and optax's own; both ways in, `step` and `update`."""
    mesh = mesh_of()
    grads = make(SHAPES, seed=3)
    for tx, exact in (
        (jopt.skip_nonfinite(jopt.adamw(lr=0.02)), True),
        (jopt.param_groups(jopt.adamw, {"^b": None, "wide": {"lr": 0.1}}, lr=0.02), True),
        (optax.adamw(0.02), False),
        (optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2).gradient_transformation(), True),
    ):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # which optax needs
            ours, theirs, sharded, _ = run_both(tx, steps=3)
            updates, _ = jax.jit(sharded.update)(replicated(grads, mesh), ours[1], ours[0])
            expected, _ = tx.update(grads, theirs[1], theirs[0])
        assert_equal(ours, theirs, 0.0 if exact else cases.FRONT_ENDS["float32"])
        largest = [x for x in jax.tree.leaves(ours[1]) if x.shape == SHAPES["a"]]
        assert largest
        assert all(x.addressable_shards[0].data.shape == (8, 32) for x in largest)
        added = [jax.tree.map(np.add, jax.device_get(theirs[0]), jax.device_get(x)) for x in (updates, expected)]
        assert_equal(*added, cases.UPDATES)

    # What is frozen does not move.
    *_, compiled = run_both(jopt.param_groups(jopt.adamw, {"^b": None}))
    assert sum(n for _, n in collectives(compiled.as_text())) == 64 * 32 + 6 * 96

    # Packed: a buffer is divided as an array is, where its length allows.
    packed = jopt.pack({"kernel": jnp.ones((200, 200)), "bias": jnp.ones(10)})
    sharded = jopt.shard_state(jopt.adamw(), packed, mesh)
    state = sharded.init(packed)
    packed, state = sharded.step(packed, state, packed, active=None)
    (moment,) = jax.tree.leaves(state.slots["exp_avg"])
    assert moment.addressable_shards[0].data.size == moment.size // DEVICES

    # What is like the parameters: an average, kept where the state is.
    params = replicated(make(SHAPES), mesh)
    sharded = jopt.shard_state(jopt.adamw(), params, mesh, min_size=MIN_SIZE)
    average, ema = jopt.ema(0.9), jax.jit(lambda p, s: (lambda a: a._replace(params=sharded.shard(a.params)))(s))
    state = average.init(params)
    state = ema(params, average.update(params, state))
    assert state.params["a"].addressable_shards[0].data.shape == (8, 32)
    assert_equal(state.params, make(SHAPES))

    # A parameter without gradient, and one that is not active, are kept.
    state = sharded.init(params)
    some = {name: None if name == "a" else x for name, x in grads.items()}
    active = {name: name != "b" for name in SHAPES}
    new, state = sharded.step(some, state, params, active=active)
    assert_equal({n: new[n] for n in "ab"}, {n: params[n] for n in "ab"})
    assert cases.difference(new["wide"], params["wide"]) > 0
    assert np.asarray(state.scalars["step"]).tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]


def check_export():
    """A divided step as an artefact, read back, is the step."""
    pytest.importorskip("flatbuffers", reason="jax.export writes with it: pip install flatbuffers")
    mesh = mesh_of()
    params = replicated(make(SHAPES), mesh)
    tx = jopt.shard_state(jopt.adamw(lr=0.02), params, mesh, min_size=MIN_SIZE)
    state = tx.init(params)
    artefact = jax.export.export(jax.jit(tx.step), platforms=["cpu", "tpu"])(params, state, params).serialize()
    read = jax.export.deserialize(artefact)
    assert read.nr_devices == DEVICES
    found = jax.jit(read.call)(params, state, params)
    assert_equal(found, jax.jit(tx.step)(params, state, params))
    assert found[1].slots["exp_avg"]["a"].addressable_shards[0].data.shape == (8, 32)


# --- what is refused -----------------------------------------------------------------------------------


class Elsewhere:
    """A device of another platform."""

    platform, id, process_index, device_kind = "tpu", 99, 0, "TPU v5 lite"


def check_refusals():
    mesh, half = mesh_of(), Mesh(np.array(jax.devices()[:4]), ("data",))
    params = replicated(make(SHAPES), mesh)
    tx = jopt.adamw()

    def refused(error, text, f, *args, **kwargs):
        with pytest.raises(error, match=text):
            f(*args, **kwargs)

    shard = functools.partial(jopt.shard_state, tx)
    refused(TypeError, "mesh: expected a jax.sharding.Mesh, found str", shard, params, "data")
    refused(TypeError, r"axis: expected a name, a tuple of names or None, found 3", shard, params, mesh, 3)
    refused(ValueError, r"axis: .*which has 'data' of size 8; found 'model' in 'model'", shard, params, mesh, "model")
    refused(ValueError, r"axis: .*different axes.*\('data', 'data'\)", shard, params, mesh, ("data", "data"))
    small = replicated({"odd": np.ones((13, 7), np.float32)}, mesh)
    refused(
        ValueError, r"'data' of size 8 divides no dimension.*min_size.*params\['odd'\] \(13, 7\)", shard, small, mesh
    )
    refused(TypeError, r"params\['n'\]: expected a floating point", shard, {"n": jnp.arange(8)}, mesh)
    refused(
        ValueError,
        r"params\['a'\]: .*8 devices.*\(64, 32\) on 4 \(.*jax.device_put",
        shard,
        replicated(params, half),
        mesh,
    )
    other = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    elsewhere = jax.device_put(params, NamedSharding(other, P())) | {
        "b": jax.device_put(params["b"], NamedSharding(other, P("x")))
    }
    refused(ValueError, r"params\['b'\]: .*\{'data': 8\}.*\{'x': 4, 'y': 2\}.*\(64, 32\)", shard, elsewhere, mesh)
    mixed = Mesh(np.array([jax.devices()[0], Elsewhere()]), ("data",))
    refused(ValueError, "mesh: expected devices of one platform, found cpu, tpu", shard, params, mixed)

    sharded = shard(params, mesh)
    state = sharded.init(params)
    before = jax.tree.map(np.array, (params, state))
    there = shard(replicated(make(SHAPES), half), half)
    foreign = there.init(replicated(make(SHAPES), half))
    wider = params | {"b": replicated(np.ones((64, 16), np.float32), mesh)}
    for name, args in {
        r"state\.slots\['exp_avg'\]\['a'\]: .*mesh \{'data': 8\}.*on 4": (
            params,
            state._replace(slots=foreign.slots),
            params,
        ),
        r"state\.slots\['exp_avg'\]\['b'\]: expected shape \(64, 32\), found \(64, 16\)": (
            *(params, state._replace(slots=state.slots | {"exp_avg": wider}), params),
        ),
        r"state: expected the structure": (params, state.slots, params),
        r"params\['b'\]: expected shape \(64, 32\), found \(64, 16\)": (params, state, wider),
        r"params\['a'\]: .*on 1 \(": (
            *(params, state, params | {"a": jax.device_put(params["a"], SingleDeviceSharding(jax.devices()[3]))}),
        ),
        r"grads: expected the structure of params": ({"a": params["a"]}, state, params),
        r"grads\['b'\]: expected the parameter's shape \(64, 32\), found \(64, 16\)": (wider, state, params),
        r"params: expected the structure": (params, state, {"a": params["a"]}),
        r"params: expected the parameters, found None": (params, state, None),
    }.items():
        refused(ValueError, name, sharded.step, *args)
        refused(ValueError, name, sharded.update, *args)
    refused(ValueError, r"tree\['b'\]: expected shape", sharded.shard, wider)
    assert_equal((params, state), before)
    # Under jit JAX itself compares devices, before it runs anything.
    refused(ValueError, "incompatible devices.*", jax.jit(sharded.step), params, foreign, params)
    assert_equal((params, state), before)


def check_absent_devices():
    """A mesh of another process's devices, or of a machine to compile for."""
    absent = Mesh(np.array([jax.devices()[0], type("Absent", (Elsewhere,), {"platform": "cpu"})()]), ("data",))
    sharded = jopt.shard_state(jopt.adamw(), make(SHAPES), absent)
    with pytest.raises(ValueError, match=r"mesh: .* of its 2 devices is none that this process sees \(8 of .*'cpu'\)"):
        sharded.init(make(SHAPES))


# --- the process ---------------------------------------------------------------------------------------

UNLIKE = {case.name for case in cases.CASES if case.id in cases.UNLIKE}
STEPS = {f"step of {case.id}": functools.partial(check_step, case) for case in FIRST}
CHECKS = STEPS | {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}
del CHECKS["step"]
MANY = {name: step for name, step in STEPS.items() if step.args[0].name not in UNLIKE}
FEW = {name: f for name, f in CHECKS.items() if name not in MANY}


@pytest.mark.parametrize("name", FEW)
def test_on_eight_devices(name, tmp_path_factory):
    child.report(tmp_path_factory, "tests.jopt.test_sharding", DEVICES, name, "few")


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_the_others_on_eight_devices(name, tmp_path_factory):
    child.report(tmp_path_factory, "tests.jopt.test_sharding", DEVICES, name, "many")


if __name__ == "__main__":
    child.main({"few": FEW, "many": MANY}[sys.argv[1]])
