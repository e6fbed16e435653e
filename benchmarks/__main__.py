"""Measure steps, training, compilation and memory against torch and optax; results, pages and plots by section.

python -m benchmarks                          all, some 25 minutes on two cores: writes benchmarks/results
python -m benchmarks --only dropin jax        these sections again
python -m benchmarks --short                  all on small shapes, in a minute: writes out/benchmarks
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

import jopt
from benchmarks import (
    compiling,
    dropin,
    in_jax,
    loading,
    measure,
    memory,
    processes,
    report,
    small,
    special,
    sweeping,
    training,
    update,
    wrapping,
)

SECTIONS = {
    "dropin": dropin.run,
    "training": training.run,
    "update": update.run,
    "jax": in_jax.run,
    "compile": compiling.run,
    "memory": memory.run,
    "special": special.run,
    "small": small.run,
    "wrap": wrapping.run,
    "loading": loading.run,
    "processes": processes.run,
    "sweep": sweeping.run,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--short", action="store_true", help="few rounds, small shapes: whether it runs at all")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    out = options.out or (Path("out/benchmarks") if options.short else Path(__file__).parent / "results")
    jopt.enable_multi_output_fusion()  # before JAX starts
    measure.prepare()
    measure.read_natively()
    for name in tqdm(options.only, desc="sections", disable=None):
        start = time.perf_counter()
        section = SECTIONS[name](options.short)
        report.write(name, section, measure.machine(), time.perf_counter() - start, out)
        report.summary(out)
        tqdm.write(f"{name}: {time.perf_counter() - start:.0f} s, {out / f'{name}.md'}")


if __name__ == "__main__":
    main(sys.argv[1:])
