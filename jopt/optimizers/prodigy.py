"""Prodigy (Mishchenko & Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner")."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Unpack

from jopt import numerics as t
from jopt.optimizers.adam import Adam
from jopt.rule import Hyperparameter, Limit, Summed
from jopt.transform import Options, Transform, optimizer, transform

ESTIMATES = ("d", "d_max", "d_numerator")  # in the state, each with what float32 leaves of it


@dataclasses.dataclass(frozen=True)
class Prodigy(Summed):
    """Adam whose step size is found from sums over all parameters: see `prodigy`.

    A parameter with a learning rate of 0 beside others stays as it is; the authors' moves on by the momentum that it
    has, and by the others' weight decay (prodigy.py, from line 260, where `dlr` is the largest group's).
    """

    beta1: bool
    beta3_given: bool
    weight_decay: bool
    decouple: bool
    use_bias_correction: bool
    safeguard_warmup: bool
    slice_p: int

    hyperparameters = ("lr", "beta1", "beta2", "beta3", "eps", "weight_decay", "d0", "d_coef", "growth_rate")
    tuples = {"betas": ("beta1", "beta2")}
    limits = {
        "d0": Limit(lambda x: x > 0, "Invalid d0 value: {}"),
        "lr": Limit(lambda x: x > 0, "Invalid learning rate: {}"),
        "eps": Limit(lambda x: x > 0, "Invalid epsilon value: {}"),
        "beta1": Adam.limits["beta1"],
        "beta2": Adam.limits["beta2"],
    }
    real_only = True
    sums = ("delta_numerator", "d_denom")
    shared = frozenset({"k", *ESTIMATES, *(f"{name}_rest" for name in ESTIMATES)})
    alike = frozenset({"beta1", "beta2", "beta3", "decouple", "use_bias_correction", "d0", "d_coef", "growth_rate"})

    def __post_init__(self):
        if self.slice_p != 1:
            raise ValueError(
                f"slice_p: expected 1, found {self.slice_p!r}: the statistics are of all elements here; leave it out"
            )

    @classmethod
    def members(cls, arguments):
        return {name: x for name, x in super().members(arguments).items() if name != "beta3" or x is not None}

    @classmethod
    def shaped_by(cls, arguments, h, *, dynamic=False):
        return super().shaped_by({**arguments, "beta3_given": "beta3" in h}, h, dynamic=dynamic)

    @classmethod
    def check_groups(cls, rules, numbers):
        super().check_groups(rules, numbers)
        rates = {h["lr"] for h in numbers if isinstance(h["lr"], int | float)} - {0.0}
        if len(rates) > 1:
            raise RuntimeError(
                "Setting different lr values in different parameter groups is only supported for values of 0, found "
                f"{', '.join(map(str, sorted(rates)))}"
            )

    def init(self, h, param):
        names = ["s", "p0"] + ["exp_avg"] * self.beta1 + ["exp_avg_sq"]
        return {name: t.zeros_like(param) for name in names}

    def init_scalars(self, h):
        found = {"step": 0.0, "k": 0.0}
        for name, x in zip(ESTIMATES, (h["d0"], h["d0"], 0.0), strict=True):
            found |= {name: x, f"{name}_rest": 0.0}
        return found

    def before(self, h, s, xp):
        d, lr = self.estimates(h, s, xp)[0], h["lr"]
        dlr = self.rate(h, s, xp)
        gain = d / h["d0"] * (d if self.safeguard_warmup else dlr)

        def where_stepped(x: Any, y: float) -> Any:
            return xp.where(lr > 0, x, y)

        first = s["step"] == 0
        return {
            "first": xp.where(first, 1.0, 0.0),
            "weight_decay": h["weight_decay"],
            "numerator": xp.where(first, 0.0, d / h["d0"] * dlr),
            "beta3": where_stepped(self.beta3(h, xp), 1.0),
            "gain": where_stepped(gain, 0.0),
            "beta1": where_stepped(h["beta1"], 1.0),
            "d(1-beta1)": where_stepped(d * (1 - h["beta1"]), 0.0),
            "beta2": where_stepped(h["beta2"], 1.0),
            "d^2(1-beta2)": where_stepped(d * d * (1 - h["beta2"]), 0.0),
        }

    def scalars(self, h, s, xp, stored):
        moved = h["d_denom"] > 0
        old, d_max, numerator = self.estimates(h, s, xp)
        numerator = self.beta3(h, xp) * numerator + h["delta_numerator"]
        d_hat = h["d_coef"] * numerator / xp.where(moved, h["d_denom"], 1.0)
        d_max = xp.maximum(d_max, d_hat)
        grown = xp.where(old == h["d0"], xp.maximum(old, d_hat), old) * h["growth_rate"]
        d = xp.where(grown < d_max, grown, d_max)
        one = xp.where(moved, 1.0, 0.0)
        new = {"step": s["step"] + one, "k": s["k"] + one}
        for name, x in zip(ESTIMATES, (d, d_max, numerator), strict=True):
            pair = {name: stored(x), f"{name}_rest": x - stored(x)}
            new |= {key: xp.where(moved, value, s[key]) for key, value in pair.items()}
        d, dlr = xp.where(moved, d, old), one * self.rate(h, s, xp)
        c = {
            "d*eps": d * h["eps"],
            "-decay": -h["weight_decay"] * dlr,
            "-dlr": -dlr if self.beta1 else -dlr * d,
        }
        return c, new

    def estimates(self, h, s, xp):
        """d, d_max and d_numerator, of which the state's float32 has 48 bits: d0 itself where d is still that."""
        d, d_max, numerator = (s[name] + s[f"{name}_rest"] for name in ESTIMATES)
        at_first = s["k"] == 0
        still = abs(d - h["d0"]) <= 1e-13 * h["d0"]
        d = xp.where(at_first, h["d0"], xp.where(still, h["d0"], d))
        return d, xp.where(at_first, h["d0"], d_max), numerator

    def beta3(self, h, xp):
        return h["beta3"] if self.beta3_given else xp.sqrt(h["beta2"])

    def rate(self, h, s, xp):
        """What multiplies Adam's step: the authors' `dlr`."""
        rate = self.estimates(h, s, xp)[0] * h["lr"]
        if self.use_bias_correction:
            k = s["k"] + 1
            rate = rate * (xp.sqrt(1 - h["beta2"] ** k) / (1 - h["beta1"] ** k))
        return rate

    def terms(self, c, grad, state, param):
        grad = self.decayed(c, grad, param)
        return {  # in the first step, where the parameter has not moved, p0 is not set yet, and its factor 0
            "delta_numerator": t.mul(t.product(grad, t.add(state["p0"], -param)), c["numerator"]),
            "d_denom": t.absolute(self.sum_of_gradients(c, grad, state)),
        }

    def update(self, c, grad, state, param):
        grad = self.decayed(c, grad, param)
        new = {"s": self.sum_of_gradients(c, grad, state), "p0": t.where(c["first"] != 0, param, state["p0"])}
        step = grad
        if self.beta1:
            new["exp_avg"] = step = t.add(t.mul(state["exp_avg"], c["beta1"]), grad, alpha=c["d(1-beta1)"])
        v = t.addcmul(t.mul(state["exp_avg_sq"], c["beta2"]), grad, grad, c["d^2(1-beta2)"])
        if self.weight_decay and self.decouple:
            param = t.add(param, param, alpha=c["-decay"])
        param = t.addcdiv(param, step, t.add(t.sqrt(v), c["d*eps"]), c["-dlr"])
        return param, new | {"exp_avg_sq": v}

    def decayed(self, c, grad, param):
        if self.weight_decay and not self.decouple:
            return t.add(grad, param, alpha=c["weight_decay"])
        return grad

    def sum_of_gradients(self, c, grad, state):
        return t.add(t.mul(state["s"], c["beta3"]), grad, alpha=c["gain"])


