"""Two machines are one: two of two ranks each, with a network of their own between them."""

import subprocess

import pytest
import torch

from fit_runs import PYTHON, flags, last, said, start, status, torchrun
from ranks import free_port

STEPS = 20


@pytest.fixture
def machines():
    """Words to run a command on either of two network namespaces, and the first one's address.

    Only root can make them; without, both are this machine.
    """
    names = ("vab_node0", "vab_node1")
    links = [f"ip netns add {name}" for name in names]
    links.append("ip link add vab0 netns vab_node0 type veth peer name vab1 netns vab_node1")
    for number, name in enumerate(names):
        links += [
            f"ip -n {name} addr add 10.77.0.{number + 1}/24 dev vab{number}",
            f"ip -n {name} link set vab{number} up",
            f"ip -n {name} link set lo up",
        ]
    try:
        made = all(subprocess.run(link.split(), capture_output=True, check=False).returncode == 0 for link in links)
    except FileNotFoundError:
        made = False
    if made:
        yield [["ip", "netns", "exec", name] for name in names], "10.77.0.1"
    else:
        yield [[], []], "127.0.0.1"
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def score(checkpoint):
    """The best validation loss that a run's `Checkpoints` have seen."""
    (score,) = {
        float(state["best_model_score"]) for name, state in checkpoint["callbacks"].items() if "Checkpoints" in name
    }
    return score


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_machines_of_two_ranks_train_what_one_process_trains(strategy, shards, machines, tmp_path):
    settings = {"dropout": 0, "steps": STEPS, "every": STEPS}
    command = [*PYTHON, "vab.cli", *flags(shards, "one", batch_size=8, **settings)]
    assert status(start(tmp_path, "one", command)) == 0, said(tmp_path, "one")
    prefixes, host = machines
    port, ranks = free_port(), []
    for node, prefix in enumerate(prefixes):
        more = ["--trainer.devices=2", "--trainer.num_nodes=2", f"--trainer.strategy={strategy}"]
        started = [*prefix, *torchrun(nodes=2, node=node, host=host, port=port)]
        command = [*started, *flags(shards, "four", batch_size=2, **settings), *more]
        interface = {"GLOO_SOCKET_IFNAME": f"vab{node}"} if prefix else {}
        ranks.append(start(tmp_path, f"node{node}", command, **interface))
    for node, process in enumerate(ranks):
        assert status(process) == 0, said(tmp_path, f"node{node}")
    one, four = last(tmp_path, "one"), last(tmp_path, "four")
    assert one["global_step"] == four["global_step"] == STEPS
    for name in ("state_dict", "live_state_dict"):
        assert one[name].keys() == four[name].keys()
        for key, value in one[name].items():
            torch.testing.assert_close(four[name][key], value, rtol=0, atol=1e-5, msg=f"{name} {key}")
    assert score(four) == pytest.approx(score(one), abs=1e-5)
