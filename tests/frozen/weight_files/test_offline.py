"""HF_HUB_OFFLINE=1 and nothing on the machine: no loader opens a socket or looks a name up; each says what to do."""

import json
import os
import subprocess
import sys

import pytest

from vab.frozen.weight_files.catalogue import CODECS, JUDGES, VISION

LOADERS = [
    *(("codec", name) for name in CODECS if not name.startswith("tiny")),
    *(("vision", name) for name in (*VISION[1:], "hf-hub:timm/ViT-B-16-SigLIP2")),
    *(("judge", name) for name in JUDGES if name != "tiny"),
]
# In a process of its own, as the hub's client reads the variable when it is imported.
SCRIPT = """
import json, socket, sys

touched = []

def forbidden(*words, **more):
    touched.append(repr(words[-1] if words else more))
    raise RuntimeError("a socket was opened")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, forbidden)
socket.getaddrinfo = socket.create_connection = socket.gethostbyname = forbidden

from vab.frozen.codec import load_codec
from vab.frozen.judges import load_judge
from vab.frozen.vision import load_vision
from vab.spec import UserError

load = {"codec": load_codec, "vision": load_vision, "judge": load_judge}
said = {}
for kind, name in json.loads(sys.argv[1]):
    try:
        load[kind](name)
        said[name] = "loaded"
    except UserError as error:
        said[name] = str(error)
print(json.dumps({"said": said, "touched": touched}))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    home = str(tmp_path_factory.mktemp("home"))
    names = ("HOME", "HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME", "VAB_WEIGHTS")
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_CACHE", "HF_ENDPOINT")}
    environment |= dict.fromkeys(names, home) | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(LOADERS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_is_asked_of_the_network(answers):
    assert answers["touched"] == []
    assert set(answers["said"]) == {name for _, name in LOADERS}


@pytest.mark.parametrize(("kind", "name"), LOADERS)
def test_each_says_what_to_put_where(answers, kind, name):
    said = answers["said"][name]
    if " package (" in said:  # tests/test_extras.py
        pytest.skip(said)
    assert "HF_HUB_OFFLINE forbids to fetch" in said
    assert "in a folder named by VAB_WEIGHTS" in said or "into a folder named by VAB_WEIGHTS" in said
    assert "\n" not in said
    if not name.startswith("hf-hub:"):
        file = name.partition(":")[0].removesuffix("_relu")
        assert f"vab weights fetch --names {file} --out FOLDER" in said
