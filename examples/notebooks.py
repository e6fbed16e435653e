"""Writes the notebooks from their sources, whose cells begin at "# %%".

    python -m examples.notebooks            # all
    python -m examples.notebooks NAME ...   # some, as colab_tpu or port_a_script

examples/colab_*.py become notebooks beside them, without outputs. examples/tutorials/*.py become those of
docs/tutorials, which are executed, so that a page shows what came out: up to a minute each. move_a_lightning_run
installs lightning.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLAB = {path.stem: path for path in sorted(HERE.glob("colab_*.py"))}
TUTORIALS = {path.stem: path for path in sorted(HERE.glob("tutorials/*.py"))}
WRITTEN = HERE.parent / "docs" / "tutorials"


def notebook(path: Path) -> dict[str, Any]:
    """The notebook of a source, in nbformat's version 4.5, without outputs."""
    cells = []
    for i, (kind, text) in enumerate(re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n)*)", path.read_text(), re.MULTILINE)):
        kind = kind.strip()
        if kind == "[install]":
            text = (HERE / "install.py").read_text().partition("\n\n")[2]
        text = text.strip("\n")
        if kind == "[markdown]":
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        cell: dict[str, Any] = {"cell_type": "markdown" if kind == "[markdown]" else "code", "id": f"cell-{i}"}
        cell |= {"metadata": {}, "source": text}
        cells.append(cell | ({} if kind == "[markdown]" else {"execution_count": None, "outputs": []}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata: dict[str, Any] = {"accelerator": path.stem.removeprefix("colab_").upper()} if path.stem in COLAB else {}
    metadata |= {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def executed(book: dict[str, Any]) -> dict[str, Any]:
    """With outputs. An assertion of a cell that fails raises nbclient's CellExecutionError."""
    import nbclient
    import nbformat

    made: Any = nbformat.from_dict(book)
    nbformat.validate(made)
    nbclient.NotebookClient(made, timeout=600, record_timing=False).execute()
    done = json.loads(nbformat.writes(made))
    for cell in done["cells"]:
        cell["source"] = "".join(cell["source"])
    return done | {"metadata": book["metadata"]}  # what the kernel says of itself is of this machine


def main(names: list[str]) -> None:
    for name in names or (*COLAB, *TUTORIALS):
        if name in COLAB:
            book, path = notebook(COLAB[name]), COLAB[name].with_suffix(".ipynb")
        else:
            book, path = executed(notebook(TUTORIALS[name])), WRITTEN / f"{name}.ipynb"
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n")
        print(path.relative_to(HERE.parent))


if __name__ == "__main__":
    main(sys.argv[1:])
