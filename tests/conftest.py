"""One thread and fixed examples, so that a test that passed passes again; the tiny golden model."""

from __future__ import annotations

import copy
import sys

import hypothesis
import pytest
import torch

from packcache.cli import main
from packcache.lumos.model import Lumos
from packcache.testing import golden
from tests.tools import GOLDEN

hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-identity is promised for equal threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> Lumos:
    """The random tiny model of the golden data, float32."""
    return golden.tiny_model(GOLDEN)


@pytest.fixture(scope="session")
def tiny64(tiny: Lumos) -> Lumos:
    """The same model in float64."""
    return copy.deepcopy(tiny).double()


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the program in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["packcache", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call
