"""The one table of optimizers, and the one table of tolerances, that every test file parametrises over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer in one configuration.

    Attributes:
      id: the test's name.
      name: jopt's function.
      torch: torch's class; None where torch has no such optimizer.
      arguments: what both take.
      lr: the base learning rate, which tests vary by the step.
      slots: torch's state keys for a parameter, `step` left out.
      matrices: it steps two-dimensional parameters alone.
    """

    id: str
    name: str
    torch: str | None
    arguments: dict[str, Any]
    slots: tuple[str, ...]
    lr: float = 0.02
    matrices: bool = False

    @property
    def scope(self) -> str:
        return self.jopt().rule.scope

    @property
    def takes_complex(self) -> bool:
        return not self.jopt().rule.real_only

    def tree(self, params: Any) -> Any:
        """The parameters, in shapes that the optimizer takes."""
        return jax.tree.map(jnp.atleast_2d, params) if self.matrices else params

    def jopt(self, **overrides: Any) -> jopt.Transform:
        return getattr(jopt, self.name)(**({"lr": self.lr} | self.arguments | overrides))


MOMENTS = ("exp_avg", "exp_avg_sq")
FACTORS = ("row_var", "col_var", "variance")
CASES = [
    Case("sgd", "sgd", "SGD", {}, ()),
    Case("sgd-l2", "sgd", "SGD", dict(weight_decay=0.1), ()),
    Case("sgd-momentum", "sgd", "SGD", dict(momentum=0.9), ("momentum_buffer",)),
    Case("sgd-dampening", "sgd", "SGD", dict(momentum=0.9, dampening=0.5, weight_decay=0.1), ("momentum_buffer",)),
    Case("sgd-nesterov", "sgd", "SGD", dict(momentum=0.9, nesterov=True, weight_decay=0.1), ("momentum_buffer",)),
    Case(
        "sgd-maximize", "sgd", "SGD", dict(momentum=0.5, maximize=True, weight_decay=0.1), ("momentum_buffer",), 0.002
    ),
    Case("adam", "adam", "Adam", {}, MOMENTS),
    Case("adam-l2", "adam", "Adam", dict(weight_decay=0.1, betas=(0.8, 0.95), eps=1e-4), MOMENTS),
    Case("adam-amsgrad", "adam", "Adam", dict(amsgrad=True, weight_decay=0.1), (*MOMENTS, "max_exp_avg_sq")),
    Case("adam-maximize", "adam", "Adam", dict(maximize=True, weight_decay=0.1), MOMENTS, 0.002),
    Case("adam-decoupled", "adam", "Adam", dict(decoupled_weight_decay=True, weight_decay=0.1), MOMENTS),
    Case("adam-beta1-0.3", "adam", "Adam", dict(betas=(0.3, 0.9999)), MOMENTS),  # lerp's other form
    Case("adamw", "adamw", "AdamW", {}, MOMENTS),
    Case("adamw-amsgrad", "adamw", "AdamW", dict(amsgrad=True, maximize=True), (*MOMENTS, "max_exp_avg_sq"), 0.002),
    Case("adamw-no-decay", "adamw", "AdamW", dict(weight_decay=0), MOMENTS),
    Case("rmsprop", "rmsprop", "RMSprop", {}, ("square_avg",)),
    Case("rmsprop-l2", "rmsprop", "RMSprop", dict(weight_decay=0.1, eps=1e-3, alpha=0.9), ("square_avg",)),
    Case("rmsprop-momentum", "rmsprop", "RMSprop", dict(momentum=0.9), ("square_avg", "momentum_buffer"), 0.005),
    Case("rmsprop-centered", "rmsprop", "RMSprop", dict(centered=True, eps=1e-3), ("square_avg", "grad_avg"), 0.005),
    Case(
        "rmsprop-centered-momentum",
        "rmsprop",
        "RMSprop",
        dict(centered=True, momentum=0.5, maximize=True, eps=1e-3),
        ("square_avg", "momentum_buffer", "grad_avg"),
        0.002,
    ),
    Case("adamax", "adamax", "Adamax", {}, ("exp_avg", "exp_inf")),
    Case(
        "adamax-l2", "adamax", "Adamax", dict(weight_decay=0.1, eps=1e-3, maximize=True), ("exp_avg", "exp_inf"), 0.002
    ),
    Case("nadam", "nadam", "NAdam", {}, MOMENTS),
    Case("nadam-l2", "nadam", "NAdam", dict(weight_decay=0.1, momentum_decay=0.02, eps=1e-4), MOMENTS),
    Case("nadam-decoupled", "nadam", "NAdam", dict(weight_decay=0.1, decoupled_weight_decay=True), MOMENTS),
    Case("nadam-maximize", "nadam", "NAdam", dict(maximize=True), MOMENTS, 0.002),
    Case("radam", "radam", "RAdam", {}, MOMENTS),
    Case("radam-l2", "radam", "RAdam", dict(weight_decay=0.1, betas=(0.8, 0.99), eps=1e-3), MOMENTS),
    Case("radam-decoupled", "radam", "RAdam", dict(weight_decay=0.1, decoupled_weight_decay=True), MOMENTS),
    Case("radam-never-rectified", "radam", "RAdam", dict(betas=(0.9, 0.6), maximize=True), MOMENTS, 0.002),
    Case("adagrad", "adagrad", "Adagrad", {}, ("sum",)),
    Case(
        "adagrad-decay",
        "adagrad",
        "Adagrad",
        dict(lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.5, eps=1e-3),
        ("sum",),
    ),
    Case("adagrad-maximize", "adagrad", "Adagrad", dict(maximize=True), ("sum",), 0.002),
    Case("adadelta", "adadelta", "Adadelta", {}, ("square_avg", "acc_delta"), 1.0),
    Case(
        "adadelta-l2", "adadelta", "Adadelta", dict(rho=0.95, weight_decay=0.1, eps=1e-4), ("square_avg", "acc_delta")
    ),
    Case("adadelta-maximize", "adadelta", "Adadelta", dict(maximize=True), ("square_avg", "acc_delta"), 0.1),
    Case("rprop", "rprop", "Rprop", {}, ("prev", "step_size")),
    Case("rprop-etas", "rprop", "Rprop", dict(etas=(0.45, 1.1), step_sizes=(1e-4, 0.1)), ("prev", "step_size")),
    Case("rprop-maximize", "rprop", "Rprop", dict(maximize=True), ("prev", "step_size"), 1e-4),
    Case("asgd", "asgd", "ASGD", {}, ("ax",)),
    Case("asgd-averaging", "asgd", "ASGD", dict(t0=20, lambd=0.01, weight_decay=0.1), ("ax",)),
    Case("asgd-maximize", "asgd", "ASGD", dict(t0=5, maximize=True), ("ax",), 0.002),
    Case("adafactor", "adafactor", "Adafactor", {}, FACTORS),
    Case("adafactor-l2", "adafactor", "Adafactor", dict(weight_decay=0.1, d=1.5, beta2_decay=-0.5), FACTORS),
    Case("adafactor-eps", "adafactor", "Adafactor", dict(eps=(1e-2, 0.5), maximize=True), FACTORS, 0.002),
    Case("muon", "muon", "Muon", {}, ("momentum_buffer",), matrices=True),
    Case("muon-no-nesterov", "muon", "Muon", dict(nesterov=False, momentum=0.8), ("momentum_buffer",), matrices=True),
    Case(
        "muon-match-rms",
        "muon",
        "Muon",
        dict(adjust_lr_fn="match_rms_adamw", ns_steps=3, weight_decay=0, ns_coefficients=(2, -1.5, 0.5)),
        ("momentum_buffer",),
        matrices=True,
    ),
    Case(
        "nor_muon",
        "nor_muon",
        None,
        dict(weight_decay=0.1),
        ("momentum_buffer", "second_momentum_buffer"),
        matrices=True,
    ),
    Case("gradient_descent", "gradient_descent", None, {}, ()),
    Case("momentum", "momentum", None, {}, ("exp_avg",)),
    Case("mars", "mars", None, dict(amsgrad=True), (*MOMENTS, "max_exp_avg_sq", "last_grad")),
    Case("lion", "lion", None, dict(weight_decay=0.1), ("exp_avg",)),
    Case("cautious_lion", "lion", None, dict(cautious=True), ("exp_avg",)),
    Case("adan", "adan", None, dict(weight_decay=0.1), ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad")),
    Case(
        "ademamix",
        "ademamix",
        None,
        dict(beta3_warmup=20, alpha_warmup=30),
        ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"),
    ),
    Case("adopt", "adopt", None, dict(weight_decay=0.1), MOMENTS),
    Case("lamb", "lamb", None, {}, MOMENTS),
    Case("lars", "lars", None, dict(momentum=0.9, weight_decay=0.1), ("momentum_buffer",)),
    # eps: a basis of what no gradient has a part in is anybody's choice; what rounding leaves there is divided by eps.
    Case("soap", "soap", None, dict(precondition_frequency=3, eps=0.1), (*MOMENTS, "GG_0", "GG_1", "Q_0", "Q_1")),
    Case("kron", "kron", None, dict(weight_decay=0.1), ("momentum_buffer", "Q_0", "Q_1")),
    Case("schedule_free_sgd", "schedule_free_sgd", None, dict(weight_decay=0.1, warmup_steps=10), ("z",), 0.02),
    Case("schedule_free_adamw", "schedule_free_adamw", None, dict(weight_decay=0.1, r=1.0), ("z", "exp_avg_sq")),
    Case(
        "prodigy",
        "prodigy",
        None,
        dict(weight_decay=0.1, use_bias_correction=True, d0=1e-3),
        ("s", "p0", *MOMENTS),
        0.5,
    ),
    Case("cautious_adamw", "adamw", None, dict(cautious=True), MOMENTS),
    Case("momentum-scaled", "momentum", None, dict(beta2=0.999), MOMENTS),
]
TORCH_CASES = [case for case in CASES if case.torch]


# One of each rule, with the flags that shape it: where each case takes seconds the others are marked slow.
FEW = frozenset(
    (
        *("sgd-nesterov", "adam-amsgrad", "adamw", "rmsprop-centered-momentum", "adamax-l2"),
        *("nadam-l2", "radam-l2", "adagrad-decay", "adadelta", "rprop-etas", "asgd-averaging", "adafactor-l2"),
        *("muon", "mars", "momentum-scaled"),
    )
)


# For what lifts a rule and does not look at its formula: of each kind of rule one. They have scalar state of their own,
# a first step that differs, flags, signs, whole tensors, or are stacked.
UNLIKE = frozenset(
    ("sgd-nesterov", "adam-amsgrad", "radam-l2", "rprop-etas", "asgd-averaging", "adafactor-l2", "muon", "mars")
)


def mostly_slow(values: Any, fast: Any, ids: Callable[[Any], str] = str) -> list[Any]:
    """For `pytest.mark.parametrize`: values of which all but the `fast` are marked slow."""
    return [pytest.param(x, id=ids(x), marks=[pytest.mark.slow] * (x not in fast)) for x in values]


def parametrize(cases: list[Case], *, fast: frozenset[str] | None = None) -> pytest.MarkDecorator:
    """Over cases, of which all but the `fast` are slow, if those are given."""
    kept = [x for x in cases if fast is None or x.id in fast]
    return pytest.mark.parametrize("case", mostly_slow(cases, kept, lambda x: x.id))


# Largest difference over largest value, of each parameter and state tensor, at any of 200 steps with feedback.
TOLERANCES = {
    # Both sides compute the same operations; XLA and torch contract a * b + c into one rounding in different places.
    # An ulp is 2.2e-16; 200 steps feed it back.
    "float64": 2e-14,
    # The same with an ulp of 1.2e-7.
    "float32": 5e-6,
    # torch rounds after each operation, and so does jopt: equal to the bit but where the different contraction changes
    # a rounding, which then stays in the moments. An ulp is 2^-7.
    "bfloat16": 2**-6,
}
# Muon iterates in bfloat16: where matrix products are summed in another order an entry of the update, of about 1, is
# rounded the other way, by 2^-8. From float64 parameters that is seldom, from float32 ones started an ulp apart torch
# differs from itself by 7e-3 over these steps, from bfloat16 ones by 0.15.
MUON = {"float64": 0.01, "float32": 0.02, "bfloat16": 0.15}
# Where a gradient has few directions (a batch of 16, 200 rows), the iteration multiplies what rounding leaves in the
# others by up to 3.4445^5.
MUON_OF_LOW_RANK = {"float64": 0.05}
# The same two in a network trained for a few steps: its gradients multiply a difference of an ulp, and where a second
# moment is next to nothing Adam divides by it. A step too many or too few shows at 1e-3 and more.
NETWORK = {"float64": 1e-10, "float32": 1e-4}
# Over processes' parts sums add up in another order, in 20 steps that feed it back.
PARTS = {"float64": 1e-12, "float32": 1e-5}
# Against the authors' own code after 200 steps with feedback, which rounds in another order.
AUTHORS = {"float64": 1e-12}
# heavyball computes in float32, and lifts null directions before its QR: twenty steps after its state was taken over.
HEAVYBALL = {"SOAP": 2e-4, "Kron": 1e-6}
# Between two ways to compute the same in JAX: other fusions, other contractions.
FRONT_ENDS = {"float64": 1e-14, "float32": 5e-6}
# Eigenvectors turn by what rounding does to a matrix over the distance of its eigenvalues, some 1e-2 of the largest.
EIGENVECTORS = 1e-4
# An update is a difference of parameters: two of their ulps, in float32.
UPDATES = 2**-22
# Values of a schedule over its largest. Two ways to compute one formula in float64 differ by an ulp or two; torch's
# schedulers that multiply the last value on have a thousand roundings behind them.
SCHEDULES = {"closed": 1e-15, "recursive": 1e-12}
# Norms sum in another order, in float32 for bfloat16 too, whose result is then rounded: one ulp.
CLIPPED = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2**-8}
# Gradients through float16, an ulp of 1e-3, which each side rounds where its own backward does.
HALF_GRADIENTS = 5e-3
# Of a small network whose float32 weights autocast rounds to bfloat16: one that differs by an ulp may be rounded the
# other way, by 2^-8 of it. In 20 steps that happened from one of 12 starts to ours (2e-3 in a loss), from one to torch
# beside torch started an ulp away.
AUTOCAST = 2**-7


