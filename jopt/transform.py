"""Front end 1: a rule as an optax gradient transformation, with an exact `step`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, Self, TypedDict, TypeVar, Unpack, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from jopt import _compat, numerics, quantized, valued
from jopt.arena import is_packed
from jopt.fusion import fuses_outputs
from jopt.leaf import init_leaf, leaf_sums, step_leaves
from jopt.rule import PHASE, Hyperparameter, Rule, Summed, at_count
from jopt.valued import Valued

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

Tree = Any
A = ParamSpec("A")
P = TypeVar("P")  # a tree of parameters
S = TypeVar("S")  # a state


class Exact(Valued, Generic[S]):
    """An `optax.GradientTransformationExtraArgs` that also has an exact `step`: the base of all that jopt makes.

    What a `step` owes its callers, whatever it wraps (`jopt.around.chaining.step` sees to it for what has no `step`):

    - Parameters and state come back with the structure, shapes and types that they came in.
    - A leaf without gradient, or not `active`, is kept with its state, and counts in no norm.
    - Where `skip`, parameters and every array of the state come back as they were, bit for bit.
    - Gradients are multiplied by the `factors`, and further arguments reach what takes them.
    """

    def frozen(self, params: Tree) -> list[bool]:
        """For each leaf of the parameters, in their order, whether it is never stepped."""
        return [False] * len(jax.tree.leaves(params))

    if TYPE_CHECKING:

        def init(self, params: Tree) -> S:  # type: ignore[override]
            """The state before the first step."""
            ...

        def update(self, updates: Tree, state: S, params: Tree | None = None, **extra_args: Any) -> tuple[Tree, S]:  # type: ignore[override]
            """The updates to add to the parameters, as optax wants them, and the next state."""
            ...

    def step(
        self,
        grads: Tree,
        state: S,
        params: P,
        *,
        active: Tree | None = None,
        factors: Sequence[Array] = (),
        skip: Array | None = None,
        **extra_args: Any,
    ) -> tuple[P, S]:
        """The new parameters, exactly, and the next state.

        `active`, `factors` and `skip` are as in `Transform.step`; `extra_args` are for transformations inside that take
        more, as optax's `value=`.
        """
        raise NotImplementedError


class State(NamedTuple):
    """An optimizer's state: arrays only, of one structure whatever is a number and what a schedule.

    Attributes:
      count: int32, the calls of `step` or `update` so far; what schedules are evaluated at.
      scalars: torch's scalar state by name, float32, one entry for each leaf of the parameters in the order
        of `jax.tree.leaves`: torch counts `step` by the parameter. What all leaves share (Prodigy's `d`) has no axis.
      slots: torch's tensor state by name (`exp_avg`, ...), each a tree like the parameters; None for a parameter
        that has no such state (Adafactor's `row_var` of a vector, `exp_avg` of one whose state is in codes). With a
        master copy also `master`.
      hyperparams: the hyperparameters by name, where the transformation keeps them in its state, to be read and set;
        else empty.
      scheduled: of those the ones that schedules set, as they were at the last step, to be read.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count, which nobody calls on a state
    scalars: dict[str, Array]
    slots: dict[str, Tree]
    hyperparams: dict[str, Array]
    scheduled: dict[str, Array]


class Transform(Exact[State]):
    """A rule as an `optax.GradientTransformationExtraArgs`: `init`, `update`, and the exact `step`.

    `update` returns `new - old` in the parameter's type, as optax wants it; added to the parameter again, that
    can differ from torch by one ulp. `step` returns the new parameters themselves.
    """

    _lift: _Lift

    def __new__(cls, lift: _Lift) -> Self:
        self = super().__new__(cls, lift.init, lift.update)  # type: ignore[arg-type]
        self._lift, self._arguments = lift, (lift,)
        return self

    def __repr__(self) -> str:
        return repr(self._lift)

    @property
    def rule(self) -> Rule:
        """The rule that is stepped."""
        return self._lift.rule

    @property
    def hyperparameters(self) -> Mapping[str, Hyperparameter]:
        """What was given: numbers, 0-d arrays and schedules by name."""
        return self._lift.hyperparameters

    @property
    def state_dtype(self) -> np.dtype | None:
        """The type of the state's tensors, if one was given."""
        return self._lift.state_dtype

    def step(  # type: ignore[override]  # it takes no further arguments: see `jopt.around.chaining.step`
        self,
        grads: Tree,
        state: State,
        params: P,
        *,
        active: Tree | None = None,
        factors: Sequence[Array] = (),
        skip: Array | None = None,
    ) -> tuple[P, State]:
        """One step: the new parameters, exactly, and the new state.

        To have it in place, donate both, to a function that returns them in the order in which it takes them: XLA
        pairs donated arguments with results of their shape in turn, and pairs crossed are copied.

        >>> import functools, jax, jax.numpy as jnp, jopt
        >>> tx = jopt.sgd(lr=0.5)
        >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
        ... def train_step(params, state, x):
        ...     grads = jax.grad(lambda p: jnp.sum((p - x) ** 2))(params)
        ...     return tx.step(grads, state, params)
        >>> params = jnp.zeros(2)
        >>> params, state = train_step(params, tx.init(params), jnp.ones(2))
        >>> params.tolist()
        [1.0, 1.0]

        Args:
          grads: a tree like `params`; a leaf may be None, and such a parameter is skipped as torch skips one
            without gradient: it, its state and its step count are kept. For a complex parameter torch's
            gradient is the conjugate of `jax.grad`'s; give that. For `sparse_adam` the leaves are
            `jax.experimental.sparse.BCOO`.
          state: from `init` or the last step.
          params: the parameters; floating or complex arrays. None and `optax.MaskedNode` are left alone.
          active: a tree of bools like `params`, possibly traced: skip the leaves that are False.
          factors: 0-d arrays that every gradient is multiplied by, one after the other, in the pass of the step.
            Clipping (`jopt.chain`) and unscaling (`jopt.loss_scale`) use it.
          skip: a bool, possibly traced: where True nothing changes, counts included, whatever the gradients are.

        Returns:
          `(params, state)`, of the structure, shapes and types that came in.

        Raises:
          TypeError: a parameter or gradient is no floating or complex array.
          RuntimeError: a sparse gradient, or for `sparse_adam` a dense one.
          ValueError: trees, shapes or the state do not fit `params`, or `params` is None.
        """
        return self._lift.step(grads, state, params, active, factors, skip)


class Options(TypedDict, total=False):
    """What every optimizer takes beside its own arguments.

    Attributes:
      state_dtype: the type of the state's tensors. A wider one than the parameter's: with float32 a bfloat16 leaf is
        stepped in float32 and rounded once, instead of after each operation as torch does. bfloat16: 2 bytes a number,
        whatever the parameter's type. "int8": a byte, in codes that share a float32 for each 256 elements
        (`jopt.quantized`), under `exp_avg_int8` and `exp_avg_absmax` in the place of `exp_avg`; leaves of less than
        4096 elements keep float32. The leaf is stepped in float32 or its own wider type, and its new state rounded
        once. Complex leaves keep their state, and so does what is like a parameter (ASGD's `ax`, schedule-free `z`).
      master_copy: keep a float32 copy of each bfloat16 and float16 parameter in the state, `state.slots["master"]`.
        That copy is stepped, in float32; the parameter is its rounded value and is not read. To change a parameter
        from outside, change both, or call `init` again.
      stochastic_rounding: a seed or a key of `jax.random`. bfloat16 parameters are stepped in float32 and rounded at
        random, up or down with the probabilities that keep the mean: steps of less than an ulp add up instead of being
        lost. The same seed, count and position in the tree give the same rounding: under vmap give each its own key.
        State that is narrower than float32 (of such parameters, or by `state_dtype`) is rounded so too, codes included.
        Use `step`; the difference that `update` returns is rounded once more.
      hyperparams_in_state: keep every hyperparameter in `State.hyperparams`, to be read, saved, and set without
        compiling again. They have JAX's default float type there: in float32 a beta2 of 0.999 is 0.99900001. What a
        schedule sets is shown in `State.scheduled` instead.
    """

    state_dtype: Any
    master_copy: bool
    stochastic_rounding: int | Array | None
    hyperparams_in_state: bool


DEFAULTS = Options(state_dtype=None, master_copy=False, stochastic_rounding=None, hyperparams_in_state=False)
OPTAX = {  # optax's names of arguments, and what to do here
    "learning_rate": "torch's is lr",
    "b1": "torch's is betas=(b1, b2)",
    "b2": "torch's is betas=(b1, b2)",
    "b3": "torch's is betas",
    "decay": "torch's is alpha",
    "decay_rate": "torch's is beta2_decay",
    "eps_in_sqrt": "torch's eps is always outside of the root, as with eps_in_sqrt=False",
    "eps_root": "torch adds nothing inside of the root",
    "initial_scale": "torch's average begins with 0",
    "mask": "take jopt.param_groups",
    "mu_dtype": "take state_dtype, for all of the state",
    "nesterov": "take jopt.nadam, which is torch's",
    "weight_decay_mask": "take jopt.param_groups",
}


def optimizer(make: Callable[A, Transform]) -> Callable[A, Transform]:
    """An optimizer's function, whose signature shows its options, for documentation and `optax.inject_hyperparams`.

    It says what optax's arguments are called here.
    """
    signature = inspect.signature(make)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    types = get_type_hints(Options)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=types[name])
        for name, value in DEFAULTS.items()
    ]
    signature = signature.replace(parameters=[*own, *options])

    @functools.wraps(make)
    def made(*args: A.args, **kwargs: A.kwargs) -> Transform:
        for name in kwargs.keys() - signature.parameters.keys():
            if name in OPTAX:
                raise TypeError(f"{made.__name__}: {name} is optax's name; {OPTAX[name]}")
            raise TypeError(f"{made.__name__}() got an unexpected keyword argument {name!r}")
        return make(*args, **kwargs)

    made.__signature__ = signature  # type: ignore[attr-defined]
    return made


