"""Schedule-free AdamW and SGD (Defazio et al. 2024, "The Road Less Scheduled")."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Unpack

from jopt import numerics as t
from jopt.rule import Hyperparameter, Limit, Rule, at_least_zero, fraction
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class ScheduleFree(Rule):
    """What both share: the parameter is y, where gradients are taken; z is stepped, and x, their average, implied."""

    weight_decay: bool

    limits: ClassVar[dict[str, Limit]] = {
        "lr": at_least_zero("Invalid learning rate: {}"),
        "weight_decay": at_least_zero("Invalid weight_decay value: {}"),
        "warmup_steps": at_least_zero("Invalid warmup_steps value: {}"),
        "r": at_least_zero("Invalid r value: {}"),
        "weight_lr_power": at_least_zero("Invalid weight_lr_power value: {}"),
    }
    averaged_by = ""  # the hyperparameter that says how far y is from z towards x
    real_only = True

    def init(self, h, param):
        return {"z": t.zeros_like(param)}

    def init_scalars(self, h):
        return {"step": 0.0, "lr_max": -1.0, "lr_max_rest": 0.0, "weight_sum": 0.0, "weight_sum_rest": 0.0}

    def scalars(self, h, s, xp, stored):
        step = s["step"] + 1
        warmup = h["warmup_steps"]
        lr = h["lr"] * xp.where(s["step"] < warmup, step / xp.maximum(warmup, 1.0), 1.0)
        lr_max = xp.maximum(lr, s["lr_max"] + s["lr_max_rest"])
        weight = step ** h["r"] * lr_max ** h["weight_lr_power"]
        total = s["weight_sum"] + s["weight_sum_rest"] + weight
        share = weight / xp.where(total > 0, total, 1.0)
        c = {
            "first": xp.where(s["step"] == 0, 1.0, 0.0),
            "weight_decay": h["weight_decay"],
            "share": share,
            "y": lr * (h[self.averaged_by] * (1 - share) - 1),
            "-lr": -lr,
        }
        # A sum of a million numbers in float32 would lose what each adds: what is rounded off is kept too.
        new = {"step": step}
        for name, x in (("lr_max", lr_max), ("weight_sum", total)):
            new |= {name: stored(x), f"{name}_rest": x - stored(x)}
        return c, new

    def update(self, c, grad, state, param):
        grad, new = self.direction(c, grad, state)
        if self.weight_decay:
            grad = t.add(grad, param, alpha=c["weight_decay"])
        z = t.where(c["first"] != 0, param, state["z"])
        y = t.add(t.lerp(param, z, c["share"]), grad, alpha=c["y"])
        return y, {"z": t.add(z, grad, alpha=c["-lr"])} | new

    def direction(self, c, grad, state):
        """What z is stepped by, and what else of the state is new."""
        return grad, {}


class ScheduleFreeSGD(ScheduleFree):
    """See `schedule_free_sgd`."""

    hyperparameters = ("lr", "momentum", "weight_decay", "warmup_steps", "r", "weight_lr_power")
    limits = ScheduleFree.limits | {
        "momentum": Limit(lambda x: 0 < x < 1, "Momentum must be between 0 and 1 exclusive: {}")
    }
    averaged_by = "momentum"


class ScheduleFreeAdamW(ScheduleFree):
    """See `schedule_free_adamw`."""

    hyperparameters = ("lr", "beta1", "beta2", "eps", "weight_decay", "warmup_steps", "r", "weight_lr_power")
    tuples = {"betas": ("beta1", "beta2")}
    limits = ScheduleFree.limits | {
        "beta1": Limit(lambda x: 0 < x < 1, "Invalid beta parameter at index 0: {}"),
        "beta2": fraction("Invalid beta parameter at index 1: {}"),
        "eps": at_least_zero("Invalid epsilon value: {}"),
    }
    averaged_by = "beta1"

    def init(self, h, param):
        return super().init(h, param) | {"exp_avg_sq": t.zeros_like(param)}

    def signs(self):
        return {"exp_avg_sq": False}

    def scalars(self, h, s, xp, stored):
        c, new = super().scalars(h, s, xp, stored)
        c |= {
            "beta2": h["beta2"],
            "1-beta2": 1 - h["beta2"],
            "1/bias_correction2": 1 / (1 - h["beta2"] ** new["step"]),
            "eps": h["eps"],
        }
        return c, new

    def direction(self, c, grad, state):
        v = t.addcmul(t.mul(state["exp_avg_sq"], c["beta2"]), grad, grad, c["1-beta2"])
        denom = t.add(t.sqrt(t.mul(v, c["1/bias_correction2"])), c["eps"])
        return t.div(grad, denom), {"exp_avg_sq": v}


@optimizer
def schedule_free_sgd(
    lr: Hyperparameter = 1.0,
    momentum: Hyperparameter = 0.9,
    weight_decay: Hyperparameter = 0,
    warmup_steps: Hyperparameter = 0,
    r: Hyperparameter = 0.0,
    weight_lr_power: Hyperparameter = 2.0,
    **options: Unpack[Options],
) -> Transform:
    """Schedule-free SGD: instead of a schedule, an average whose weights follow the learning rate.

    With g = grad + weight_decay * y, at y, the parameters:
    lr_t = lr * min(1, t / warmup_steps);  w = t^r * (largest lr so far)^weight_lr_power;  c = w / sum of all w
    y <- y + c (z - y) + lr_t (momentum (1 - c) - 1) g;  z <- z - lr_t g
    Evaluate and deploy x, the average: `jopt.schedule_free_eval`.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.schedule_free_sgd(lr=0.5)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([1.0]), tx.init(params), params)
    >>> params.item(), jopt.schedule_free_eval(tx, params, state).item()
    (0.5, 0.5)

    State: `step`, `lr_max` and `weight_sum` with what float32 leaves of them, `z`. Source: Defazio et al. 2024; the
    authors' schedulefree 1.4.1, sgd_schedulefree.py, which keeps those numbers in the group.
    """
    arguments = dict(
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        r=r,
        weight_lr_power=weight_lr_power,
    )
    return transform(ScheduleFreeSGD, arguments, **options)


@optimizer
def schedule_free_adamw(
    lr: Hyperparameter = 0.0025,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    warmup_steps: Hyperparameter = 0,
    r: Hyperparameter = 0.0,
    weight_lr_power: Hyperparameter = 2.0,
    **options: Unpack[Options],
) -> Transform:
    """Schedule-free AdamW: Adam's second moment; in the place of momentum and schedule an average.

    v <- beta2 v + (1 - beta2) grad^2;  g = grad / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * y
    Then as `schedule_free_sgd`, with beta1 for momentum.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.schedule_free_adamw(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.9

    State: that of `schedule_free_sgd`, and `exp_avg_sq`. Source: Defazio et al. 2024; the authors' schedulefree 1.4.1,
    adamw_schedulefree.py.
    """
    arguments = dict(
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        r=r,
        weight_lr_power=weight_lr_power,
    )
    return transform(ScheduleFreeAdamW, arguments, **options)
