"""Writes each examples/colab_*.py, whose cells begin at "# %%", as the notebook of its name, without outputs.

python -m examples.notebooks
"""

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def notebook(source: str, accelerator: str) -> dict[str, Any]:
    """The notebook, in nbformat's version 4.5."""
    cells = []
    for i, (kind, text) in enumerate(re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n)*)", source, re.MULTILINE)):
        text = text.strip("\n")
        markdown = kind.strip() == "[markdown]"
        if markdown:
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        cell: dict[str, Any] = {"cell_type": "markdown" if markdown else "code", "id": f"cell-{i}", "metadata": {}}
        cells.append(cell | {"source": text} | ({} if markdown else {"execution_count": None, "outputs": []}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"accelerator": accelerator, "kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    for path in HERE.glob("colab_*.py"):
        accelerator = path.stem.removeprefix("colab_").upper()
        text = json.dumps(notebook(path.read_text(), accelerator), indent=1, ensure_ascii=False)
        path.with_suffix(".ipynb").write_text(text + "\n")


if __name__ == "__main__":
    main()
