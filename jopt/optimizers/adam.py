"""Adam and AdamW (torch/optim/adam.py, `_single_tensor_adam`; Kingma & Ba 2015, Loshchilov & Hutter 2019)."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.common import caution, decay, moments, regularize
from jopt.rule import Hyperparameter, Rule, at_least_zero, fraction
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class Adam(Rule):
    """Adam, with L2 or decoupled weight decay, and AMSGrad: see `adam`."""

    weight_decay: bool
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool

    hyperparameters = ("lr", "beta1", "beta2", "eps", "weight_decay")
    tuples = {"betas": ("beta1", "beta2")}
    limits = {
        "lr": at_least_zero("Invalid learning rate: {}"),
        "eps": at_least_zero("Invalid epsilon value: {}"),
        "beta1": fraction("Invalid beta parameter at index 0: {}"),
        "beta2": fraction("Invalid beta parameter at index 1: {}"),
        "weight_decay": at_least_zero("Invalid weight_decay value: {}"),
    }

    def init(self, h, param):
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * self.amsgrad
        return {name: t.zeros_like(param) for name in names}

    def signs(self):
        return {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        c = {
            "decay": decay(self, h),
            "1-beta1": 1 - h["beta1"],
            "beta2": h["beta2"],
            "1-beta2": 1 - h["beta2"],
            "1/sqrt(bias_correction2)": 1 / xp.sqrt(1 - h["beta2"] ** step),
            "eps": h["eps"],
            "-step_size": -h["lr"] / (1 - h["beta1"] ** step),
        }
        return c, {"step": step}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        exp_avg, exp_avg_sq = moments(c, grad, state)
        new = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if self.amsgrad:
            new["max_exp_avg_sq"] = exp_avg_sq = t.maximum(state["max_exp_avg_sq"], exp_avg_sq)
        denom = t.add(t.mul(t.sqrt(exp_avg_sq), c["1/sqrt(bias_correction2)"]), c["eps"])
        return t.addcdiv(param, self.chosen(exp_avg, grad), denom, c["-step_size"]), new

    def chosen(self, exp_avg, grad):
        """What of the momentum is taken."""
        return exp_avg


class CautiousAdam(Adam):
    """Adam that takes only what of its momentum points as the gradient does: see `adamw`."""

    scope = "tensor"
    axes = False
    real_only = True

    def chosen(self, exp_avg, grad):
        return t.mul(exp_avg, caution(exp_avg, grad))


@optimizer
def adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    cautious: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """Adam, as `torch.optim.Adam`: the bias corrections in float64, AMSGrad's maximum over the raw moment.

    With g = grad + weight_decay * p:
    m <- m + (1 - beta1) (g - m);  v <- beta2 v + (1 - beta2) g^2;  amsgrad: v_max <- max(v_max, v)
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v or v_max) / sqrt(1 - beta2^t) + eps)
    cautious: with m * k / max(mean(k), 1e-3) in m's place, k 1 where m * g > 0, else 0; the mean over the tensor.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.adam(lr=lambda step: 0.1 * 0.5**step)
    >>> params = jnp.array([1.0, 2.0])
    >>> state = tx.init(params)
    >>> params, state = tx.step(jnp.array([3.0, -3.0]), state, params)
    >>> [round(x, 6) for x in params.tolist()]
    [0.9, 2.1]

    State: `step`, `exp_avg`, `exp_avg_sq`, with amsgrad `max_exp_avg_sq`. Source: torch/optim/adam.py;
    Kingma & Ba 2015; Reddi et al. 2018.
    """
    arguments = dict(
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
        decoupled_weight_decay=decoupled_weight_decay,
    )
    return transform(
        CautiousAdam if cautious else Adam,
        arguments,
        **options,
    )


@optimizer
def adamw(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    cautious: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """AdamW, as `torch.optim.AdamW`: `adam` with p <- p * (1 - lr * weight_decay) before it, and no L2 term.

    >>> import jax, jax.numpy as jnp, optax, jopt
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), jopt.adamw(lr=1e-3))
    >>> params = {"w": jnp.ones(3)}
    >>> state = tx.init(params)
    >>> updates, state = jax.jit(tx.update)({"w": jnp.ones(3)}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> [round(x, 5) for x in params["w"].tolist()]
    [0.99899, 0.99899, 0.99899]

    Source: torch/optim/adamw.py; Loshchilov & Hutter 2019. `cautious`: Liang et al. 2024, "Cautious Optimizers:
    Improving Training with One Line of Code".
    """
    return adam(
        lr,
        betas,
        eps,
        weight_decay,
        amsgrad,
        maximize=maximize,
        decoupled_weight_decay=True,
        cautious=cautious,
        **options,
    )