def transform(rule: type[Rule], arguments: Mapping[str, Any], **options: Unpack[Options]) -> Transform:
    """The transformation that a rule class and torch's arguments for it make.

    Args:
      rule: a subclass of `jopt.rule.Rule`.
      arguments: torch's names -> numbers, 0-d arrays or schedules; flags -> bools.
      options: see `Options`.

    Raises:
      TypeError, ValueError: as torch's constructor does for the same arguments.
    """
    given: Any = DEFAULTS | options
    state_dtype, key = given["state_dtype"], given["stochastic_rounding"]
    h = rule.members(arguments)
    rule.check(h)
    # A NumPy scalar or 0-d array is a number too, and stays in its own precision.
    h = {name: x.item() if isinstance(x, np.ndarray | np.generic) else x for name, x in h.items()}
    shaped = rule.shaped_by(arguments, h, dynamic=given["hyperparams_in_state"])
    if state_dtype is not None:
        state_dtype = check_state_dtype(shaped, state_dtype)
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        key = jax.random.key(int(key))
    if key is not None and not isinstance(key, Array):
        raise TypeError(f"stochastic_rounding: expected a seed, a key of jax.random, or None, found {key!r}")
    return Transform(_Lift(shaped, h, state_dtype, bool(given["master_copy"]), key, given["hyperparams_in_state"]))


