"""Files of others: nothing in a checkpoint, an exported model, shards or settings runs or leads out of its folder."""

import contextlib
import io
import json
import pickle
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

import fit_runs
from small_media import save_model, video
from tone_shards import short_spec, write_shards
from vab.callbacks import Checkpoints
from vab.cli import import_plugins, main
from vab.commands.export import export
from vab.data.shards.format import MANIFEST
from vab.data.shards.verify import verify
from vab.frozen.codec import load_codec
from vab.frozen.judges import load_judge
from vab.spec import UserError
from vab.tasks import PretrainTask, load_task

WRITTEN = "has_run"
CODE = f"""
import pathlib
from torch.optim import SGD
from vab.backbone import Backbone as Plain
from vab.tasks import PretrainTask

pathlib.Path(__file__).with_name("{WRITTEN}").touch()

class Task(PretrainTask):
    "A task of the user's own."

class Backbone(Plain):
    "A network of the user's own."

class Optimizer(SGD):
    "An optimizer of the user's own."
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder / "last.ckpt", short_spec(), load_codec("tiny").codebooks())


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    return export(checkpoint, str(tmp_path_factory.mktemp("exported") / "model"))


@pytest.fixture(autouse=True)
def _no_plugins(monkeypatch):
    """What a test says of plugins ends with it."""
    monkeypatch.setenv("VAB_PLUGINS", "")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that can be imported, as one beside a downloaded model can with ``python -m vab.cli``."""
    name = f"strangers_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def has_run(tmp_path):
    return (tmp_path / WRITTEN).exists


def naming(module, place):
    """Changes hyper-parameters so that one of the classes is of that module."""

    def change(settings):
        if place == "task":
            settings["_class_path"] = f"{module}.Task"
        elif place == "backbone":
            settings["backbone"]["class_path"] = f"{module}.Backbone"
        else:
            settings["optimizer"] = {"class_path": f"{module}.Optimizer", "init_args": {"lr": 0.1}}

    return change


def changed_checkpoint(checkpoint, out, change):
    content = torch.load(checkpoint, weights_only=True)
    change(content["hyper_parameters"])
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, out)
    return str(out)


def changed_export(exported, out, change):
    shutil.copytree(exported, out)
    config = json.loads((out / "config.json").read_text())
    settings = config["init_args"] | {"_class_path": config["class_path"]}
    change(settings)
    config["class_path"] = settings.pop("_class_path")
    (out / "config.json").write_text(json.dumps(config | {"init_args": settings}))
    return str(out)


