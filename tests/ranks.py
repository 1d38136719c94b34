"""Ranks as processes that are forked: what is imported need not be imported again, which is most of a short run."""

import multiprocessing
import os
import socket
import sys
import time
import traceback

import torch

# Starts autograd's threads before a test creates fake CUDA tensors. After that, autograd would start a thread for the
# fake device, and forked processes could not compute gradients.
torch.zeros(1, requires_grad=True).sum().backward()

LIMIT = 250
"""Seconds after which ranks are ended."""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_ranks(count, function, *arguments, said=None):
    """Call a function once on each of ``count`` ranks, each a process that takes itself for one that torchrun started.

    Args:
        count: Of the ranks. A single one is a process of its own, too, without the words of a group.
        function: What each does; what it gives back is lost.
        *arguments: For it.
        said: File for what the ranks write to standard error; this process's own where not given.

    Raises:
        AssertionError: If a rank ended otherwise than well; the others are ended.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, count, port, said, function, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    limit = time.monotonic() + LIMIT
    try:
        while any(process.exitcode is None for process in processes):
            assert all(process.exitcode in (None, 0) for process in processes), _words(processes, said)
            assert time.monotonic() < limit, f"ranks were still at work after {LIMIT} s"
            processes[0].join(0.02)
            time.sleep(0.02)
        assert all(process.exitcode == 0 for process in processes), _words(processes, said)
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
            process.join()


def _rank(rank, count, port, said, function, arguments):
    if said is not None:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    if count > 1:
        os.environ |= {"MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # nothing of the process that was copied is to be wound up twice


def _words(processes, said):
    codes = [process.exitcode for process in processes]
    return f"exit codes {codes}" + (f": {open(said).read()[-4000:]}" if said is not None else "")