def check_state_dtype(rule: Rule, given: Any) -> np.dtype:
    """A `state_dtype` as NumPy's; TypeError or ValueError for one that the rule's state cannot have."""
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = jnp.dtype(bool)  # which is none of them either
    if dtype != quantized.INT8 and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"state_dtype: expected float32, bfloat16 or int8, found {given}")
    if dtype == quantized.INT8 or _check_floating("state_dtype", dtype) == quantized.BFLOAT16:
        slots = _slots(rule, (1, 1), jnp.dtype(jnp.float32), None, False)
        if slots and not slots.keys() & rule.signs().keys():
            raise ValueError(
                f"state_dtype: expected None or a type at least as wide as the parameters' for "
                f"{type(rule).__name__}, whose state ({', '.join(slots)}) is not kept in fewer bits, found {dtype}"
            )
    elif dtype == jnp.float16:
        raise ValueError("state_dtype: expected float32, bfloat16 or int8, found float16, in which moments underflow")
    return dtype


@dataclasses.dataclass(frozen=True)
class _Lift:
    """A rule over one leaf, lifted over a tree."""

    rule: Rule
    hyperparameters: Mapping[str, Hyperparameter]
    state_dtype: np.dtype | None
    master_copy: bool
    key: Array | None
    hyperparams_in_state: bool

    def init(self, params: Tree) -> State:
        _compat.device()
        leaves, treedef = self._flatten(params)
        count = jnp.zeros((), jnp.int32)
        shown = self._initial_hyperparams(count) if self.hyperparams_in_state else {}
        scheduled = {name: x for name, x in shown.items() if callable(self.hyperparameters[name])}
        hyperparams = {name: x for name, x in shown.items() if name not in scheduled}
        h = numerics.in_double(
            lambda _, scalars: self._at(*scalars),
            (),
            (count, self._arrays(hyperparams)),
            dtype=numerics.widest(x.dtype for x in leaves),
        )
        if self.master_copy and any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
            raise ValueError("params: expected arrays, which master_copy keeps a copy of, found ShapeDtypeStructs")
        states = [init_leaf(self.rule, h, leaf, self.state_dtype, master_copy=self.master_copy) for leaf in leaves]
        # Every slot that some shape has, so that the structure does not depend on which shapes there are.
        probes = _probed(self.rule, self.state_dtype, self.master_copy)
        names = dict.fromkeys(name for state in (*states, *probes) for name in state)
        return State(
            count=count,
            scalars={
                # a copy: what a rule begins with may be a hyperparameter's own array
                name: jnp.array(
                    jnp.arange(len(leaves), dtype=jnp.float32)
                    if name == PHASE
                    else jnp.full(self._scalar_shape(name, leaves), value, jnp.float32)
                )
                for name, value in self.rule.init_scalars(h).items()
            },
            slots={name: treedef.unflatten([s.get(name) for s in states]) for name in names},
            hyperparams=hyperparams,
            scheduled=scheduled,
        )

    def update(self, updates: Tree, state: State, params: Tree | None = None, **extra_args: Any) -> tuple[Tree, State]:
        del extra_args  # optax: accept and ignore what other transformations of a chain use
        new, state = self.step(updates, state, params)
        # A skipped leaf gets zeros rather than None, which optax.apply_updates cannot add to an array.
        return difference(new, params), state

    def step(
        self,
        grads: Tree,
        state: State,
        params: Tree | None,
        active: Tree | None = None,
        factors: Sequence[Array] = (),
        skip: Array | None = None,
        sums: dict[str, Array] | None = None,
    ) -> tuple[Tree, State]:
        """`Transform.step`. `sums`: those that the rule asks for, if they are also of leaves that are not here."""
        return self._laid_out(_Lift._step, (params, state), grads, state, params, active, factors, skip, sums)

    def sums(
        self,
        grads: Tree,
        state: State,
        params: Tree | None,
        active: Tree | None = None,
        factors: Sequence[Array] = (),
        skip: Array | None = None,
    ) -> dict[str, Array]:
        """What these leaves add to the sums that the rule asks for."""
        return self._laid_out(_Lift._sums, None, grads, state, params, active, factors, skip)

    def _laid_out(self, f: Callable[..., Any], like: Any, *args: Any) -> Any:
        """A method of this, for arguments that begin as those of `step`, on whatever mesh they lie."""
        grads, state, params, active, factors, *rest = args
        check_params(params)
        if isinstance(params, State):
            raise TypeError("params: expected the parameters, found a State; the order is step(grads, state, params)")
        check_factors(factors)
        numbers = {name: x for name, x in self.hyperparameters.items() if isinstance(x, Array)}

        def call(numbers: Mapping[str, Array], key: Array | None, *args: Any) -> Any:
            own = dataclasses.replace(self, hyperparameters={**self.hyperparameters, **numbers}, key=key)
            return f(own, *args)

        args = grads, state, params, active, tuple(factors), *rest
        return numerics.laid_out(call, like, numbers, self.key, *args)

    def _step(
        self,
        grads: Tree,
        state: State,
        params: Tree,
        active: Tree | None,
        factors: Sequence[Array],
        skip: Array | None,
        sums: dict[str, Array] | None,
    ) -> tuple[Tree, State]:
        given = self._inputs(grads, state, params, active, factors, skip)
        if sums is None and isinstance(self.rule, Summed):
            sums = self._sums_of(given, state)
        leaves, slots, mask = list(given.leaves), given.slots, given.mask
        c, scalars, scheduled = self._scalars(state, given.dtype, sums)
        results = step_leaves(self.rule, given.with_coefficients(c), separate=fuses_outputs(own=False))
        new_slots = {name: list(xs) for name, xs in slots.items()}
        for i, (leaf, state_leaf) in zip(given.stepped, results, strict=True):
            leaves[i] = leaf
            for name, x in state_leaf.items():
                new_slots[name][i] = x
        if mask is not None:
            old = state.scalars
            scalars = {
                name: jnp.where(mask, x, old[name]) if jnp.ndim(old[name]) else keep(skip, old[name], x)
                for name, x in scalars.items()
            }
        count = jnp.asarray(optax.safe_increment(state.count))
        unflatten = given.treedef.unflatten
        return unflatten(leaves), State(
            count=keep(skip, state.count, count),
            scalars=scalars,
            slots={name: unflatten(xs) for name, xs in new_slots.items()},
            hyperparams=state.hyperparams,
            scheduled=keep(skip, state.scheduled, scheduled),
        )

    def _sums(
        self, grads: Tree, state: State, params: Tree, active: Tree | None, factors: Sequence[Array], skip: Array | None
    ) -> dict[str, Array]:
        return self._sums_of(self._inputs(grads, state, params, active, factors, skip), state)

    def _sums_of(self, given: _Inputs, state: State) -> dict[str, Array]:
        """The rule's sums over these leaves."""
        rule: Any = self.rule
        c = self._scalars(state, given.dtype)[0]
        parts = [leaf_sums(rule, *leaf) for leaf in given.with_coefficients(c)]
        return {
            name: jnp.sum(jnp.stack([part[name].astype(given.dtype) for part in parts]))
            if parts
            else jnp.zeros((), given.dtype)
            for name in rule.sums
        }

    def _inputs(
        self, grads: Tree, state: State, params: Tree, active: Tree | None, factors: Sequence[Array], skip: Array | None
    ) -> _Inputs:
        """What a step is given, checked."""
        leaves, treedef = self._flatten(params)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        self._check_state(state, paths, leaves, treedef)
        checked = [
            None if g is None or isinstance(g, optax.MaskedNode) else _check_grad(self.rule, path, g, leaf)
            for path, g, leaf in zip(paths, _match(treedef, "grads", grads), leaves, strict=True)
        ]
        slots = {name: _match(treedef, f"state.slots[{name!r}]", tree) for name, tree in state.slots.items()}
        mask = self._active(checked, None if active is None else _match(treedef, "active", active))
        changing = active is not None or skip is not None  # else None leaves out what it skips
        if skip is not None:
            mask = jnp.logical_and(True if mask is None else mask, jnp.logical_not(skip))
        key = None if self.key is None else jax.random.fold_in(self.key, state.count)
        return _Inputs(leaves, treedef, checked, slots, mask, changing, key, factors)

    def __repr__(self) -> str:
        h, tuples = dict(self.hyperparameters), self.rule.tuples
        members = {name for names in tuples.values() for name in names}
        arguments = {name: x for name, x in h.items() if name not in members}
        arguments |= {name: tuple(h[member] for member in names) for name, names in tuples.items() if names[0] in h}
        fields = {f.name: getattr(self.rule, f.name) for f in dataclasses.fields(self.rule) if f.name not in h}
        fields |= {name: getattr(self, name) for name in ("state_dtype", "master_copy", "hyperparams_in_state")}
        fields["stochastic_rounding"] = self.key
        arguments |= {name: x for name, x in fields.items() if x is not None and x is not False}
        return valued.call(type(self.rule).__name__, (), arguments)

    def _check_state(self, state: Any, paths: list[str], leaves: list[Array], treedef: Any) -> None:
        """Raise ValueError for a state that is not of this transformation and these parameters."""
        remedy = f"; make the state of {self!r} by its init(params)"
        if not isinstance(state, State):
            raise ValueError(f"state: expected a jopt.State, found {type(state).__name__}{remedy}")
        kinds = [(x.shape, x.dtype) for x in leaves]
        expected = [_slots(self.rule, shape, dtype, self.state_dtype, self.master_copy) for shape, dtype in kinds]
        probed = _probed(self.rule, self.state_dtype, self.master_copy)
        names = {name for slots in (*expected, *probed) for name in slots}
        scalars = self.rule.init_scalars(dict.fromkeys(self.rule.hyperparameters, 0.0))
        kept = self.hyperparameters if self.hyperparams_in_state else {}
        scheduled = {name for name, value in kept.items() if callable(value)}
        fields = {"slots": names, "scalars": scalars, "hyperparams": set(kept) - scheduled, "scheduled": scheduled}
        for field, wanted in fields.items():
            if set(found := getattr(state, field)) != set(wanted):
                raise ValueError(
                    f"state.{field}: expected {', '.join(sorted(wanted)) or 'none'}, found "
                    f"{', '.join(sorted(found)) or 'none'}{remedy}"
                )
        numbers = {"count": ((), state.count)}
        numbers |= {f"scalars[{name!r}]": (self._scalar_shape(name, leaves), x) for name, x in state.scalars.items()}
        numbers |= {f"hyperparams[{name!r}]": ((), x) for name, x in state.hyperparams.items()}
        numbers |= {f"scheduled[{name!r}]": ((), x) for name, x in state.scheduled.items()}
        for name, (shape, x) in numbers.items():
            if jnp.shape(x) != shape:
                raise ValueError(f"state.{name}: expected shape {shape}, found {jnp.shape(x)}{remedy}")
        for name, tree in state.slots.items():
            for path, slots, x in zip(paths, expected, _match(treedef, f"state.slots[{name!r}]", tree), strict=True):
                wanted = slots.get(name)
                found = None if x is None else (jnp.shape(x), jnp.iscomplexobj(x))
                if wanted != found:
                    raise ValueError(
                        f"state.slots[{name!r}]{path}: expected {_described(wanted)}, found {_described(found)}{remedy}"
                    )

    # --- scalars

    def _scalars(self, state: State, dtype: np.dtype, sums: dict[str, Array] | None = None) -> tuple[dict, dict, dict]:
        """This step's coefficients in `dtype`, the next scalar state, and the schedules' values.

        Where the rule's sums are not known yet, what depends on them is left out.
        """

        def evaluate(s: Any, scalars: Any) -> Any:
            count, arrays, sums = scalars
            h = self._at(count, arrays)
            c, s = self.rule.coefficients(h, s, jnp, numerics.as_float32, sums)
            return c, s, {name: h[name] for name in state.scheduled}

        arrays = self._arrays(state.hyperparams)
        c, s, scheduled = numerics.in_double(evaluate, state.scalars, (state.count, arrays, sums), dtype=dtype)
        s = {name: x.astype(state.scalars[name].dtype) for name, x in s.items()}
        return c, s, {name: x.astype(state.scheduled[name].dtype) for name, x in scheduled.items()}

    def _at(self, count: Array, arrays: dict[str, Array]) -> dict[str, Any]:
        """The hyperparameters at `count`. Runs in the double scope, where Python numbers stay exact."""
        return {
            name: at_count(name, value, count) if callable(value) else arrays.get(name, value)
            for name, value in self.hyperparameters.items()
        }

    def _arrays(self, hyperparams: Mapping[str, Array]) -> dict[str, Array]:
        """The hyperparameters that are arrays: they enter the double scope as arguments."""
        given = {k: v for k, v in self.hyperparameters.items() if isinstance(v, Array)}
        return given | dict(hyperparams)

    def _initial_hyperparams(self, count: Array) -> dict[str, Array]:
        dtype = jnp.zeros(()).dtype
        h = numerics.in_double(lambda _, s: self._at(*s), (), (count, self._arrays({})), dtype=dtype)
        return {name: jnp.array(x) for name, x in h.items()}

    def _scalar_shape(self, name: str, leaves: list[Array]) -> tuple[int, ...]:
        return () if name in self.rule.shared else (len(leaves),)

    # --- trees

    def _flatten(self, params: Tree) -> tuple[list[Array], Any]:
        packed = [x for x in jax.tree.leaves(params, is_leaf=is_packed) if is_packed(x)]
        if packed and self.rule.scope != "element":
            raise ValueError(
                f"{type(self.rule).__name__} looks at whole tensors or rows (scope {self.rule.scope!r}), which a "
                "packed buffer hides: give it the unpacked parameters"
            )
        with_path, treedef = jax.tree_util.tree_flatten_with_path(params)
        for path, leaf in with_path:
            name = f"params{jax.tree_util.keystr(path)}"
            check_array(name, leaf)
            self.rule.check_param(name, jnp.shape(leaf), jnp.result_type(leaf))
        return [_array(leaf) for _, leaf in with_path], treedef

    def _active(self, grads: Sequence[Any], active: list[Any] | None) -> Array | None:
        """Which leaves step: None for all, else a bool vector."""
        if not grads or (active is None and all(g is not None for g in grads)):
            return None
        flags = [g is not None for g in grads]
        if active is None:
            return jnp.array(flags, bool)
        return jnp.stack([jnp.logical_and(f, a) for f, a in zip(flags, active, strict=True)])


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What a step is given: lists over the leaves, and whether each is active, if not all are."""

    leaves: list[Array]
    treedef: Any
    grads: list[Any]
    slots: dict[str, list[Array | None]]
    mask: Array | None
    changing: bool
    key: Array | None
    factors: Sequence[Array]

    @property
    def dtype(self) -> np.dtype:
        """The type of coefficients."""
        return numerics.widest(x.dtype for x in self.leaves)

    @functools.cached_property
    def stepped(self) -> list[int]:
        """Which leaves have a gradient."""
        return [i for i, grad in enumerate(self.grads) if grad is not None]

    def with_coefficients(self, c: dict[str, Array]) -> list[tuple[Any, ...]]:
        """The arguments of `step_leaf` for each leaf that has a gradient."""
        mask = self.mask if self.changing else None
        rows = [_row((c, mask), position) for position in numerics.positions(self.stepped)]
        return [
            (
                c_i,
                self.grads[i],
                {name: xs[i] for name, xs in self.slots.items() if xs[i] is not None},
                self.leaves[i],
                active_i,
                None if self.key is None else jax.random.fold_in(self.key, i),
                self.factors,
            )
            for i, (c_i, active_i) in zip(self.stepped, rows, strict=True)
        ]


@functools.lru_cache(4096)
def _slots(rule: Rule, shape: tuple[int, ...], dtype: Any, state_dtype: Any, master_copy: bool) -> dict[str, Any]:
    """For each slot of a leaf's state its shape, and whether it is complex."""
    h = dict.fromkeys(rule.hyperparameters, 0.0)
    make = lambda x: init_leaf(rule, h, x, state_dtype, master_copy=master_copy)  # noqa: E731
    state = jax.eval_shape(make, jax.ShapeDtypeStruct(shape, dtype))
    return {name: (x.shape, jnp.issubdtype(x.dtype, jnp.complexfloating)) for name, x in state.items()}