def difference(a: Any, b: Any) -> float:
    """Largest difference over largest value; arrays of any float type."""
    a, b = (np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64) for x in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    assert np.isfinite(a).all() == np.isfinite(b).all()
    # XLA on CPU flushes float32's subnormals, which torch keeps: NAdam's mu_product gets there after 130 steps.
    a, b = (np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x) for x in (a, b))
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30))


class Problem:
    """A noisy quadratic: each side computes its gradients at its own parameters, so that differences feed back.

    Its sizes are multiples of 64: torch's vector loops round the last elements of a bfloat16 tensor otherwise.
    """

    shapes = ((256,), (8, 16, 2), (64, 4))
    matrices = ((16, 16), (8, 32), (64, 4))

    def __init__(self, dtype: str, seed: int = 0, matrices: bool = False):
        rng = np.random.default_rng(seed)
        shapes = self.matrices if matrices else self.shapes
        self.dtype = np.dtype(dtype) if dtype != "bfloat16" else np.dtype("float32")
        self.start = [self._round(rng.standard_normal(s), dtype) for s in shapes]
        self.target = [rng.standard_normal(s) for s in shapes]
        self.seed = seed
        self.name = dtype
        self.noise: dict[int, list[np.ndarray]] = {}  # by step; every run of a problem sees the same

    @staticmethod
    def _round(x: np.ndarray, dtype: str) -> np.ndarray:
        import ml_dtypes

        return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def grads(self, step: int, params: list[np.ndarray]) -> list[np.ndarray]:
        """The gradients at `params`, in their type."""
        if step not in self.noise:
            rng = np.random.default_rng((self.seed, step))
            self.noise[step] = [0.5 * rng.standard_normal(t.shape) for t in self.target]
        return [
            self._round(0.7 * (np.asarray(p).astype(np.float64) - t) + noise, self.name)
            for p, t, noise in zip(params, self.target, self.noise[step], strict=True)
        ]


