"""Every command that a page prints can be typed: its flags, values, files and folders are there when it comes."""

import contextlib
import functools
import importlib.util
import inspect
import io
import itertools
import json
import re
import shlex
import string
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from command_line import code_of, is_whole, parsed, prose_of, spans_of
from vab.cli import COMMANDS, TRAINER_COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "configs/README.md", "data/README.md")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^(\w+) \??=", MAKEFILE, re.MULTILINE)) | set(re.findall(r"\$\((\w+)\)", MAKEFILE))
SOME_FILE = {  # where a page says which command takes --config, and not of what
    "folds": "configs/classify/esc50.yaml",
    "plan": "configs/pretrain.yaml",
    "extract": "configs/extract/paper.yaml",
    "evaluate": "configs/evaluate/vab.yaml",
    "retrieve": "configs/evaluate/cav_mae_retrieval.yaml",
}
OWN = re.compile(r"[A-Z][A-Z_]+\d*")  # a file or folder of the reader's


class Line(NamedTuple):
    """A command of a page's block."""

    page: str
    text: str
    """With the shell's variables filled in."""
    prose: str
    """Sentences of the page before it."""

    @property
    def words(self):
        return shlex.split(self.text, comments=True)


def lines_of(page):
    """The commands of a page's blocks."""
    before, variables = "", {}
    for part in re.split(r"(^```.*?^```$)", TEXT[page], flags=re.DOTALL | re.MULTILINE):
        if not part.startswith("```"):
            before += part
            continue
        for line in code_of(part + "\n").splitlines():
            if assigned := re.match(r"(\w+)=(\S+)", line):
                variables[assigned[1]] = assigned[2]
            elif line.strip() and not line.lstrip().startswith("#"):
                yield Line(page, string.Template(line).safe_substitute(variables), before)


LINES = [line for page in PAGES for line in lines_of(page)]
SPANS = [(page, span) for page in PAGES for span in spans_of(TEXT[page]) if re.match(r"(vab|make) \S", span)]
SPANS += [
    (path.name, span)
    for path in NOTEBOOKS
    for cell in json.loads(path.read_text())["cells"]
    if cell["cell_type"] == "markdown"
    for span in spans_of("".join(cell["source"]))
    if re.match(r"(vab|make) \S", span)
]


