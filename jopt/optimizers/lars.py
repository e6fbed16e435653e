"""LARS (You, Gitman & Ginsburg 2017, "Large Batch Training of Convolutional Networks")."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jopt import numerics as t
from jopt.optimizers.common import trust
from jopt.rule import Hyperparameter, Limit, Rule, at_least_zero, is_number
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class LARS(Rule):
    """SGD whose gradient is as long as a share of the tensor: see `lars`."""

    momentum: bool
    weight_decay: bool
    nesterov: bool
    trust_clip: bool
    always_adapt: bool

    hyperparameters = ("lr", "momentum", "dampening", "weight_decay", "trust_coeff", "eps")
    limits = {
        "lr": at_least_zero("Invalid learning rate: {}"),
        "momentum": at_least_zero("Invalid momentum value: {}"),
        "dampening": Limit(lambda x: x == x, "Invalid dampening value: {}"),
        "weight_decay": at_least_zero("Invalid weight_decay value: {}"),
        "trust_coeff": at_least_zero("Invalid trust_coeff value: {}"),
        "eps": at_least_zero("Invalid epsilon value: {}"),
    }
    scope = "tensor"
    axes = False
    real_only = True

    def init(self, h, param):
        return {"momentum_buffer": t.zeros_like(param)} if self.momentum else {}

    def signs(self):
        return {"momentum_buffer": True}

    def init_scalars(self, h):
        return {"step": 0.0} if self.momentum else {}

    def scalars(self, h, s, xp, stored):
        c = {name: h[name] for name in ("weight_decay", "trust_coeff", "eps", "momentum")}
        c |= {"-lr": -h["lr"], "1/lr": 1 / xp.where(h["lr"] > 0, h["lr"], 1.0)}
        if not self.momentum:
            return c, s
        # The buffer starts as a copy of the gradient, undamped.
        has_buffer = xp.where(s["step"] > 0, 1.0, 0.0)
        c |= {"buffer weight": h["momentum"] * has_buffer, "grad weight": 1 - h["dampening"] * has_buffer}
        return c, {"step": s["step"] + 1}

    def update(self, c, grad, state, param):
        if self.weight_decay or self.always_adapt:
            p, g = t.norm(param), t.norm(grad)
            denom = t.add(t.add(g, p, alpha=c["weight_decay"]), c["eps"])
            ratio = trust(t.div(t.mul(p, c["trust_coeff"]), denom), p, g)
            if self.trust_clip:
                ratio = t.minimum(t.mul(ratio, c["1/lr"]), t.ones_like(ratio))
            grad = t.mul(t.add(grad, param, alpha=c["weight_decay"]), ratio)
        if self.momentum:
            buffer = t.add(t.mul(state["momentum_buffer"], c["buffer weight"]), grad, alpha=c["grad weight"])
            grad = t.add(grad, buffer, alpha=c["momentum"]) if self.nesterov else buffer
            state = {"momentum_buffer": buffer}
        return t.add(param, grad, alpha=c["-lr"]), state


@optimizer
def lars(
    lr: Hyperparameter = 1.0,
    momentum: Hyperparameter = 0,
    dampening: Hyperparameter = 0,
    weight_decay: Hyperparameter = 0,
    nesterov: bool = False,
    trust_coeff: Hyperparameter = 0.001,
    eps: Hyperparameter = 1e-8,
    trust_clip: bool = False,
    always_adapt: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """LARS: SGD on each tensor's gradient, made as long as trust_coeff times the tensor's norm.

    g = (grad + weight_decay * p) * trust_coeff * |p| / (|grad| + weight_decay * |p| + eps), the ratio 1 where a norm
    is 0, with trust_clip at most lr (LARC). Then as `sgd`: b = momentum * b + (1 - dampening) g, b = g at the first;
    p <- p - lr * (g, or b, or nesterov: g + momentum * b). A tensor without weight decay is stepped by SGD, unless
    always_adapt.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.lars(lr=1.0, momentum=0.9, trust_coeff=0.1, always_adapt=True)
    >>> params = jnp.array([3.0, 4.0])
    >>> params, state = tx.step(jnp.array([8.0, -6.0]), tx.init(params), params)
    >>> [round(x, 4) for x in params.tolist()]
    [2.6, 4.3]

    State: `momentum_buffer`, only with momentum. Source: You et al. 2017; timm/optim/lars.py, whose arguments these
    are.
    """
    if nesterov and ((is_number(momentum) and momentum <= 0) or (is_number(dampening) and dampening != 0)):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    arguments = dict(
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        trust_coeff=trust_coeff,
        eps=eps,
        trust_clip=trust_clip,
        always_adapt=always_adapt,
    )
    return transform(LARS, arguments, **options)