def refused(capsys, *arguments):
    """The one line with which ``vab`` refuses."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1), error
    return error


@pytest.mark.parametrize("place", ["task", "backbone"])
@pytest.mark.parametrize("kind", ["checkpoint", "exported"])
def test_a_model_cannot_import_a_module(kind, place, checkpoint, exported, module, has_run, tmp_path, capsys):
    if kind == "checkpoint":
        model = changed_checkpoint(checkpoint, tmp_path / "m.ckpt", naming(module, place))
    else:
        model = changed_export(exported, tmp_path / "m", naming(module, place))
    line = refused(
        capsys, "generate", "--checkpoint", model, "--video", video(tmp_path / "v.mp4", 0.5), "--out", "x.wav"
    )
    assert f"--plugins {module}" in line
    assert not has_run()
    # Who trusts the code says so, and the same model is read.
    import_plugins(["generate", "--plugins", module])
    task = load_task(model)
    own = task if place == "task" else task.backbone
    assert has_run()
    assert type(own).__module__ == module


def test_a_module_of_the_standard_library_is_not_imported_either(checkpoint, tmp_path, capsys):
    sys.modules.pop("this", None)
    model = changed_checkpoint(
        checkpoint, tmp_path / "m.ckpt", lambda settings: settings.update(_class_path="this.Task")
    )
    assert "--plugins this" in refused(capsys, "export", "--checkpoint", model, "--out", tmp_path / "out")
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "path", ["os.system", "vab.cli.main", "torch.nn.Linear", "torch.optim.AdamW", "vab.tasks.Nothing"]
)
def test_what_is_loaded_and_no_task_is_not_called(path, checkpoint, tmp_path, capsys):
    model = changed_checkpoint(checkpoint, tmp_path / "m.ckpt", lambda settings: settings.update(_class_path=path))
    assert f"{path} is no BaseTask" in refused(capsys, "export", "--checkpoint", model, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", [None, 7, "Task", "", ["os", "system"]])
def test_a_class_that_is_no_name_is_refused(name, checkpoint, tmp_path, capsys):
    model = changed_checkpoint(checkpoint, tmp_path / "m.ckpt", lambda settings: settings.update(_class_path=name))
    refused(capsys, "export", "--checkpoint", model, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("flag", "place"), [("--ckpt_path", "task"), ("--ckpt_path", "optimizer"), ("--model.init_from", "backbone")]
)
def test_a_run_imports_nothing_for_the_checkpoint_it_begins_with(
    flag, place, checkpoint, module, has_run, shards, tmp_path, monkeypatch, capsys
):
    model = changed_checkpoint(checkpoint, tmp_path / "elsewhere" / "m.ckpt", naming(module, place))
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):  # refused
        main([*fit_runs.flags(shards, "run", steps=1, every=1), f"{flag}={model}"])
    assert "Traceback" not in capsys.readouterr().err
    assert not has_run()


def test_plugins_are_imported_for_every_command_and_every_process(module, has_run, capsys):
    main([f"--plugins={module}", "--version"])
    assert has_run()
    assert capsys.readouterr().out.startswith("vab ")
    assert "--plugins" in (main(["--help"]) or capsys.readouterr().out)
    assert sys.modules["os"].environ["VAB_PLUGINS"] == module
    assert import_plugins(["compare", "a", "--plugins", module, "b"]) == ["compare", "a", "b"]


@pytest.mark.parametrize(
    "arguments", [["--plugins", "no_such_module"], ["--plugins"], ["--plugins", "--out"], ["--plugins="]]
)
def test_plugins_that_are_not_there_are_refused(arguments, capsys):
    assert "--plugins" in refused(capsys, "doctor", *arguments)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("command", ["generate", "export", "validate", "fit"])
def test_a_pickle_in_a_checkpoint_is_not_run(command, checkpoint, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"extra": Payload(tmp_path / WRITTEN)}, tmp_path / "m.ckpt")
    recipe = [*fit_runs.flags(shards, "run")[1:], "--ckpt_path=m.ckpt"]
    line = refused(
        capsys,
        command,
        *{
            "generate": ["--checkpoint", "m.ckpt", "--video", video(tmp_path / "v.mp4", 0.5), "--out", "x.wav"],
            "export": ["--checkpoint", "m.ckpt", "--out", "out"],
        }.get(command, recipe),
    )
    assert "m.ckpt" in line
    assert not (tmp_path / WRITTEN).exists()


@pytest.mark.parametrize("place", ["codec", "vision"])
def test_names_of_networks_in_a_checkpoint_are_of_a_closed_list(place, checkpoint, module, has_run, tmp_path, capsys):
    def change(settings):
        settings["backbone"]["init_args"]["spec"][place] = f"{module}.Codec"

    model = changed_checkpoint(checkpoint, tmp_path / "m.ckpt", change)
    line = refused(
        capsys, "generate", "--checkpoint", model, "--video", video(tmp_path / "v.mp4", 0.5), "--out", "x.wav"
    )
    assert module in line
    with pytest.raises(UserError, match="unknown judge"):
        load_judge(f"{module}.Judge")
    assert not has_run()


def test_what_a_resumed_checkpoint_calls_its_files_is_not_removed(tmp_path, monkeypatch):
    """Lightning removes the paths that the state of a callback names, folders whole, once a better one is saved."""
    from types import SimpleNamespace

    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "run" / "sub").mkdir(parents=True)
    for name in ("run/own.ckpt", "run/sub/own.ckpt", "other.ckpt"):
        (tmp_path / name).touch()
    saver = Checkpoints(dirpath=str(tmp_path / "run"))

    def removes(path):
        return saver._should_remove_checkpoint(SimpleNamespace(ckpt_path=None), str(path), "new.ckpt")

    for path in (
        "run/../precious",
        tmp_path / "run" / "..",
        tmp_path / "precious",
        "s3://bucket/all",
        "other.ckpt",
        "run",
    ):
        assert not removes(path), path
    assert removes("run/own.ckpt")
    assert removes(tmp_path / "run" / "sub" / "own.ckpt")
    saver.dirpath = "s3://bucket/run"
    assert not removes("s3://bucket/all")
    assert not removes("s3://bucket/run/../all")
    assert removes("s3://bucket/run/own.ckpt")


@pytest.mark.parametrize("name", ["../outside.tar", "/outside.tar", "sub/x.tar", "..", ".", "", "a\0b", 7, None])
@pytest.mark.parametrize("list_", ["shards", "files"])
def test_a_manifest_lists_files_of_its_own_folder_only(list_, name, tmp_path, capsys):
    folder = write_shards(tmp_path / "shards", short_spec(), 4)
    manifest = json.loads((folder / MANIFEST).read_text())
    shutil.copy(folder / manifest["shards"][0]["name"], tmp_path / "outside.tar")
    named = str(tmp_path / "outside.tar") if name == "/outside.tar" else name
    if list_ == "shards":
        manifest["shards"][0]["name"] = named
    elif isinstance(named, str):
        manifest["files"][named] = {"bytes": (tmp_path / "outside.tar").stat().st_size, "sha256": "0" * 64}
    else:
        manifest["files"] = [named]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for line in (refused(capsys, "shards", "info", folder), *verify(folder)):
        assert "lists a file" in line or "does not list files" in line


def test_an_index_or_array_that_holds_pickles_is_refused(tmp_path, capsys):
    folder = write_shards(tmp_path / "shards", short_spec(), 4)
    content = np.array([Payload(tmp_path / WRITTEN)], dtype=object)
    np.save(folder / "index.npy", content, allow_pickle=True)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["index.npy"]["bytes"] = (folder / "index.npy").stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "index" in refused(capsys, "shards", "info", folder)
    np.savez(tmp_path / "e.npz", embeddings=content)
    assert "e.npz" in refused(capsys, "retrieve", "--audio", tmp_path / "e.npz", "--video", tmp_path / "e.npz")
    (tmp_path / "codes").mkdir()
    np.save(tmp_path / "codes" / "a.npy", content, allow_pickle=True)
    (tmp_path / "codes" / "b.npy").write_bytes(pickle.dumps(Payload(tmp_path / WRITTEN)))
    assert not (tmp_path / WRITTEN).exists()


@pytest.mark.parametrize("name", ["../x.codes.npy", "/x.codes.npy", "x.exe", "x.codes.npy/.."])
def test_members_of_a_tar_have_plain_names(name, tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    folder = write_shards(tmp_path / "shards", short_spec(), 2)
    shutil.copy(folder / "codebooks.safetensors", tmp_path)
    line = refused(capsys, "shards", "index", tmp_path, "--spec", folder / MANIFEST)
    assert "a.tar" in line


def test_a_link_in_a_tar_is_not_followed(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("x.codes.npy")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    folder = write_shards(tmp_path / "shards", short_spec(), 2)
    shutil.copy(folder / "codebooks.safetensors", tmp_path)
    assert "plain files" in refused(capsys, "shards", "index", tmp_path, "--spec", folder / MANIFEST)


def test_hdf5_links_to_other_files_are_not_followed(tmp_path, capsys):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.zeros((4, 32), np.uint16)
    (tmp_path / "codes").mkdir()
    with h5py.File(tmp_path / "codes" / "a.h5", "w") as file:
        file["a"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/secret")
    from vab.data.shards.arrays import ArrayError, Arrays

    with pytest.raises(ArrayError, match="0 arrays"):
        Arrays(tmp_path / "codes", "codes").read("a")


def test_settings_in_yaml_call_nothing_and_read_no_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SECRET", "halton")
    sampler = tmp_path / "s.yaml"
    arguments = ["generate", "--checkpoint", "none.ckpt", "--video", video(tmp_path / "v.mp4", 0.5), "--out", "x.wav"]
    sampler.write_text("order: ${oc.env:SECRET}\n")
    assert "order" in refused(capsys, *arguments, "--sampler", sampler)
    call = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{tmp_path / WRITTEN}']]\n"
    for text in (f"decode_steps: {call}", f"grid:\n- {call}"):
        sampler.write_text(text)
        with pytest.raises(yaml.constructor.ConstructorError):
            yaml.safe_load(text)
        assert "s.yaml" in refused(capsys, *arguments, "--sampler", sampler)
        refused(capsys, "sweep", "--checkpoint", "none", "--data", "none", "--grid", sampler, "--out", tmp_path / "o")
    assert not (tmp_path / WRITTEN).exists()


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile '{}'\n", "#EXTM3U\n#EXTINF:1.0,\nfile://{}\n#EXT-X-ENDLIST\n"]
)
def test_a_video_that_is_a_list_of_others_is_unreadable(text, checkpoint, tmp_path, capsys):
    other = video(tmp_path / "other.mp4", 0.5)
    given = tmp_path / "given" / "v.mp4"
    given.parent.mkdir()
    given.write_text(text.format(other))
    line = refused(capsys, "generate", "--checkpoint", checkpoint, "--video", given, "--out", tmp_path / "x.wav")
    assert "v.mp4" in line
    assert not (tmp_path / "x.wav").exists()


def test_a_network_that_is_a_program_is_refused(tmp_path):
    from vab.frozen.weight_files.reading import read_weights

    scripted = torch.jit.script(torch.nn.Linear(2, 2))
    scripted.save(tmp_path / "n.pt")
    assert zipfile.is_zipfile(tmp_path / "n.pt")
    with pytest.raises(UserError, match="TorchScript"):
        read_weights(tmp_path / "n.pt")


def test_a_task_of_ones_own_that_is_imported_in_python_loads_without_a_flag(checkpoint, module, tmp_path):
    import importlib

    own = importlib.import_module(module)
    model = changed_checkpoint(checkpoint, tmp_path / "m.ckpt", naming(module, "task"))
    assert type(load_task(model)) is own.Task
    assert issubclass(own.Task, PretrainTask)
