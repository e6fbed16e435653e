"""torch.optim's optimizers in JAX, exactly, as optax-compatible gradient transformations."""

from jopt import (
    _compat,  # noqa: F401  first: it says which version of what is needed
    numerics,  # with rule and transform, for a rule of one's own
    rule,
    schedules,
    states,  # noqa: F401  for jax.export
    transform,
)
from jopt.arena import Packed, pack, unpack
from jopt.around.averages import Average, AverageState, ema, swa, update_bn
from jopt.around.chaining import Chain, chain
from jopt.around.clip import clip_grad_norm, clip_grad_value
from jopt.around.evaluating import schedule_free_eval
from jopt.around.groups import Groups, norms_and_biases, param_groups
from jopt.around.monitor import Health, HealthReport, Monitor, health_report, monitor
from jopt.around.plateau import Plateau, PlateauState, reduce_lr_on_plateau
from jopt.around.scaling import LossScale, ScaleState, loss_scale, skip_nonfinite
from jopt.explain import Explanation, explain
from jopt.fusion import enable_multi_output_fusion
from jopt.lbfgs import lbfgs
from jopt.optimizers import (
    adadelta,
    adafactor,
    adagrad,
    adam,
    adamax,
    adamw,
    adan,
    ademamix,
    adopt,
    asgd,
    gradient_descent,
    kron,
    lamb,
    lars,
    lion,
    mars,
    momentum,
    muon,
    nadam,
    nor_muon,
    prodigy,
    radam,
    rmsprop,
    rprop,
    schedule_free_adamw,
    schedule_free_sgd,
    sgd,
    soap,
    sparse_adam,
)
from jopt.sharding import Sharded, shard_state
from jopt.sweeps.range_test import RangeTest, lr_range_test
from jopt.sweeps.result import Sweep
from jopt.sweeps.sweep import sweep
from jopt.transform import State, Transform

__all__ = [
    "Average",
    "AverageState",
    "Chain",
    "Explanation",
    "Groups",
    "Health",
    "HealthReport",
    "LossScale",
    "Monitor",
    "Packed",
    "Plateau",
    "PlateauState",
    "RangeTest",
    "ScaleState",
    "Sharded",
    "State",
    "Sweep",
    "Transform",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adan",
    "ademamix",
    "adopt",
    "asgd",
    "chain",
    "clip_grad_norm",
    "clip_grad_value",
    "ema",
    "enable_multi_output_fusion",
    "explain",
    "gradient_descent",
    "health_report",
    "kron",
    "lamb",
    "lars",
    "lbfgs",
    "lion",
    "loss_scale",
    "lr_range_test",
    "mars",
    "momentum",
    "monitor",
    "muon",
    "nadam",
    "nor_muon",
    "norms_and_biases",
    "numerics",
    "pack",
    "param_groups",
    "prodigy",
    "radam",
    "reduce_lr_on_plateau",
    "rmsprop",
    "rprop",
    "rule",
    "schedule_free_adamw",
    "schedule_free_eval",
    "schedule_free_sgd",
    "schedules",
    "sgd",
    "shard_state",
    "skip_nonfinite",
    "soap",
    "sparse_adam",
    "swa",
    "sweep",
    "transform",
    "unpack",
    "update_bn",
]
__version__ = "0.1.0"