def _probed(rule: Rule, state_dtype: Any, master_copy: bool) -> list[dict[str, Any]]:
    """The slots of a vector and of a matrix, small and large: every slot that some shape has."""
    n = quantized.SMALLEST if state_dtype == quantized.INT8 else 0
    shapes = dict.fromkeys(((0,), (0, 0), (n,), (n, 1) if n else (0, 0)))
    return [_slots(rule, shape, jnp.dtype(jnp.bfloat16), state_dtype, master_copy) for shape in shapes]


def _described(slot: tuple[tuple[int, ...], bool] | None) -> str:
    return "None" if slot is None else f"{'complex numbers' if slot[1] else 'real numbers'} of shape {slot[0]}"


def keep(skip: Array | None, old: Tree, new: Tree) -> Tree:
    """A tree after a step, or where `skip` as it was before."""
    return new if skip is None else jax.tree.map(lambda x, y: jnp.where(skip, x, y), old, new)


def difference(new: Tree, params: Tree) -> Tree:
    """What a step added. To what is no floating or complex array: zeros, and to a key of jax.random None."""

    def leaf(new: Any, old: Any) -> Any:
        if jnp.issubdtype(jnp.result_type(old), jnp.inexact):
            return new - old
        return None if jnp.issubdtype(old.dtype, jax.dtypes.prng_key) else jnp.zeros_like(old)

    return jax.tree.map(leaf, new, params)


