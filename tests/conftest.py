"""Shared fixtures: golden data, and a fixed number of threads so that figures do not move with the machine."""

import importlib.util
import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_weights():
    """The module that makes golden weights and inputs from names and shapes."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "golden_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden_variants() -> dict[str, dict]:
    """Constructor arguments of the golden variants."""
    return json.loads((GOLDEN / "variants.json").read_text())
