"""Numbers of the authors' own code for optimizers that torch has not: tests/data/<optimizer>.json.

python -m tests.authors [NAME ...]      with torch, and what REFERENCES names, on PYTHONPATH
TORCHDYNAMO_DISABLE=1 python -m tests.authors heavyball    the state_dicts that its SOAP and PSGDKron write

A package is installed by `pip install PACKAGE==VERSION`; a file is one of a repository at the commit that is named.
The code runs for 200 steps in float64, and for some in float32 and bfloat16 too, on three parameters that start at
cos((k + 1) * index), with the gradient 0.8 * p + sin(index + step * (k + 1.5)) / 2, so that what differs feeds back.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import pathlib
import sys
from dataclasses import dataclass, field
from typing import Any

from tests import ROOT

STEPS = 200
SHAPES = ((4, 3), (5,), (2, 3, 2))
MATRICES = ((4, 3), (3, 5), (2, 6))  # of so few elements that sums in bfloat16 do not depend on their order


@dataclass(frozen=True)
class Reference:
    """Where the authors' class is, and with which arguments it runs.

    Attributes:
      source: the package and its version, or the repository, its commit and file.
      path: module and class.
      runs: arguments of each run, of the class and of jopt's function alike.
      others: arguments of the class alone, which choose among its own ways or turn off what jopt has elsewhere.
      function: jopt's, if it is not called as the reference is.
      renamed: jopt's arguments, and what the class calls them.
      edits: what is read otherwise in the authors' file, so that it computes in float64 throughout.
      shapes: of the parameters.
      warp: what the index is made to grow by, so that a matrix is of full rank. The basis of what has no gradient is
        anybody's choice.
      up_to_sign: state that is compared by its magnitude, for an eigenvector's sign is LAPACK's choice.
    """

    source: str
    path: str
    runs: tuple[dict[str, Any], ...]
    others: dict[str, Any] = field(default_factory=dict)
    function: str = ""
    renamed: dict[str, str] = field(default_factory=dict)
    edits: tuple[tuple[str, str], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    warp: float = 0.0
    up_to_sign: tuple[str, ...] = ()


class Draws:
    """The noise that jopt's rules draw, and what they count, for a reference that draws its own."""

    def at(self, optimizer: Any, param: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.place = int(optimizer.state[param]["step"]), next(i for i, p in enumerate(params) if p is param)

    def normal(self, like: Any) -> Any:
        import jax
        import torch

        jax.config.update("jax_enable_x64", True)
        key = jax.random.key(0, impl="threefry2x32")
        for part in self.place:
            key = jax.random.fold_in(key, part)
        return torch.tensor(jax.random.normal(key, like.shape, "float64").tolist(), dtype=like.dtype)

    def balances(self, optimizer: Any, refreshes: bool) -> bool:
        optimizer.refreshes = getattr(optimizer, "refreshes", 0) + int(refreshes)
        return bool(refreshes) and optimizer.refreshes % 100 == 0


DRAWS = Draws()
DECAYED = dict(lr=0.01, weight_decay=0.1)
REFERENCES = {
    "lion": Reference(
        "google/automl at 6a54c87, lion/lion_pytorch.py",
        "lion_pytorch.Lion",
        (dict(lr=0.01), DECAYED | dict(betas=(0.95, 0.98))),
    ),
    "adan": Reference(
        "sail-sg/Adan at 2c65bea, adan.py",
        "adan.Adan",
        (dict(lr=0.01), DECAYED, DECAYED | dict(no_prox=True, betas=(0.9, 0.8, 0.95), eps=1e-4)),
        dict(foreach=False),
    ),
    "ademamix": Reference(
        "apple/ml-ademamix at c3d73c0, pytorch/ademamix.py",
        "ademamix.AdEMAMix",
        (
            dict(lr=0.01),
            DECAYED | dict(betas=(0.9, 0.99, 0.995), alpha=5.0, beta3_warmup=120, alpha_warmup=150),
            dict(lr=0.01, betas=(0.0, 0.99, 0.99), eps=1e-4),
        ),
    ),
    "adopt": Reference(
        "iShohei220/adopt at 6468572, src/adopt/adopt.py",
        "adopt.ADOPT",
        (
            dict(lr=0.01),
            DECAYED | dict(betas=(0.8, 0.99), eps=1e-3),
            DECAYED | dict(decouple=True, clip_lambda=None),
            dict(lr=0.001, maximize=True),
        ),
        dict(foreach=False),
    ),
    "lamb": Reference(
        "timm==1.0.31",
        "timm.optim.lamb.Lamb",
        (
            dict(lr=0.01),
            dict(lr=0.01, weight_decay=0.0, bias_correction=False),
            dict(lr=0.01, weight_decay=0.0, always_adapt=True, betas=(0.8, 0.95), eps=1e-3),
            dict(lr=0.01, weight_decay=0.1, trust_clip=True, grad_averaging=False),
        ),
        dict(max_grad_norm=None, foreach=False),
    ),
    "lars": Reference(
        "timm==1.0.31",
        "timm.optim.lars.Lars",
        (
            dict(lr=0.1),
            dict(lr=0.5, momentum=0.9, weight_decay=0.1, trust_coeff=0.02),
            dict(lr=0.5, momentum=0.9, nesterov=True, always_adapt=True, trust_coeff=0.02),
            dict(lr=0.01, momentum=0.5, dampening=0.5, weight_decay=0.1, trust_coeff=0.02, trust_clip=True, eps=1e-3),
        ),
        dict(foreach=False),
    ),
    "nor_muon": Reference(
        "zichongli5/NorMuon at d45c9a4, normuon.py",
        "normuon.SingleDeviceNorMuon",
        (dict(lr=0.02), dict(lr=0.05, weight_decay=0.1, momentum=0.9, beta2=0.8)),
        shapes=MATRICES,
        edits=(("    return X\n", "    return X.to(G.dtype)\n"),),
    ),
    "schedule_free_adamw": Reference(
        "schedulefree==1.4.1",
        "schedulefree.AdamWScheduleFree",
        (
            dict(lr=0.01),
            dict(lr=0.01, weight_decay=0.1, warmup_steps=30, betas=(0.95, 0.99), eps=1e-4),
            dict(lr=0.01, r=0.5, weight_lr_power=1.0),
        ),
        dict(foreach=False),
    ),
    "schedule_free_sgd": Reference(
        "schedulefree==1.4.1",
        "schedulefree.SGDScheduleFree",
        (dict(lr=0.1), dict(lr=0.1, momentum=0.8, weight_decay=0.1, warmup_steps=30, r=1.0)),
        dict(foreach=False),
    ),
    "soap": Reference(
        "nikhilvyas/SOAP at a1e5535, soap.py",
        "soap.SOAP",
        (
            dict(lr=0.01),
            dict(lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), shampoo_beta=0.7, eps=1e-3, precondition_frequency=3),
            dict(lr=0.01, max_precond_dim=3, normalize_grads=True, correct_bias=False),
            dict(lr=0.01, precondition_1d=True, merge_dims=True, max_precond_dim=4, precondition_frequency=1),
            dict(lr=0.01, merge_dims=True, max_precond_dim=4, data_format="channels_last"),
        ),
        # In other types than float32 theirs fails at the first power iteration: `original_device` is not defined.
        edits=(
            (".float()", ".double()"),
            ("torch.float:", "torch.float64:"),
            ("device=grad.device)", "device=grad.device, dtype=grad.dtype)"),
        ),
        shapes=((4, 3), (2,), (3, 1, 4), (2, 1, 2, 3)),
        warp=0.1,
        up_to_sign=("exp_avg", "Q"),
    ),
    "kron": Reference(
        "kron-torch==0.3.3",
        "kron_torch.kron.Kron",
        (
            dict(lr=0.01),
            dict(lr=0.01, b1=0.8, weight_decay=0.1, preconditioner_update_probability=0.3, precond_init_scale=2.0),
            dict(lr=0.01, momentum_into_precond_update=False, merge_dims=False, precond_lr=0.03),
            dict(lr=0.01, max_size_triangular=3, min_ndim_triangular=1),
            dict(lr=0.01, memory_save_mode="smart_one_diag"),
            dict(lr=0.01, memory_save_mode="one_diag", merge_dims=False),
            dict(lr=0.01, memory_save_mode="all_diag"),
        ),
        edits=(
            ("@torch.compile\n", ""),
            (".float()", ".double()"),
            ("precond_dtype = torch.float32", "precond_dtype = torch.float64"),
            # Theirs adds this noise to the momentum that the step is made of too, or to the parameter's gradient.
            ("G += eps.sqrt()", "G = G + eps.sqrt()"),
            # The draws are ours, and so is when factors are balanced, which changes nothing but their sizes.
            ("import string\n", "import string\nfrom tests.authors import DRAWS\n"),
            ("torch.randn_like(G)", "DRAWS.normal(G)"),
            (
                '                state["step"] += 1\n',
                '                state["step"] += 1\n                DRAWS.at(self, p)\n',
            ),
            ("self.rng.random() < 0.01 and do_update", "DRAWS.balances(self, do_update)"),
        ),
        shapes=((4, 3), (2,), (3, 1, 4), (2, 1, 2, 3)),
    ),
    "prodigy": Reference(
        "prodigyopt==1.1.2",
        "prodigyopt.Prodigy",
        (
            dict(),
            dict(weight_decay=0.1, use_bias_correction=True, safeguard_warmup=True, betas=(0.9, 0.99)),
            dict(lr=0.5, weight_decay=0.01, decouple=False, beta3=0.95, eps=1e-4, d_coef=2.0),
            dict(betas=(0.0, 0.999), d0=1e-4, growth_rate=1.2),
        ),
    ),
    "cautious_adamw": Reference(
        "timm==1.0.31",
        "timm.optim.adamw.AdamWLegacy",
        (dict(cautious=True, lr=0.01), dict(cautious=True, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-3)),
        function="adamw",
        renamed={"cautious": "caution"},
    ),
    "cautious_lion": Reference(
        "timm==1.0.31",
        "timm.optim.lion.Lion",
        (dict(cautious=True, lr=0.01), DECAYED | dict(cautious=True, betas=(0.95, 0.98))),
        dict(foreach=False),
        function="lion",
        renamed={"cautious": "caution"},
    ),
}

