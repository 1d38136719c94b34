"""Processes of one command: a rank that says nothing any more is noticed, one that does is left alone."""

from datetime import timedelta
from time import monotonic

import pytest
from torch.distributed import TCPStore

from vab import ranks
from vab.ranks import Ranks, _Heartbeats
from vab.spec import UserError


@pytest.fixture
def heard():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    heartbeats = _Heartbeats(store, 3)

    def pass_seconds(seconds):
        heartbeats.asked -= seconds
        heartbeats.since = {rank: since - seconds for rank, since in heartbeats.since.items()}

    return store, heartbeats, pass_seconds


def test_ranks_that_say_something_are_there(heard):
    store, heartbeats, pass_seconds = heard
    for _ in range(5):
        pass_seconds(ranks._SILENT_SECONDS - 1)
        for rank in (1, 2):
            store.add(f"beat{rank}", 1)
        assert heartbeats.silent() == []
    assert all(monotonic() - since < 60 for since in heartbeats.since.values())


def test_a_rank_that_says_nothing_for_long_has_ended(heard):
    store, heartbeats, pass_seconds = heard
    pass_seconds(ranks._SILENT_SECONDS + 1)
    store.add("beat1", 1)
    assert heartbeats.silent() == [2]
    with pytest.raises(UserError, match="rank 2 has said nothing for 120 s: another process of this command has ended"):
        Ranks(0, 3, "cpu", None, [heartbeats]).require_others()


def test_machines_that_nothing_names_are_not_waited_for(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"--num_nodes 2: nothing here says where the other machines are; .* torchrun"):
        ranks.start_ranks("cpu", 1, 2)
