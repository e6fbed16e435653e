"""What is public is what tests/data/public.json says, and a change of it is in the diff that makes it."""

import json

import pytest

from tools import public


@pytest.mark.parametrize("module", public.MODULES)
def test_public_names_and_arguments(module):
    if module.startswith("interop"):
        pytest.importorskip("torch", reason="interop needs it")
    committed = json.loads(public.FILE.read_text())[module]
    assert public.names(module) == committed, (
        "python -m tools.public writes the file anew; docs/releases.md says which version may change it"
    )