CLASSES = {  # of interop.optim, by the reference
    "adan": "Adan",
    "ademamix": "AdEMAMix",
    "adopt": "ADOPT",
    "cautious_adamw": "CautiousAdamW",
    "cautious_lion": "CautiousLion",
    "kron": "Kron",
    "lamb": "LAMB",
    "lars": "LARS",
    "lion": "Lion",
    "mars": "Mars",
    "nor_muon": "NorMuon",
    "prodigy": "Prodigy",
    "schedule_free_adamw": "AdamWScheduleFree",
    "schedule_free_sgd": "SGDScheduleFree",
    "soap": "SOAP",
}


def refreshes(step: int) -> float:
    """heavyball's factors are fitted in the first half of the run alone: what is drawn then is not compared."""
    return float(step <= 20)


HALF = 20  # steps of heavyball before its state_dict is taken, and after
# By our class: heavyball's, its arguments, ours. Only these two have a state that no other class writes.
HEAVYBALL = {
    "SOAP": (
        ("SOAP", dict(precondition_frequency=1, use_precond_schedule=False), dict(precondition_frequency=1)),
        (
            "SOAP",
            dict(
                precondition_frequency=1,
                use_precond_schedule=False,
                merge_dims=False,
                max_precond_dim=3,
                precondition_1d=True,
            ),
            dict(precondition_frequency=1),
        ),
    ),
    "Kron": tuple(
        # Its clip is another than ours, and this run needs none.
        (
            "PSGDKron",
            dict(preconditioner_update_probability=refreshes, update_clipping=None, **more),
            dict(preconditioner_update_probability=1e-6),
        )
        for more in (
            dict(),
            dict(store_triu_as_line=False, memory_save_mode="one_diag", min_ndim_triangular=1, beta=0.8),
        )
    ),
}