def lr_factor(step: Any, cos: Any = np.cos) -> Any:
    """A learning rate that changes with each step."""
    return 1 + 0.5 * cos(step / 3.0)


def active(step: int) -> list[bool]:
    """Which parameters have a gradient: now and then one is frozen, once all are."""
    return [step != 40, step != 40 and not 60 <= step < 80, step != 40 and step % 7 != 3]


# A mean of torch's `get_swa_avg_fn` and `get_swa_multi_avg_fn`: they weigh with 1 / (n + 1) of an integer tensor, which
# torch computes in float32 whatever the parameters are; AveragedModel's own mean, and jopt's, divide in their type.
MEAN_WEIGHT = 6e-8

# Derivatives, over the largest in that number or tensor. Both modes add the same terms in another order. Differences
# have an error of truncation, and of rounding over their width; torch's autograd rounds where it multiplies. Muon's is
# of an iteration in bfloat16, compared with the same in float64.
DERIVATIVES = {"modes": 1e-11, "differences": 1e-5, "torch": 1e-9, "limit": 1e-6, "float32": 1e-3, "muon": 0.05}
# Scalars that torch keeps in float32 make steps of this size in a loss, and round their derivatives.
STORED = {"nadam": 2e-7, "asgd": 2e-7, "prodigy": 2e-7}
