"""Loads world.py, unless this process only hands tests to others (``pytest -n``): importing takes some 15 s."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """In every process that runs tests."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("world")
