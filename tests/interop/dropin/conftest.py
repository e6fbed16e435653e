"""Each test runs twice: by torch's operations, which step what is as small as most tests' tensors, and by programs."""

import pytest


@pytest.fixture(params=["operations", "programs"], autouse=True)
def stepped_by(request, monkeypatch):
    eager = pytest.importorskip("interop.dropin.eager", reason="the drop-in is for torch")
    if request.param == "programs":
        monkeypatch.setattr(eager, "ROOM", -1)
        monkeypatch.setattr(eager, "RENT", 0)
    return request.param
