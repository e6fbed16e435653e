"""What most rules begin with: ascent, weight decay, Adam's two moments."""

from __future__ import annotations

from typing import Any

from jax import Array

from jopt import numerics as t
from jopt.rule import LeafState, Rule, Scalars


def decay(rule: Rule, h: Scalars) -> Any:
    """`regularize`'s coefficient: weight_decay, or what is left of the parameter where that is decoupled."""
    return 1 - h["lr"] * h["weight_decay"] if getattr(rule, "decoupled_weight_decay", False) else h["weight_decay"]


def regularize(rule: Any, c: Scalars, grad: Array, param: Array) -> tuple[Array, Array]:
    """torch's order: negate the gradient to maximize, then grad + weight_decay * p, or p * (1 - lr * weight_decay)."""
    if rule.maximize:
        grad = -grad
    if rule.weight_decay:
        if getattr(rule, "decoupled_weight_decay", False):
            param = t.mul(param, c["decay"])
        else:
            grad = t.add(grad, param, alpha=c["decay"])
    return grad, param


def moments(c: Scalars, grad: Array, state: LeafState) -> tuple[Array, Array]:
    """m = lerp(m, g, 1 - beta1);  v = beta2 * v + (1 - beta2) * g^2."""
    exp_avg = t.lerp(state["exp_avg"], grad, c["1-beta1"])
    exp_avg_sq = t.addcmul(t.mul(state["exp_avg_sq"], c["beta2"]), grad, grad, c["1-beta2"])
    return exp_avg, exp_avg_sq


def trust(ratio: Array, *norms: Array) -> Array:
    """The ratio, or 1 where one of the norms is 0."""
    for norm in norms:
        ratio = t.where(norm > 0, ratio, t.ones_like(ratio))
    return ratio


def caution(update: Array, grad: Array) -> Array:
    """Of each element whether the update goes with the gradient, over the share of those that do (at least 1e-3).

    Source: Liang et al. 2024, "Cautious Optimizers: Improving Training with One Line of Code"; the authors' c_adamw.py.
    Of its two ways the one without `capturable` compares the momentum with itself (line 233), so that all is taken.
    """
    mask = t.where(t.mul(update, grad) > 0, t.ones_like(grad), t.zeros_like(grad))
    share = t.mean(mask)
    return t.div(mask, t.maximum(share, t.full_like(share, 1e-3)))
