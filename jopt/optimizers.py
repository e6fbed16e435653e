"""The optimizers under torch's names in lower case, with torch's arguments and defaults.

Every number may be a number, a 0-d array (also traced) or a schedule `step -> value`, evaluated in float64 at
the count of calls, from 0. Every function also takes

    state_dtype: the type of the state's tensors where wider than the parameter's (float32 for bfloat16 parameters:
        the step is then computed in float32 and rounded once; torch rounds after each operation).
    master_copy: keep a float32 copy of each bfloat16 and float16 parameter in the state (`state.slots["master"]`),
        which is stepped in float32; the parameter is its rounded value and is not read: to change a parameter from
        outside, change both, or call `init` again.
    stochastic_rounding: a seed or a key of `jax.random`. bfloat16 parameters are stepped in float32 and rounded up or
        down at random, with the probabilities that keep the mean: steps of less than an ulp add up instead of being
        lost. The same seed, count and position in the tree give the same rounding: under vmap give each its own key.
        Use `step`; the difference that `update` returns is rounded once more.
    hyperparams_in_state: keep all hyperparameters in `state.hyperparams`, to be read, saved, and set without
        compiling again. They have JAX's default float type there, so that in float32 a beta2 of 0.999 is
        0.99900001.

and raises torch's ValueError for a number out of range, TypeError for what is no number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

from jax import Array

from jopt import rules
from jopt.rule import Hyperparameter, is_number
from jopt.transform import Transform, transform

A = ParamSpec("A")
OPTAX = {  # optax's names of arguments, and torch's
    "learning_rate": "lr",
    "b1": "betas=(b1, b2)",
    "b2": "betas=(b1, b2)",
    "b3": "betas",
    "decay": "alpha",
    "eps_root": "eps",
    "mask": "jopt.param_groups",
    "decay_rate": "beta2_decay",
    "weight_decay_mask": "jopt.param_groups",
}


def _torchs_names(optimizer: Callable[A, Transform]) -> Callable[A, Transform]:
    """An optimizer that says what optax's arguments are called here."""

    @functools.wraps(optimizer)
    def make(*args: A.args, **kwargs: A.kwargs) -> Transform:
        try:
            return optimizer(*args, **kwargs)
        except TypeError as error:
            for name in kwargs:
                if name in OPTAX and f"unexpected keyword argument '{name}'" in str(error):
                    raise TypeError(f"{optimizer.__name__}: {name} is optax's name; torch's is {OPTAX[name]}") from None
            raise

    return make


