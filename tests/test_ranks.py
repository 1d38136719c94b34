"""Processes of one command."""

import pytest

from vab import ranks
from vab.spec import UserError


def test_machines_that_nothing_names_are_not_waited_for(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"--num_nodes 2: MASTER_ADDR and MASTER_PORT are not set, .* torchrun"):
        ranks.start_ranks("cpu", 1, 2)
