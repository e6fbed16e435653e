"""The states under names that `jax.export` writes, so that a jitted step goes into a file and out again.

Not those of groups: in them are `optax.MaskedNode`s, which are optax's to name. Export a function of their leaves.
"""

from jax import export

from jopt.around.averages import AverageState
from jopt.around.clip import ClipState, ClipValueState
from jopt.around.monitor import Health, MonitorState
from jopt.around.plateau import PlateauState
from jopt.around.scaling import ScaleState, SkipState
from jopt.lbfgs import LBFGSState
from jopt.transform import State

for state in (
    *(State, AverageState, ClipState, ClipValueState, PlateauState, ScaleState, SkipState),
    *(Health, MonitorState, LBFGSState),
):
    export.register_namedtuple_serialization(state, serialized_name=f"jopt.{state.__name__}")