@_torchs_names
def sgd(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0,
    dampening: Hyperparameter = 0,
    weight_decay: Hyperparameter = 0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
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
        rules.SGD,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """Adam, as `torch.optim.Adam`: the bias corrections in float64, AMSGrad's maximum over the raw moment.

    With g = grad + weight_decay * p:
    m <- m + (1 - beta1) (g - m);  v <- beta2 v + (1 - beta2) g^2;  amsgrad: v_max <- max(v_max, v)
    p <- p - lr / (1 - beta1^t) * m / (sqrt(v or v_max) / sqrt(1 - beta2^t) + eps)

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
        rules.Adam,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def adamw(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
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

    Source: torch/optim/adamw.py; Loshchilov & Hutter 2019.
    """
    return adam(
        lr,
        betas,
        eps,
        weight_decay,
        amsgrad,
        maximize=maximize,
        decoupled_weight_decay=True,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def rmsprop(
    lr: Hyperparameter = 1e-2,
    alpha: Hyperparameter = 0.99,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    momentum: Hyperparameter = 0,
    centered: bool = False,
    *,
    maximize: bool = False,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """RMSprop, as `torch.optim.RMSprop`: eps outside the root, lr outside the momentum buffer.

    With g = grad + weight_decay * p:  v <- alpha v + (1 - alpha) g^2;  centered: a <- a + (1 - alpha) (g - a)
    d = sqrt(v, or centered: v - a^2) + eps;  p <- p - lr * g / d
    or with momentum:  b <- momentum * b + g / d;  p <- p - lr * b

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.rmsprop(lr=0.01)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 6)
    0.9

    State: `step`, `square_avg`, with momentum `momentum_buffer`, centered `grad_avg`.
    Source: torch/optim/rmsprop.py; Hinton 2012; Graves 2013.
    """
    arguments = dict(
        lr=lr,
        alpha=alpha,
        eps=eps,
        weight_decay=weight_decay,
        momentum=momentum,
        centered=centered,
        maximize=maximize,
    )
    return transform(
        rules.RMSprop,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def adamax(
    lr: Hyperparameter = 2e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    *,
    maximize: bool = False,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """Adamax, as `torch.optim.Adamax`: Adam with the infinity norm; eps beside |g|, none in the denominator.

    With g = grad + weight_decay * p:  m <- m + (1 - beta1) (g - m);  u <- max(beta2 * u, |g| + eps)
    p <- p - lr / (1 - beta1^t) * m / u

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.adamax(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.9

    State: `step`, `exp_avg`, `exp_inf`. Source: torch/optim/adamax.py; Kingma & Ba 2015, section 7.1.
    """
    arguments = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
    return transform(
        rules.Adamax,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def nadam(
    lr: Hyperparameter = 2e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    momentum_decay: Hyperparameter = 4e-3,
    *,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """NAdam, as `torch.optim.NAdam`: Nesterov momentum on the schedule mu_t, which optax's nadam has not.

    mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2);  M_t = mu_1 ... mu_t, in float32 as torch keeps it
    With g = grad + weight_decay * p (or decoupled as in `adamw`), m and v as in `adam`,
    d = sqrt(v / (1 - beta2^t)) + eps:
    p <- p - lr * (1 - mu_t) / (1 - M_t) * g / d - lr * mu_{t+1} / (1 - M_t * mu_{t+1}) * m / d

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.nadam(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.89435

    State: `step`, `mu_product`, `exp_avg`, `exp_avg_sq`. Source: torch/optim/nadam.py; Dozat 2016.
    """
    arguments = dict(
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        momentum_decay=momentum_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )
    return transform(
        rules.NAdam,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def radam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    *,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """RAdam, as `torch.optim.RAdam`: Adam without its second moment until that has enough samples.

    rho_inf = 2 / (1 - beta2) - 1;  rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t)
    With g, m and v as in `adam`, m' = m / (1 - beta1^t):
    rho_t > 5:  p <- p - lr * m' * r_t * sqrt(1 - beta2^t) / (sqrt(v) + eps), eps beside the raw root,
                r_t = sqrt((rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t))
    else:       p <- p - lr * m'

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.radam(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.8

    State: `step`, `exp_avg`, `exp_avg_sq`. Source: torch/optim/radam.py; Liu et al. 2020.
    """
    arguments = dict(
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )
    return transform(
        rules.RAdam,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def adagrad(
    lr: Hyperparameter = 1e-2,
    lr_decay: Hyperparameter = 0,
    weight_decay: Hyperparameter = 0,
    initial_accumulator_value: Hyperparameter = 0,
    eps: Hyperparameter = 1e-10,
    *,
    maximize: bool = False,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """Adagrad, as `torch.optim.Adagrad`: eps outside the root, unlike optax.

    With g = grad + weight_decay * p:  sum <- sum + g^2, from initial_accumulator_value
    p <- p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.adagrad(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.9

    State: `step`, `sum`. Source: torch/optim/adagrad.py; Duchi et al. 2011.
    """
    arguments = dict(
        lr=lr,
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        initial_accumulator_value=initial_accumulator_value,
        eps=eps,
        maximize=maximize,
    )
    return transform(
        rules.Adagrad,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def adadelta(
    lr: Hyperparameter = 1.0,
    rho: Hyperparameter = 0.9,
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0,
    *,
    maximize: bool = False,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """Adadelta, as `torch.optim.Adadelta`: steps in the parameter's own units.

    With g = grad + weight_decay * p:  v <- rho * v + (1 - rho) * g^2
    delta = sqrt(u + eps) / sqrt(v + eps) * g;  u <- rho * u + (1 - rho) * delta^2;  p <- p - lr * delta

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.adadelta()
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.99684

    State: `step`, `square_avg`, `acc_delta`. Source: torch/optim/adadelta.py; Zeiler 2012.
    """
    arguments = dict(lr=lr, rho=rho, eps=eps, weight_decay=weight_decay, maximize=maximize)
    return transform(
        rules.Adadelta,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def rprop(
    lr: Hyperparameter = 1e-2,
    etas: tuple[Hyperparameter, Hyperparameter] = (0.5, 1.2),
    step_sizes: tuple[Hyperparameter, Hyperparameter] = (1e-6, 50),
    *,
    maximize: bool = False,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """Rprop, as `torch.optim.Rprop`: by the gradient's sign, with a step size for each element.

    s <- clip(s * f, *step_sizes) with f = etas[1] where grad * grad_before > 0, etas[0] where < 0, else 1; s begins
    at lr, which has no other use.  grad <- 0 where the sign changed;  p <- p - sign(grad) * s

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.rprop(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.9

    State: `step`, `prev`, `step_size`. Source: torch/optim/rprop.py; Riedmiller & Braun 1993.
    """
    arguments = dict(lr=lr, etas=etas, step_sizes=step_sizes, maximize=maximize)
    return transform(
        rules.Rprop,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def asgd(
    lr: Hyperparameter = 1e-2,
    lambd: Hyperparameter = 1e-4,
    alpha: Hyperparameter = 0.75,
    t0: Hyperparameter = 1e6,
    weight_decay: Hyperparameter = 0,
    *,
    maximize: bool = False,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """Averaged SGD, as `torch.optim.ASGD`; the average is the state `ax`.

    With g = grad + weight_decay * p:  p <- p * (1 - lambd * eta) - eta * g
    ax <- ax + (p - ax) * mu (p while mu is 1)
    eta <- lr / (1 + lambd * lr * t)^alpha;  mu <- 1 / max(1, t - t0)
    A step uses the eta and mu that the one before left (lr and 1 at first): a changed lr acts one step late.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.asgd(lr=0.1)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.79999

    State: `step`, `eta`, `mu`, `ax`. Source: torch/optim/asgd.py; Polyak & Juditsky 1992.
    """
    arguments = dict(lr=lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=weight_decay, maximize=maximize)
    return transform(
        rules.ASGD,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def adafactor(
    lr: Hyperparameter = 1e-2,
    beta2_decay: Hyperparameter = -0.8,
    eps: tuple[Hyperparameter | None, Hyperparameter] = (None, 1e-3),
    d: Hyperparameter = 1.0,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """Adafactor, as `torch.optim.Adafactor`: the second moment of a matrix from its row and column means.

    rho = min(lr, 1 / sqrt(t));  alpha = max(eps[1], RMS(p)) * rho, p before its decay
    p <- p * (1 - lr * weight_decay);  w = t^beta2_decay
    R <- R + w (mean of g^2 over the last axis - R);  C likewise over the last but one
    V = R C / max(mean of R, eps[0])
    or of a vector  V <- V + w (g^2 - V)
    U = g / sqrt(max(V, eps[0]^2));  p <- p - alpha / max(1, RMS(U) / d) * U

    eps[0] None is the machine epsilon of each parameter's own type; torch takes that of the first parameter of a group
    for all of them.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.adafactor(lr=0.1)
    >>> params = jnp.array([[1.0, 1.0]])
    >>> params, state = tx.step(jnp.array([[2.0, 2.0]]), tx.init(params), params)
    >>> [round(x, 5) for x in params[0].tolist()]
    [0.9, 0.9]

    State: `step`, and `row_var` (..., n, 1) and `col_var` (..., 1, m), or for a vector `variance`.
    Raises RuntimeError for a complex parameter. Source: torch/optim/_adafactor.py; Shazeer & Stern 2018.
    """
    arguments = dict(lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay, maximize=maximize)
    return transform(
        rules.Adafactor,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def muon(
    lr: Hyperparameter = 1e-3,
    weight_decay: Hyperparameter = 0.1,
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (3.4445, -4.7750, 2.0315),
    eps: Hyperparameter = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    *,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """Muon, as `torch.optim.Muon`: momentum made orthogonal, for matrices alone; the others need another optimizer.

    b <- b + (1 - momentum) (g - b);  u = nesterov: g + momentum (b - g), else b
    O = u's singular vectors, with singular values near 1: ns_steps of Newton-Schulz in bfloat16, with X = u / |u|,
    X <- a X + (b A + c A^2) X, A = X X^T.  Matrices of one shape are iterated together.
    p <- p * (1 - lr * weight_decay) - lr * s * O,  s = sqrt(max(1, rows / columns)), or for adjust_lr_fn
    "match_rms_adamw" 0.2 * sqrt(max(rows, columns)), or for "spectral_unclamped" (torch 2.14) sqrt(rows / columns)

    >>> import jax, jax.numpy as jnp, optax, jopt
    >>> params = {"w": jnp.eye(2), "b": jnp.zeros(2)}
    >>> labels = jax.tree.map(lambda p: "muon" if p.ndim == 2 else "adamw", params)
    >>> tx = optax.partition({"muon": jopt.muon(lr=0.02), "adamw": jopt.adamw(lr=1e-3)}, labels)
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].shape
    (2, 2)

    State: `momentum_buffer`. Raises ValueError for a parameter that is no matrix, RuntimeError for a complex one.
    Source: torch/optim/_muon.py; Jordan et al. 2024; Liu et al. 2025 (match_rms_adamw); Bernstein 2025 (unclamped).
    """
    arguments = dict(
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        ns_coefficients=ns_coefficients,
        eps=eps,
        ns_steps=ns_steps,
        adjust_lr_fn=adjust_lr_fn,
    )
    return transform(
        rules.Muon,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def sparse_adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    maximize: bool = False,
    *,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """SparseAdam, as `torch.optim.SparseAdam`: Adam on the rows that have a gradient, at the cost of those rows.

    m <- m + (1 - beta1) (g - m);  v <- v + (1 - beta2) (g^2 - v);  rows without gradient keep both
    p <- p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps), t counted by the parameter

    A gradient is a `jax.experimental.sparse.BCOO`, JAX's type of sparse arrays: rows and their indices, of a fixed
    number under jit. As in torch a row may come several times (its entries are summed) or not at all; an index outside
    of the parameter is padding. Donate state and parameters, or they are copied whole.

    >>> import jax.numpy as jnp, jopt
    >>> from jax.experimental.sparse import BCOO
    >>> tx = jopt.sparse_adam(lr=0.1)
    >>> table = jnp.zeros((4, 2))
    >>> indices, rows = jnp.array([2, 0, 2]), jnp.ones((3, 2))
    >>> grad = BCOO((rows, indices[:, None]), shape=table.shape)
    >>> table, state = tx.step(grad, tx.init(table), table)
    >>> [round(x, 5) for x in table[:, 0].tolist()]
    [-0.1, 0.0, -0.1, 0.0]

    State: `step`, `exp_avg`, `exp_avg_sq`. Raises RuntimeError for a dense gradient, ValueError for a complex
    parameter. Source: torch/optim/sparse_adam.py.
    """
    return transform(
        rules.SparseAdam,
        dict(lr=lr, betas=betas, eps=eps, maximize=maximize),
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def mars(
    lr: Hyperparameter = 3e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.95, 0.99),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0,
    amsgrad: bool = False,
    gamma: Hyperparameter = 0.025,
    optimize_1d: bool = False,
    lr_1d: Hyperparameter = 3e-3,
    betas_1d: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.95),
    weight_decay_1d: Hyperparameter = 0.1,
    *,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """MARS-AdamW, which torch has not: AdamW on gradients corrected by their change from the last step.

    c = g + gamma * beta1 / (1 - beta1) * (g - g_before);  c <- c / max(1, |c|)
    m <- beta1 m + (1 - beta1) c;  v <- beta2 v + (1 - beta2) c^2
    p <- p - lr * (weight_decay * p + m / (1 - beta1^t) / (sqrt(v) / sqrt(1 - beta2^t) + eps))
    Parameters that are no matrices take c = g with lr_1d, betas_1d and weight_decay_1d, unless optimize_1d. The
    authors' code scales lr_1d with a scheduled lr; here each has a schedule of its own.

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.mars(lr=0.1, optimize_1d=True)
    >>> params = jnp.array([1.0])
    >>> params, state = tx.step(jnp.array([2.0]), tx.init(params), params)
    >>> round(params.item(), 5)
    0.9

    State: `step`, `exp_avg`, `exp_avg_sq`, `last_grad`, with amsgrad `max_exp_avg_sq`.
    Source: Yuan et al. 2024, algorithm 2 with the approximate gradient; the authors' `mars.py` ("mars-adamw").
    """
    arguments = dict(
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        gamma=gamma,
        optimize_1d=optimize_1d,
        lr_1d=lr_1d,
        betas_1d=betas_1d,
        weight_decay_1d=weight_decay_1d,
    )
    return transform(
        rules.Mars,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def gradient_descent(
    lr: Hyperparameter,
    *,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
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
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )


@_torchs_names
def momentum(
    lr: Hyperparameter,
    beta: Hyperparameter = 0.9,
    beta2: Hyperparameter | None = None,
    eps: Hyperparameter = 1e-8,
    *,
    state_dtype: Any = None,
    master_copy: bool = False,
    stochastic_rounding: int | Array | None = None,
    hyperparams_in_state: bool = False,
) -> Transform:
    """Momentum as a running average, without bias correction; torch has no name for it.

    m <- beta * m + (1 - beta) * grad;  p <- p - lr * m
    or with beta2:  v <- beta2 * v + (1 - beta2) * grad^2;  p <- p - lr * m / (sqrt(v) + eps)

    >>> import jax.numpy as jnp, jopt
    >>> tx = jopt.momentum(lr=1.0, beta=0.5)
    >>> params = jnp.array([1.0])
    >>> tx.step(jnp.array([1.0]), tx.init(params), params)[0].item()
    0.5

    State: `exp_avg`, with beta2 `exp_avg_sq`.
    """
    arguments: dict[str, Any] = dict(lr=lr, beta=beta, scaled=beta2 is not None)
    if beta2 is not None:
        arguments |= dict(beta2=beta2, eps=eps)
    return transform(
        rules.Momentum,
        arguments,
        state_dtype=state_dtype,
        master_copy=master_copy,
        stochastic_rounding=stochastic_rounding,
        hyperparams_in_state=hyperparams_in_state,
    )
