"""SGD (torch/optim/sgd.py, `_single_tensor_sgd`)."""

from __future__ import annotations

import dataclasses
from typing import Unpack

from jax import Array

from jopt import numerics as t
from jopt.optimizers.common import decay, regularize
from jopt.rule import Hyperparameter, Limit, Rule, at_least_zero, is_number
from jopt.transform import Options, Transform, optimizer, transform


@dataclasses.dataclass(frozen=True)
class SGD(Rule):
    """Gradient descent with heavy-ball or Nesterov momentum: see `sgd`."""

    momentum: bool
    weight_decay: bool
    nesterov: bool
    maximize: bool

    hyperparameters = ("lr", "momentum", "dampening", "weight_decay")
    limits = {
        "lr": at_least_zero("Invalid learning rate: {}"),
        "momentum": at_least_zero("Invalid momentum value: {}"),
        "dampening": Limit(lambda x: x == x, "Invalid dampening value: {}"),
        "weight_decay": at_least_zero("Invalid weight_decay value: {}"),
    }

    def init(self, h, param):
        return {"momentum_buffer": t.zeros_like(param)} if self.momentum else {}

    def signs(self):
        return {"momentum_buffer": True}

    def init_scalars(self, h):
        return {"step": 0.0} if self.momentum else {}

    def scalars(self, h, s, xp, stored):
        c = {"-lr": -h["lr"], "decay": decay(self, h), "momentum": h["momentum"]}
        if not self.momentum:
            return c, s
        # torch's buffer starts as a copy of the gradient, undamped, on the first step that has momentum.
        # A momentum of 0 is possible here only where it may change later.
        has_momentum = xp.where(h["momentum"] == 0, 0.0, 1.0)
        has_buffer = (s["step"] > 0) * has_momentum
        # 0 times 1 rather than 0, for the derivative: with a little momentum the last gradient would count.
        c["buffer weight"] = h["momentum"] * xp.where(h["momentum"] == 0, 1.0, has_buffer)
        c["grad weight"] = 1 - h["dampening"] * has_buffer
        if isinstance(h["momentum"], Array):  # which may change to 0 and back; a number, as the host gives, does not
            c["buffer kept"] = (s["step"] > 0) * (1 - has_momentum)
        return c, {"step": s["step"] + has_momentum}

    def update(self, c, grad, state, param):
        grad, param = regularize(self, c, grad, param)
        if self.momentum:
            buf = t.add(t.mul(state["momentum_buffer"], c["buffer weight"]), grad, alpha=c["grad weight"])
            # A step without momentum leaves torch's buffer as it is.
            kept = t.where(c["buffer kept"] != 0, state["momentum_buffer"], buf) if "buffer kept" in c else buf
            state = {"momentum_buffer": kept}
            grad = t.add(grad, buf, alpha=c["momentum"]) if self.nesterov else buf
        return t.add(param, grad, alpha=c["-lr"]), state


@optimizer
def sgd(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0,
    dampening: Hyperparameter = 0,
    weight_decay: Hyperparameter = 0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    **options: Unpack[Options],
) -> Transform:
    """Stochastic gradient descent, as `torch.optim.SGD`.

    With g = grad + weight_decay * p, and on momentum b = momentum * b + (1 - dampening) * g (b = g on the
    first step, undamped):  p <- p - lr * (g, or b, or nesterov: g + momentum * b).

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.sgd(lr=0.1, momentum=0.9)
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> state = tx.init(params)
    >>> params, state = tx.step({"w": jnp.array([1.0, 1.0])}, state, params)
    >>> params["w"].tolist()
    [0.8999999761581421, 1.899999976158142]

    State: `momentum_buffer`, only with momentum. Source: torch/optim/sgd.py.
    """
    if nesterov and ((is_number(momentum) and momentum <= 0) or (is_number(dampening) and dampening != 0)):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    arguments = dict(
        lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize
    )
    return transform(
        SGD,
        arguments,
        **options,
    )


@optimizer
def gradient_descent(
    lr: Hyperparameter,
    **options: Unpack[Options],
) -> Transform:
    """Plain gradient descent, p <- p - lr * grad: `sgd` with nothing else.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.gradient_descent(lr=0.5)
    >>> params = jnp.array([1.0])
    >>> tx.step(jnp.array([1.0]), tx.init(params), params)[0].item()
    0.5
    """
    return sgd(
        lr,
        **options,
    )