def check_factors(factors: Sequence[Array]) -> None:
    for i, x in enumerate(factors):
        if jnp.shape(x):
            raise ValueError(f"factors[{i}]: expected one number for all gradients, found shape {jnp.shape(x)}")


def check_params(params: Tree | None) -> None:
    if params is None:
        raise ValueError("params: expected the parameters, found None; pass them to update(grads, state, params)")


@jax.jit
def _row(vectors: Any, position: Array) -> Any:
    """The entries of vectors at a position; scalars as they are."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, position, keepdims=False) if jnp.ndim(x) else x, vectors)


def _match(treedef: Any, name: str, tree: Tree) -> list[Any]:
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(f"{name}: expected the structure of params, {treedef}; {error}") from None


def _check_floating(name: str, dtype: np.dtype) -> np.dtype:
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16:
        raise TypeError(
            f"{name}: expected a floating point type of at least 16 bits, found {dtype}; keep it in a wider type, and "
            "cast it where the loss is computed"
        )
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{name}: expected a floating point or complex type, found {dtype}; put None in its place, or use "
            "optax.masked or optax.partition, to leave it out of the optimization"
        )
    return dtype


def _array(x: Any) -> Array:
    """A parameter, or zeros of the shape that is described."""
    return jnp.zeros(x.shape, x.dtype, device=x.sharding) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)


def check_array(name: str, x: Any) -> None:
    """Raise TypeError for what is no parameter."""
    if isinstance(x, bool | int | str) or not (isinstance(x, float | complex) or hasattr(x, "dtype")):
        raise TypeError(f"{name}: expected a floating point or complex array, found {type(x).__name__}")
    _check_floating(name, jnp.result_type(x))


def _check_grad(rule: Rule, path: str, grad: Any, param: Array) -> Array | BCOO:
    name = f"grads{path}"
    if numerics.is_sparse(grad) != (rule.scope == "rows"):
        if numerics.is_sparse(grad):
            raise RuntimeError(f"{name}: {type(rule).__name__} does not support sparse gradients")
        raise RuntimeError(
            f"{name}: {type(rule).__name__} does not support dense gradients, please consider Adam instead, or give "
            "jax.experimental.sparse.BCOO((rows, indices[:, None]), shape=param.shape)"
        )
    if numerics.is_sparse(grad):
        if grad.n_batch or not grad.n_sparse:
            raise ValueError(
                f"{name}: expected n_batch=0 and n_sparse>=1, found n_batch={grad.n_batch}, n_sparse={grad.n_sparse}"
            )
    else:
        if isinstance(grad, bool | int | str) or not isinstance(
            grad, Array | np.ndarray | np.generic | float | complex
        ):
            raise TypeError(f"{name}: expected an array or None, found {type(grad).__name__}")
        grad = jnp.asarray(grad)
    _check_floating(name, grad.dtype)
    if grad.shape != param.shape:
        raise ValueError(f"{name}: expected the parameter's shape {param.shape}, found {grad.shape}")
    if jnp.issubdtype(grad.dtype, jnp.complexfloating) and not jnp.iscomplexobj(param):
        raise TypeError(f"{name}: found {grad.dtype} for a parameter of {param.dtype}; take its real part")
    return grad