@optimizer
def prodigy(
    lr: Hyperparameter = 1.0,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    beta3: Hyperparameter | None = None,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    decouple: bool = True,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    d0: Hyperparameter = 1e-6,
    d_coef: Hyperparameter = 1.0,
    growth_rate: Hyperparameter = math.inf,
    slice_p: int = 1,
    **options: Unpack[Options],
) -> Transform:
    """Prodigy: Adam that finds its step size d, which grows with how far the parameters have come.

    With g the gradient, d0, betas and beta3 (sqrt(beta2) if None), and sums over all elements of all parameters:
    dlr = d lr;  r <- beta3 r + d / d0 dlr sum g (p0 - p);  s <- beta3 s + d / d0 dlr g
    m <- beta1 m + d (1 - beta1) g;  v <- beta2 v + d^2 (1 - beta2) g^2
    d' = d_coef r / sum |s|;  d_max <- max(d_max, d');  d <- min(d_max, growth_rate d), at first max(d0, d')
    p <- p - weight_decay dlr p - dlr m / (sqrt(v) + d eps)
    p0 is p before its first step. decouple=False adds weight_decay * p to the gradient. use_bias_correction multiplies
    dlr by Adam's sqrt(1 - beta2^t) / (1 - beta1^t). safeguard_warmup has d for dlr in s. A step whose gradients are all
    0 so far, or whose lr is 0, changes no parameter and counts nothing. lr is a factor that a schedule may give; d and
    the schedule are multiplied. Groups of `jopt.param_groups` share d.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.prodigy()
    >>> params = jnp.array([3.0, 4.0])
    >>> state = tx.init(params)
    >>> for _ in range(40):
    ...     params, state = tx.step(2 * params, state, params)
    >>> state.scalars["d"].item() > 0.1
    True

    State: `step` (of a parameter), `k` (steps in all), `d`, `d_max`, `d_numerator` with what float32 leaves of them
    (`d_rest`, ...), which all parameters share; `s`, `p0`, `exp_avg` (none with a first beta of 0), `exp_avg_sq`.

    Raises:
      ValueError: slice_p other than 1: the authors' approximation is not here.
      RuntimeError: groups with different learning rates, other than 0.

    Source: Mishchenko & Defazio 2023, algorithm 3; the authors' prodigyopt 1.1.2, prodigy.py.
    """
    arguments = dict(
        lr=lr,
        betas=betas,
        beta3=beta3,
        eps=eps,
        weight_decay=weight_decay,
        decouple=decouple,
        use_bias_correction=use_bias_correction,
        safeguard_warmup=safeguard_warmup,
        d0=d0,
        d_coef=d_coef,
        growth_rate=growth_rate,
        slice_p=slice_p,
    )
    return transform(Prodigy, arguments, **options)
