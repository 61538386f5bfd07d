"""nbval over several processes: 02 to 07 and 10 read one another's files, so they stay in one process, in order."""

from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling


class Workbook(LoadScopeScheduling):
    """A notebook, or the series of those that need one another, is never split."""

    def _split_scope(self, nodeid: str) -> str:
        name = Path(nodeid.split("::")[0]).stem
        return "series" if "02" <= name[:2] <= "07" or name[:2] == "10" else name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Workbook:
    """For ``pytest -n``."""
    return Workbook(config, log)
