"""How many cores a process may use."""

import os
import subprocess
import sys

from vab.cores import usable_cores

WITHOUT = """
import os
del os.sched_getaffinity
from vab.cores import usable_cores
from vab.commands.evaluate import _workers
assert usable_cores() == os.cpu_count()
assert _workers(None, 10_000) in (0, os.cpu_count() // 2)
from vab.commands.extract import extract
extract(*__import__("sys").argv[1:], segment_seconds=0.64, video_fps=12.5, min_seconds=0.2, device="cpu")
"""


def test_systems_that_do_not_tell_whose_cores_are_whose_extract_too(tmp_path):
    from small_media import video

    (tmp_path / "media").mkdir()
    video(tmp_path / "media" / "x.mp4", 0.64)
    (tmp_path / "run.py").write_text(
        "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in WITHOUT.strip().splitlines())
    )
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "media"), str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=100)
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert 1 <= usable_cores() <= os.cpu_count()
