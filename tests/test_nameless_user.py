"""A user without an entry in passwd, as ``docker run --user 12345`` and OpenShift have it."""

import os
import pwd
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from fit_runs import flags

NOBODY = 54_321
NAMES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
BECOME = ["unshare", f"--map-user={NOBODY}", f"--map-group={NOBODY}"]  # and own what this user owns


@pytest.fixture
def nameless(tmp_path):
    """Runs Python as that user."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*BECOME, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this system lets nobody become another user")
    with pytest.raises(KeyError):
        pwd.getpwuid(NOBODY)

    def run(*arguments):
        environment = {name: value for name, value in os.environ.items() if name not in NAMES}
        environment |= {"TMPDIR": str(tmp_path), "XDG_CACHE_HOME": ""}
        return subprocess.run(
            [*BECOME, sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    return run


def test_a_user_without_a_name_trains_and_evaluates(nameless, shards, tmp_path):
    random = np.random.default_rng(0)
    for folder in ("real", "made"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            soundfile.write(tmp_path / folder / f"{number}.wav", 0.1 * random.standard_normal(16_000), 16_000)
    fit = [*flags(shards, "run", steps=2, every=2), "--trainer.callbacks=null"]
    evaluate = ["evaluate", "--real=real", "--generated=made", "--judges=[tiny]", "--out=report.json"]
    code = f"from vab.cli import main; main({fit}); main({evaluate})"
    done = nameless("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "run" / "version_0" / "config.yaml").is_file()
    assert (tmp_path / "report.json").is_file()


@pytest.mark.slow
def test_doctor_finds_nothing_broken_for_a_user_without_a_name(nameless):
    done = nameless("-m", "vab.cli", "doctor")
    assert "force-reinstall" not in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_user_with_a_name_keeps_his_environment():
    code = "import os; before = dict(os.environ); import vab; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", code], check=True)