def of_heavyball() -> dict[str, Any]:
    """Runs of heavyball in float32, which it computes in, as `main` writes them."""
    import copy

    import heavyball
    import numpy as np
    import torch

    shapes, found = ((4, 3), (2,), (3, 1, 4), (2, 1, 2, 3), (1, 5)), {}
    for ours, runs in HEAVYBALL.items():
        found[ours] = []
        for name, arguments, options in runs:
            params = [torch.nn.Parameter(torch.tensor(x, dtype=torch.float32)) for x in start(np, shapes, 0.1)]
            optimizer = getattr(heavyball, name)(params, lr=0.01, **arguments)
            for step in range(HALF):
                torch_step(params, optimizer, step, 0.1)
            run = {"options": options, "state_dict": as_lists(copy.deepcopy(optimizer.state_dict()))}
            run["params"] = [p.tolist() for p in params]
            for step in range(HALF, 2 * HALF):
                torch_step(params, optimizer, step, 0.1)
            found[ours].append(run | {"after": [p.tolist() for p in params]})
    return found


def start(xp: Any, shapes: Any = SHAPES, warp: float = 0.0) -> list[Any]:
    """The parameters, of NumPy's or JAX's functions."""
    return [xp.cos((k + 1) * index(xp, shape, warp)) for k, shape in enumerate(shapes)]


