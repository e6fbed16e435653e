"""What a section found, as JSON, a page and a plot; and the page that sums up all sections."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # column -> value; "detail" is not written


@dataclasses.dataclass
class Figure:
    """Lines over numbers, or bars over names."""

    title: str
    ylabel: str
    x: list[Any]
    series: dict[str, list[float | None]]
    line: float | None = None  # a horizontal one, to compare with


@dataclasses.dataclass
class Target:
    """What is aimed at, and what was reached; a number is to be at least, or at most, the target."""

    what: str
    target: float
    reached: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.reached <= self.target if self.at_most else self.reached >= self.target


@dataclasses.dataclass
class Section:
    title: str
    text: str
    tables: dict[str, list[Row]]
    figures: list[Figure]
    targets: list[Target]


def write(name: str, section: Section, machine: dict[str, Any], seconds: float, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "seconds": round(seconds)} | dataclasses.asdict(section)
    (out / f"{name}.json").write_text(as_json(without_detail(content)) + "\n")
    (out / f"{name}.md").write_text(wrapped(page(name, section, machine)))
    plot(section.figures, out / f"{name}.png")


def wrapped(page: str, width: int = 120) -> str:
    """The page, with the paragraphs and list entries that are wider wrapped; code, tables and headings are kept."""
    entry = re.compile(r"\s*([-*]|\d+\.)\s+")
    done: list[str] = []
    block: list[str] = []

    def finish() -> None:
        if any(len(line) > width for line in block):
            indent = (entry.match(block[0]) or re.match(r"\s*", block[0]))[0]
            text = " ".join([block[0][len(indent) :], *(line.strip() for line in block[1:])])
            # Code, the alternative text of a picture and an address stay in one line.
            text = re.sub(r"`[^`]*`|!\[[^]]*\]|\]\([^)]*\)", lambda m: m[0].replace(" ", "\0"), text)
            options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * len(indent)}
            block[:] = (x.replace("\0", " ") for x in textwrap.wrap(text, width, initial_indent=indent, **options))
        done.extend(block)
        block.clear()

    code = False
    for line in page.split("\n"):
        fence = line.lstrip().startswith("```")
        kept = code or fence or not line.strip() or line.lstrip()[0] in "|#<"
        if kept or entry.match(line):
            finish()
        (done if kept else block).append(line)
        code ^= fence
    finish()
    return "\n".join(done)


def as_json(x: Any, digits: int | None = 4, indent: str = "") -> str:
    """A row a line: an entry of a dictionary, and of a list of dictionaries. Numbers have so many digits."""
    inner = indent + " "
    if isinstance(x, dict) and x:
        entries = [f"{inner}{json.dumps(k)}: {as_json(v, digits, inner)}" for k, v in x.items()]
        return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
    if isinstance(x, list) and any(isinstance(row, dict) for row in x):
        return "[\n" + ",\n".join(inner + json.dumps(_short(row, digits)) for row in x) + f"\n{indent}]"
    return json.dumps(_short(x, digits))


def _short(x: Any, digits: int | None) -> Any:
    if isinstance(x, float) and digits and math.isfinite(x):
        return float(f"{x:.{digits}g}")
    if isinstance(x, dict):
        return {k: _short(v, digits) for k, v in x.items()}
    return [_short(v, digits) for v in x] if isinstance(x, list | tuple) else x


def without_detail(x: Any) -> Any:
    """A section without the detail of each row."""
    if isinstance(x, dict):
        return {k: without_detail(v) for k, v in x.items() if k != "detail"}
    return [without_detail(v) for v in x] if isinstance(x, list) else x


def page(name: str, section: Section, machine: dict[str, Any]) -> str:
    lines = [f"# {section.title}", "", section.text, "", f"![{section.title}]({name}.png)", ""]
    for title, rows in section.tables.items():
        lines += [f"## {title}", "", *table(rows), ""]
    return "\n".join([*lines, *about(machine)]) + "\n"


def table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(c for row in rows for c in row if c != "detail"))
    numbers = {c for c in columns if all(isinstance(row.get(c, 0), int | float | None) for row in rows)}
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---:" if c in numbers else "---" for c in columns) + "|",
    ]
    return lines + ["| " + " | ".join(text(row.get(c)) for c in columns) + " |" for row in rows]


def text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}"


def about(machine: dict[str, Any]) -> list[str]:
    return ["Measured with: " + ", ".join(f"{k} {v}" for k, v in machine.items() if v != "") + "."]


def summary(out: Path) -> None:
    """README.md of all the sections whose results are there."""
    lines = ["# Benchmarks", "", "`make bench` measures all; `python -m benchmarks --only SECTION ...` some again.", ""]
    lines += [
        "Ratios are medians over interleaved rounds of a rival's time over ours: above 1 ours is faster. The machine "
        "is shared, so that ratios mean more than milliseconds.",
        "",
        "| section | what | target | reached | |",
        "|---|---|---:|---:|---|",
    ]
    dates = {}
    for path in sorted(out.glob("*.json")):
        content = json.loads(path.read_text())
        if "targets" not in content:
            continue
        dates[path.stem] = content["machine"]["date"]
        for values in content["targets"]:
            target = Target(**values)
            bound = "at most" if target.at_most else "at least"
            lines.append(
                f"| [{path.stem}]({path.stem}.md) | {target.what} | {bound} {text(target.target)} | "
                f"{text(target.reached)} | {'met' if target.met else 'missed'} |"
            )
    lines += ["", "Measured: " + ", ".join(f"{name} {date}" for name, date in dates.items()) + "."]
    (out / "README.md").write_text(wrapped("\n".join(lines) + "\n"))


def plot(figures: list[Figure], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(len(figures), 1, figsize=(11, 4.2 * len(figures)), constrained_layout=True, squeeze=False)
    for axis, figure in zip(axes[:, 0], figures, strict=True):
        if all(isinstance(x, int) for x in figure.x):
            for name, ys in figure.series.items():
                axis.plot(figure.x, [math.nan if y is None else y for y in ys], marker="o", label=name)
            axis.set_xscale("log")
        else:
            width = 0.8 / len(figure.series)
            for k, (name, ys) in enumerate(figure.series.items()):
                xs = [i + (k - (len(figure.series) - 1) / 2) * width for i in range(len(figure.x))]
                axis.bar(xs, [math.nan if y is None else y for y in ys], width, label=name)
            axis.set_xticks(range(len(figure.x)), [str(x).replace(", ", "\n") for x in figure.x], fontsize=8)
        if figure.line is not None:
            axis.axhline(figure.line, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_ylabel(figure.ylabel)
        axis.set_title(figure.title)
        axis.legend(fontsize=8)
    plt.savefig(path, dpi=100)
    plt.close()
