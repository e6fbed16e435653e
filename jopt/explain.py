"""What a step does to memory, as the compiled program has it."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jopt.fusion import fuses_outputs
from jopt.transform import Exact


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A compiled step in numbers; `str` of it is for reading. Bytes are of one device.

    Attributes:
      optimizer: the rule's name.
      platform: where it was compiled for, "cpu" or "tpu (TPU v5 lite)".
      parameters: how many numbers are optimized.
      buffers: how many arrays hold them.
      pass_bytes: the parameters' bytes; reading or writing as many is a pass.
      minimum_bytes: each input read once and each output written once.
      accessed_bytes: what the compiler counts for its program; None where it does not count: for CUDA, and in loops
        of the program's own (Muon's iteration, pieces of large leaves with state in eight bits, sums of quotients).
      fusions: the program's fused loops, tiny ones for coefficients among them.
      outputs: the arrays that it returns: parameters and state.
      outputs_in_place: how many of them lie where they lay, with parameters and state donated.
      temporary_bytes: memory beside inputs and outputs.
      compile_seconds: from the trace to the program.
      fuses_outputs: whether XLA on CPU makes one loop of several outputs; None on other platforms, which do.
      program: its optimized HLO.
    """

    optimizer: str
    platform: str
    parameters: int
    buffers: int
    pass_bytes: int
    minimum_bytes: int
    accessed_bytes: int | None
    fusions: int
    outputs: int
    outputs_in_place: int
    temporary_bytes: int
    compile_seconds: float
    fuses_outputs: bool | None
    program: str = dataclasses.field(repr=False)

    @property
    def minimum_passes(self) -> float:
        """`minimum_bytes` in passes: 7 for AdamW, which reads p, g, m, v and writes p, m, v."""
        return self.minimum_bytes / max(self.pass_bytes, 1)

    @property
    def passes(self) -> float | None:
        """`accessed_bytes` in passes."""
        return None if self.accessed_bytes is None else self.accessed_bytes / max(self.pass_bytes, 1)

    def __str__(self) -> str:
        accessed = "not counted" if self.passes is None else f"{self.passes:.2f}"
        lines = [
            f"{self.optimizer} on {self.platform}: {self.parameters:,} parameters in {self.buffers} "
            + ("buffer" if self.buffers == 1 else "buffers"),
            f"  passes over the parameters   {accessed}; at least {self.minimum_passes:.2f}, "
            f"{self.minimum_bytes / 1e6:,.1f} MB",
            f"  written in place             {self.outputs_in_place} of {self.outputs} outputs",
            f"  temporary memory             {self.temporary_bytes:,} bytes",
            f"  fusions                      {self.fusions}",
            f"  compiled in                  {self.compile_seconds:.2f} s",
        ]
        if self.fuses_outputs is not None:
            how = "on" if self.fuses_outputs else "off; jopt.enable_multi_output_fusion() before the first use of JAX"
            lines.append(f"  all outputs in one loop      {how}")
        return "\n".join(lines)


def explain(tx: Exact[Any], params: Any, *, device: Any = None) -> Explanation:
    """Compile `tx.step` for these parameters, donated as the state is, and say what the program does.

    Nothing is run or allocated. The least that a step can do is 2 passes over the parameters and the state and one over
    the gradients: `minimum_bytes = 2 (params + state) + gradients`.

    >>> import jax, jax.numpy as jnp, jopt
    >>> found = jopt.explain(jopt.adamw(), {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)})
    >>> print(found)  # doctest: +ELLIPSIS
    Adam on cpu: 1,000,000 parameters in 1 buffer
      passes over the parameters   ...; at least 7.00, 28.0 MB
      written in place             5 of 5 outputs
      ...

    Args:
      tx: an optimizer of jopt's.
      params: a tree of arrays or of `jax.ShapeDtypeStruct`s, or a `jopt.Packed` of them. Their shardings are kept.
      device: a `jax.Device` to compile for, in place of those; also of a topology, for a TPU that is not there:
        `jax.experimental.topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]`.

    Returns:
      An `Explanation`.

    Raises:
      TypeError: `tx` is no optimizer, chain or groups of jopt's, or a parameter no floating or complex array.
      ValueError: the optimizer's gradients are sparse, so that its cost depends on them.
    """
    if not isinstance(tx, Exact):
        raise TypeError(f"tx: expected an optimizer, chain or groups of jopt's, found {type(tx).__name__}")
    rule = getattr(tx, "rule", None)
    if rule is not None and rule.scope == "rows":
        raise ValueError(
            f"tx: {type(rule).__name__} takes sparse gradients, and its cost depends on their rows; explain the "
            "step that you compile, by jax.jit(...).lower(...).compile().cost_analysis()"
        )

    def spec(x: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
        sharding = sharding if device is None else SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

    params = jax.tree.map(lambda x: spec(x, getattr(x, "sharding", None)), params)
    state = jax.tree.map(spec, jax.eval_shape(tx.init, params))
    start = time.perf_counter()
    step = jax.jit(lambda params, state, grads: tx.step(grads, state, params), donate_argnums=(0, 1))
    compiled = step.lower(params, state, params).compile()
    seconds = time.perf_counter() - start

    program = compiled.as_text() or ""
    memory = compiled.memory_analysis()
    assert memory is not None
    in_pieces = " while(" in program  # of which the compiler counts one
    accessed = None if in_pieces else (compiled.cost_analysis() or {}).get("bytes accessed")
    place = min(jax.tree.leaves(compiled.input_shardings)[0].device_set, key=lambda d: d.id)
    weights = jax.tree.leaves(params)
    outputs = [*weights, *jax.tree.leaves(state)]
    return Explanation(
        optimizer=type(rule or tx).__name__,
        platform=place.platform if place.platform == place.device_kind else f"{place.platform} ({place.device_kind})",
        parameters=sum(x.size for x in weights),
        buffers=len(weights),
        pass_bytes=_bytes(weights),
        minimum_bytes=2 * _bytes(outputs) + _bytes(weights),
        accessed_bytes=None if accessed is None else int(accessed),
        fusions=program[program.find("\nENTRY") :].count(" fusion("),
        outputs=len(outputs),
        outputs_in_place=len(re.findall(r"(?:may|must)-alias", program.partition("\n")[0])),
        temporary_bytes=memory.temp_size_in_bytes,
        compile_seconds=seconds,
        fuses_outputs=fuses_outputs(own=False) if place.platform == "cpu" else None,
        program=program,
    )


def _bytes(arrays: list[Any]) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)
