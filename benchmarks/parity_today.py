"""Today's optimizers in float32 and bfloat16 against their authors' code: docs/parity-today.md, ten minutes.

python -m benchmarks.parity_today      with what tests/authors.py names on PYTHONPATH
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import torch

import jopt
from benchmarks import parity
from benchmarks.report import wrapped
from interop import optim
from tests import authors

SEEDS, STEPS = 12, 200
PAGE = """# Parity of today's optimizers in float32 and bfloat16

Against the authors' own code, {steps} steps with feedback on {seeds} problems, those of [parity with torch](parity.md);
`python -m benchmarks.parity_today` writes this page with their packages installed ({machine}). In float64 the tests
compare all of them, 200 steps within 1e-12.

- **float32**: the root mean square error against the authors' float64 trajectory, the median over seeds: theirs, and
  ours over theirs. 1 is as exact as the authors.
- **bfloat16**: the share of parameters that end equal to the bit, and the largest difference in units of the last
  place.

{table}

{reasons}

SOAP, Kron and NorMuon are not here: the authors' code computes their matrices in float32 or bfloat16 whatever the
parameters are in, and is [compared in float64](optimizers/README.md) with those lines edited.
"""
REASONS = """Less than 1 has fewer roundings; and Adan's decay multiplies by 1 / (1 + lr * weight_decay), just
below 1, where float32 is twice as fine as just above. Prodigy's row is of one problem, for its step size is found
from all parameters of an optimizer. LARS's norms in bfloat16 depend on the order of their sum, and an ulp of a norm
moves every element."""


@dataclasses.dataclass(frozen=True)
class Todays(parity.Configuration):
    """A row: one of `tests.authors.REFERENCES`. The authors' class takes the place of torch's."""

    def torch(self, params: Any, module: Any = torch.optim, **path: Any) -> torch.optim.Optimizer:
        reference = authors.REFERENCES[self.name]
        if module is optim:
            taken = {k: x for k, x in self.arguments.items() if k not in reference.renamed}
            made = getattr(optim, authors.CLASSES[self.name])(params, **taken)
        else:
            theirs = {reference.renamed.get(k, k): x for k, x in self.arguments.items()} | reference.others
            made = authors.authors_class(reference)(params, **theirs)
        if hasattr(made, "train"):
            made.train()
        return made

    def jopt(self) -> Any:
        return getattr(jopt, authors.REFERENCES[self.name].function or self.name)(**self.arguments)


REFERENCES = [name for name, reference in authors.REFERENCES.items() if not reference.edits]


def measure(c: Todays) -> list[str]:
    seeds = 1 if c.jopt().rule.sums else SEEDS  # Prodigy's numbers are of all that one optimizer has
    truth = parity.torch_run(c, "float64", seeds, STEPS)
    reference = parity.torch_run(c, "float32", seeds, STEPS)
    error = float(np.median(parity.rms_error(reference, truth)))
    ratios = [
        parity.ratio(run, reference, truth)
        for run in (parity.jax_run(c, "float32", seeds, STEPS), parity.torch_run(c, "float32", seeds, STEPS, optim))
    ]
    low = parity.torch_run(c, "bfloat16", seeds, STEPS)
    equal, ulps = parity.ulps(parity.jax_run(c, "bfloat16", seeds, STEPS), low, "bfloat16")
    return [f"`{c}`", f"{error:.1e}", *(f"{x:.3f}" for x in ratios), parity.percent(equal), parity.number(ulps)]


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    rows = []
    for name in REFERENCES:
        for arguments in authors.REFERENCES[name].runs:
            rows.append(measure(Todays(name, arguments, {})))
            print(*rows[-1], flush=True)
    head = ["configuration", "float32: authors' error", "jopt", "drop-in", "bfloat16 equal", "ulp"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    page = PAGE.format(steps=STEPS, seeds=SEEDS, machine=parity.machine(), table=table, reasons=REASONS)
    (parity.DOCS / "parity-today.md").write_text(wrapped(page))


if __name__ == "__main__":
    main()
