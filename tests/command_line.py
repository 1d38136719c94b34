"""``vab`` as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path


def start(*arguments):
    """Start ``vab``, in a process group of its own; for other ranks Fabric runs the same command line."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("vab")), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
