"""The rooms of the code: imports point one way, and what is a device's own stays in its room."""

import ast
import re

import pytest

from tests import ROOT

# From the bottom: a module may import what stands on its own line or above.
JOPT = [
    ["_compat"],
    ["matrices", "numerics", "valued"],
    ["loops", "rule"],
    ["quantized"],
    ["leaf"],
    ["fusion", "arena"],
    ["transform"],
    ["optimizers", "line_search", "schedules"],
    ["lbfgs"],
    ["around"],
    ["sharding", "explain"],
    ["sweeps", "states"],
    ["__init__"],
]
INTEROP = [
    ["_compat", "environment"],
    ["memory"],
    ["modules"],
    ["dropin"],
    ["optim"],
    ["amp", "data", "explaining", "sweeping", "wrapping", "runs"],
    ["_public", "__main__"],
    ["__init__"],
]
LEVELS = {
    f"{package}.{name}": i
    for package, rows in (("jopt", JOPT), ("interop", INTEROP))
    for i, row in enumerate(rows)
    for name in row
}


def modules():
    paths = sorted([*(ROOT / "jopt").rglob("*.py"), *(ROOT / "interop").rglob("*.py")])
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def room(name):
    """A dotted name's package and room: jopt.around.clip is of jopt.around."""
    return ".".join(name.split(".")[:2])


def imported(path):
    """The dotted names that a module imports when it is imported itself."""
    tree = ast.parse(path.read_text())
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]
    typed = [x for x in ast.walk(tree) if isinstance(x, ast.If) and ast.unparse(x.test) == "TYPE_CHECKING"]
    later = {id(node) for block in (*functions, *typed) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in later:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_room(path):
    first = path.relative_to(ROOT).with_suffix("").parts
    return f"{first[0]}.{first[1]}"


@pytest.mark.parametrize("path", modules())
def test_imports_point_one_way(path):
    here = own_room(path)
    for name in imported(path):
        package = name.split(".")[0]
        if here.startswith("jopt."):
            assert package not in ("torch", "interop"), f"{here} imports {name}"
        if package == here.split(".")[0] and "." in name:
            found = room(name)
            if found not in LEVELS:  # a public name of the package
                assert here in ("jopt.__init__",) or package != "jopt", f"{here} imports {name}"
                continue
            assert LEVELS[found] <= LEVELS[here], f"{here} imports {name}"


@pytest.mark.parametrize("path", [p for p in modules() if "interop/" in p.id and "interop/memory" not in p.id])
def test_a_devices_own_stays_in_its_room(path):
    """Neither DLPack, nor an address, nor the name of a device."""
    code = ast.parse(path.read_text())
    for node in ast.walk(code):
        if isinstance(node, ast.Attribute):
            assert not re.search("dlpack|data_ptr|unsafe_buffer_pointer", node.attr), ast.unparse(node)
        if isinstance(node, ast.Constant):
            assert node.value not in ("cpu", "cuda", "gpu"), f"line {node.lineno}"


@pytest.mark.parametrize("path", [p for p in modules() if "interop/dropin" in p.id])
def test_a_file_of_the_drop_in_is_short(path):
    assert len(path.read_text().splitlines()) <= 400