@functools.cache
def recorded():
    """What a run of the paper's recipe would write as its config.yaml."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "configs" / "pretrain.yaml"), "--print_config"])
    return printed.getvalue()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder like the repository's, in which the paper's recipe has been run."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VAB_DATA", raising=False)
    run = tmp_path / "runs" / "pretrain" / "version_0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(recorded())
    return tmp_path


def check_make(words, capsys):
    targets = [word for word in words[1:] if "=" not in word]
    given = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    assert targets
    assert set(targets) <= TARGETS
    assert set(given) <= VARIABLES
    if "BENCH" in given:
        assert (ROOT / "bench" / f"{given['BENCH']}.py").is_file()
    extras = [extra for extra in given.get("EXTRAS", "").split(",") if extra]
    assert all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) for extra in extras)
    assert not extras or given["EXTRAS"].startswith(",")
    if "CONFIG" in given:
        parsed(["fit", "--config", given["CONFIG"], *shlex.split(given.get("ARGS", ""))], capsys)


def check(words, capsys, whole=True):
    """Fail where a command could not be typed."""
    program, *rest = words
    for word in words:
        assert "..." not in word, "a reader has to guess it"
        for path in re.findall(r"(?:^|=)(configs/[\w./-]+)", word):
            assert (ROOT / path).exists(), path
    if program == "vab":
        settings = parsed(rest, capsys)
        assert not whole or is_whole(rest, settings)
    elif program == "make":
        check_make(words, capsys)
    elif program == "torchrun":
        settings = parsed(rest[rest.index("vab") + 1 :], capsys)
        flags = dict(itertools.pairwise(rest))
        assert [int(flags["--nnodes"]), int(flags["--nproc_per_node"])] == [
            int(settings["trainer"][name]) for name in ("num_nodes", "devices")
        ]
    elif program == "git":
        assert re.fullmatch(r"git clone [A-Z]+ (\w+) && cd \1", " ".join(words))
    else:
        assert program in ("source", "sbatch", "(cat")


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.page}: {line.text}")
def test_each_command_can_be_typed(line, place, capsys):
    check(line.words, capsys)


@pytest.mark.parametrize(("page", "span"), SPANS, ids=lambda value: value)
def test_each_command_in_a_sentence_is_one(page, span, place, capsys):
    words = shlex.split(span)
    if words[-1] == "--config":
        words.append(SOME_FILE[words[1]])
    if words[0] == "vab" and not any(word.startswith("-") for word in words):
        known = {**TRAINER_COMMANDS, **COMMANDS}[words[1]]
        inner = words[2].split("|") if len(words) > 2 and isinstance(known[1], dict) else []
        assert all(name in known[1] for name in inner)
        assert inner or len(words) == 2
        return
    check(words, capsys, whole=False)


@pytest.mark.parametrize("page", PAGES)
def test_the_environment_is_activated_before_its_commands(page):
    programs = [line.words[0] for line in LINES if line.page == page]
    lines = [line.text.split(" #")[0].strip() for line in LINES if line.page == page]
    first = min((programs.index(name) for name in ("vab", "torchrun", "sbatch") if name in programs), default=None)
    assert first is None or "source .venv/bin/activate" in lines[:first]


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.page}: {line.text}")
def test_words_in_capitals_are_introduced_before(line):
    values = [part for word in line.words for part in word.partition("=")[::2][-1 if "=" in word else 0].split("/")]
    for name in filter(OWN.fullmatch, values):
        assert f"`{name}`" in line.prose


@pytest.mark.parametrize("page", PAGES)
def test_a_shell_can_read_the_blocks(page):
    subprocess.run(["bash", "-n"], input=code_of(TEXT[page]), text=True, check=True)


def test_folders_that_are_read_were_written_before(place, capsys):
    """By a line of README before, or by data/README.md once README has pointed there."""
    written = {"runs/demo_pretrain"}  # by make pretrain
    elsewhere = {flags.get("--out") for line in LINES if line.page == "data/README.md" for flags in [flags_of(line)]}
    for line in (line for line in LINES if line.page == "README.md" and line.words[0] in ("vab", "torchrun")):
        words, flags = line.words, flags_of(line)
        known = written | (elsewhere if "(data/README.md)" in line.prose else set())
        reads = [word for before, word in itertools.pairwise(words) if before != "--out"]
        if words[0] == "torchrun" or words[1] in ("fit", "folds"):
            settings = parsed(words[words.index("fit" if "fit" in words else "folds") :], capsys)
            train = settings["data"]["train"]
            reads += [*([train] if isinstance(train, str) else train), settings["data"]["val"]]
            logger = settings["trainer"]["logger"]["init_args"]
            written.add(f"{logger['save_dir']}/{logger['name']}")
        for path in (path for path in reads if path.startswith(("data/", "runs/"))):
            assert any(path == one or path.startswith(f"{one}/") for one in known if one), (path, line.text)
        written |= {flags["--out"]} if "--out" in flags else set()


def flags_of(line):
    return dict(itertools.pairwise(line.words))


def test_the_first_training_on_videos_of_ones_own_fits_one_gpu(place, capsys):
    """Real tokens, one device, and the sizes of which the page states the memory."""
    lines = [line.words[1:] for line in LINES if line.page == "README.md" and "data/mine/train" in line.words]
    extraction, fit = (next(words for words in lines if words[0] == name) for name in ("extract", "fit"))
    made = parsed(extraction, capsys)
    assert (made["codec"], made["vision"]) == ("audiogen_16khz", "EVA02-L-14-336/merged2b_s6b_b61k")
    settings = parsed(fit, capsys)
    backbone = settings["model"]["init_args"]["backbone"]["init_args"]
    assert (settings["trainer"]["devices"], settings["trainer"]["num_nodes"]) == (1, 1)
    assert (backbone["dim"], settings["data"]["batch_size"], settings["data"]["global_batch_size"]) == (768, 32, 64)
    assert settings["data"]["allow_tiny"] is False


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_are_run_by_name_are_there(page):
    for span in spans_of(TEXT[page]):
        if found := re.match(r"python -m ([\w.]+)(.*)", span):
            spec = importlib.util.find_spec(found[1])
            name = f"{found[1]}.__main__" if spec.submodule_search_locations else found[1]
            source = inspect.getsource(importlib.import_module(name))
            assert all(f'"{flag}"' in source for flag in re.findall(r"--[\w-]+", found[2]))


def test_nothing_is_left_out():
    counts = {page: sum(line.page == page for line in LINES) for page in PAGES}
    assert all(counts[page] >= least for page, least in zip(PAGES, (45, 5, 8, 45), strict=True)), counts
    assert len(SPANS) > 40
    shown = [span for page in PAGES for span in spans_of(TEXT[page]) if span.startswith("vab ")]
    assert len(shown) == sum(prose_of(TEXT[page]).count("`vab ") for page in PAGES)
    assert not any(re.search(r'^\s*"[!%]', path.read_text(), re.MULTILINE) for path in NOTEBOOKS)  # no shell lines
