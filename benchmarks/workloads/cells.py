"""Finished runs, a JSON file each: what a killed command leaves, the next one takes up."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any


class Cells:
    """Runs by their configurations; one whose configuration has changed is run again."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find(self, configuration: dict[str, Any]) -> dict[str, Any] | None:
        try:
            cell = json.loads(self.path(configuration).read_text())
            same = cell["configuration"] == json.loads(json.dumps(configuration))  # tuples are lists in the file
            return cell["result"] if same else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # none yet, or no whole one

    def keep(self, configuration: dict[str, Any], result: dict[str, Any]) -> None:
        path = self.path(configuration)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"configuration": configuration, "result": result}) + "\n")
        os.replace(partial, path)

    def path(self, configuration: dict[str, Any]) -> Path:
        keys = ("workload", "recipe", "lr", "way", "dtype", "seed")
        return self.folder / (re.sub(r"[^\w.]+", "-", " ".join(str(configuration[k]) for k in keys)) + ".json")