def index(xp: Any, shape: Any, warp: float = 0.0) -> Any:
    i = xp.arange(float(math.prod(shape))).reshape(shape)
    return i + warp * i * i


def gradients(xp: Any, params: list[Any], step: int, warp: float = 0.0) -> list[Any]:
    return [0.8 * p + 0.5 * xp.sin(index(xp, p.shape, warp) + step * (k + 1.5)) for k, p in enumerate(params)]


def torch_step(params: list[Any], optimizer: Any, step: int, warp: float = 0.0) -> None:
    """A step of a torch optimizer on these parameters."""
    import numpy as np
    import torch

    for p, grad in zip(params, gradients(np, [p.detach().numpy() for p in params], step, warp), strict=True):
        p.grad = torch.tensor(grad, dtype=p.dtype)
    optimizer.step()


def run(reference: Reference, arguments: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch

    params = [torch.nn.Parameter(torch.tensor(x)) for x in start(np, reference.shapes, reference.warp)]
    theirs = {reference.renamed.get(key, key): x for key, x in arguments.items()} | reference.others
    optimizer = authors_class(reference)(params, **theirs)
    if hasattr(optimizer, "train"):  # schedulefree's parameters are those of training
        optimizer.train()
    halfway: dict[str, Any] = {}
    for step in range(STEPS):
        if step == STEPS // 2:
            saved = optimizer.state_dict()
            halfway = {"params": [p.tolist() for p in params], "state_dict": as_lists(saved)}
        torch_step(params, optimizer, step, reference.warp)
    state = [tensors(optimizer.state[p]) for p in params]
    found = {"arguments": arguments, "halfway": halfway, "params": [p.tolist() for p in params], "state": state}
    if hasattr(optimizer, "eval"):
        optimizer.eval()
        found["evaluated"] = [p.tolist() for p in params]
    return found


def authors_class(reference: Reference, *, edited: bool = True) -> Any:
    """The authors' class, with the reference's edits or as it is."""
    path, _, name = reference.path.rpartition(".")
    spec = importlib.util.find_spec(path)
    assert spec, f"{path} is not installed"
    assert spec.origin, f"{path} has no file"
    module = importlib.import_module(path)
    if edited and reference.edits:
        source = pathlib.Path(spec.origin).read_text()
        for old, new in reference.edits:
            assert old in source, (old, spec.origin)
            source = source.replace(old, new)
        exec(compile(source, spec.origin, "exec"), vars(module))
    return getattr(module, name)


def tensors(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state of arrays; of a list of them the k-th under <name>_k."""
    import torch

    items = [(f"{key}_{k}", x) for key, xs in state.items() if isinstance(xs, list) for k, x in enumerate(xs)]
    return {
        key: x.tolist() for key, x in [*state.items(), *items] if isinstance(x, torch.Tensor) and x.ndim and x.numel()
    }


def as_lists(x: Any) -> Any:
    """A state_dict for JSON: a tensor as {"tensor": its numbers}, a function as None."""
    import torch

    if isinstance(x, torch.Tensor):
        return {"tensor": x.tolist()}
    if isinstance(x, dict):
        return {str(key): as_lists(value) for key, value in x.items()}
    if isinstance(x, list | tuple | set):
        return [as_lists(y) for y in x]
    if callable(x) or isinstance(x, bytes):
        return None
    return x.item() if hasattr(x, "item") else x  # of NumPy


def as_tensors(x: Any) -> Any:
    """What `as_lists` was given; lists of numbers are tuples, as betas are."""
    import torch

    if isinstance(x, dict):
        if x.keys() == {"tensor"}:
            return torch.tensor(x["tensor"], dtype=torch.float64)
        return {int(key) if key.isdigit() else key: as_tensors(value) for key, value in x.items()}
    if isinstance(x, list):
        return tuple(x) if x and isinstance(x[0], float) else [as_tensors(y) for y in x]
    return x


def main(names: list[str]) -> None:
    for name in names or [*REFERENCES, "heavyball"]:
        if name == "heavyball":
            found = {"source": "heavyball==3.2.1", "runs": of_heavyball()}
            (ROOT / "tests" / "data" / "heavyball.json").write_text(json.dumps(found) + "\n")
            continue
        reference = REFERENCES[name]
        found = {"source": reference.source, "runs": [run(reference, x) for x in reference.runs]}
        (ROOT / "tests" / "data" / f"{name}.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
