"""Every shipped YAML against the code."""

import inspect
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback

from command_line import parsed
from tasks_help import quiet_trainer, small_backbone
from vab.cli import main
from vab.commands.extract import extract
from vab.data.reading.datamodule import ShardDataModule
from vab.data.reading.step_size import batches_of_step
from vab.frozen.vision.clip_files import parse
from vab.frozen.weight_files.catalogue import CODECS
from vab.spec import UserError
from vab.tasks import PretrainTask
from vab.tasks.optim import steps_of_warmup
from vab.training.recipes import load

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [
    path for path in sorted(CONFIGS.rglob("*.yaml")) if path.parent.name in ("configs", "demo", "dac", "classify")
]
STAGES = [path for path in sorted((CONFIGS / "trainer").glob("*.yaml")) if path.stem.endswith(("_coarse", "_fine"))]
FOLDERS = ["trainer", "data", "task", "backbone"]


def read(path):
    """A YAML file as the parser reads it, merged over its base."""
    return load(path.read_text(), path.parent)


def parts_of(folder):
    """The files of a folder that a recipe can name; `base.yaml` is only what the others begin with."""
    return [path for path in sorted((CONFIGS / folder).glob("*.yaml")) if path.stem != "base"]


def keys(value, prefix=""):
    """Every dotted key of a YAML, but not those inside lists, of the strategy, named or described, or of data sets."""
    if not isinstance(value, dict) or prefix in ("strategy.", "train."):
        return set()
    return {prefix + key for key in value} | {
        name for key, inner in value.items() for name in keys(inner, f"{prefix}{key}.")
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_recipe_holds_paths_only(path):
    recipe = yaml.safe_load(path.read_text())
    assert set(recipe) == {"seed_everything", "trainer", "data", "model"}
    for part in ("trainer", "data", "model"):
        assert (path.parent / recipe[part]).is_file()


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_parts_of_a_folder_and_class_set_the_same_keys(folder):
    found = {}
    for path in parts_of(folder):
        part = read(path)
        found.setdefault(part.get("class_path"), {})[path.name] = keys(part)
    assert sum(map(len, found.values())) > 1
    for files in found.values():
        assert len(set(map(frozenset, files.values()))) == 1, files


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_part_says_nothing_that_its_base_says(folder):
    """So that a change of the base reaches all that are built on it."""
    for path in parts_of(folder):
        change = yaml.safe_load(path.read_text())
        if "base" in change:
            base = flat(read(path.parent / change.pop("base")))
            repeated = [key for key, value in flat(load(yaml.safe_dump(change))).items() if base.get(key) == value]
            assert repeated == [], path


def flat(value, prefix=""):
    """Dotted key -> value, lists whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: one for key, inner in value.items() for name, one in flat(inner, f"{prefix}.{key}").items()}


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_trainer_of_a_stage_differs_in_the_name_of_its_runs_alone(path):
    base, _, stage = path.stem.rpartition("_")
    ours, theirs = read(path), read(CONFIGS / "trainer" / f"{base}.yaml")
    named, others = ours["logger"]["init_args"].pop("name"), theirs["logger"]["init_args"].pop("name")
    assert ours == theirs
    assert named == {"demo": "demo", "ddp": "dac"}[base] + f"_{stage}" != others


def test_each_recipe_has_a_folder_of_runs_of_its_own():
    names = {}
    for path in RECIPES:
        trainer = read(path.parent / yaml.safe_load(path.read_text())["trainer"])
        names.setdefault(trainer["logger"]["init_args"]["name"], []).append(str(path.relative_to(CONFIGS)))
    assert all(len(recipes) == 1 for recipes in names.values()), names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_recipe_parses_to_what_its_parts_say(path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    recipe = yaml.safe_load(path.read_text())
    data, task = read(path.parent / recipe["data"]), read(path.parent / recipe["model"])
    del task["init_args"]["backbone"]  # a path
    for said, got in ((data, printed["data"]), (task, printed["model"])):
        assert not keys(said) - keys(got)
        assert merged(got, said) == got


def merged(settings, changes):
    """Settings with changes, key by key."""
    return settings | {
        key: merged(settings[key], value) if isinstance(value, dict) else value for key, value in changes.items()
    }


def test_no_warm_up_is_too_long_for_a_fast_dev_run(shards):
    tasks = (read(path)["init_args"] for path in parts_of("task"))
    schedules, rates = {(task["warmup_steps"], task["schedule_steps"]) for task in tasks}, []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    assert any(end is None for _, end in schedules)
    for warmup, end in schedules:
        data = ShardDataModule(f"{shards}/train", f"{shards}/val", batch_size=4, num_workers=0)
        task = PretrainTask(small_backbone(data.spec), warmup_steps=warmup, schedule_steps=end)
        quiet_trainer(fast_dev_run=True, callbacks=[Rates()]).fit(task, data)
    assert len(rates) == len(schedules)
    assert min(rates) > 0


@pytest.mark.parametrize(("folder", "levels"), [("demo", 8), ("dac", 12)])
def test_two_stages_of_a_folder_divide_the_levels(folder, levels):
    def part(stage, name):
        recipe = yaml.safe_load((CONFIGS / folder / f"{stage}.yaml").read_text())
        return read(CONFIGS / folder / recipe[name])

    coarse, fine = part("coarse", "data"), part("fine", "data")
    assert coarse["levels"] == part("fine", "model")["init_args"]["conditioning_levels"] == 4 < levels
    assert part("coarse", "model")["init_args"]["conditioning_levels"] == 0
    assert coarse | {"levels": None} == fine


def plan_of(path):
    """A recipe's trainer, data and task; and its comment's records, records of a step, steps, epochs and warm-up."""
    recipe = yaml.safe_load(path.read_text())
    parts = (read(path.parent / recipe[name]) for name in ("trainer", "data", "model"))
    said = re.search(
        r"^# Records ([\d,]+), a step ([\d,]+), steps ([\d,]+): ([\d.]+) epochs.*, warm-up ([\d,]+) steps\.",
        path.read_text(),
        re.MULTILINE,
    )
    assert said, path
    return *parts, [float(number.replace(",", "")) for number in said.groups()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_recipe_says_how_long_it_trains(path):
    trainer, data, task, (records, step, steps, epochs, warmup) = plan_of(path)
    assert step == (data["global_batch_size"] or data["batch_size"])
    assert steps == (trainer["max_steps"] if trainer["max_epochs"] == -1 else trainer["max_epochs"] * (records // step))
    assert epochs == round(steps * step / records, 1) < 100
    assert warmup == steps_of_warmup(task["init_args"]["warmup_steps"], int(steps))
    assert 0.002 < warmup / steps < 0.2


@pytest.mark.parametrize("card", ["", "gpu_40gb", "gpu_24gb"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_recipe_trains_the_same_steps_on_any_number_of_devices(path, card):
    """So its warm-up is the same share of the run; and no device gets more records at once than fit it."""
    trainer, data, *_ = plan_of(path)
    if path.parent.name == "demo":
        assert (trainer["devices"], data["global_batch_size"]) == (1, None)
        return
    most = (read(CONFIGS / "tweak" / f"{card}.yaml")["data"] if card else data)["batch_size"]
    for devices in (1, 2, 4, 8, 16) if trainer["devices"] == "auto" else (1,):
        batches = batches_of_step(data["global_batch_size"], devices, most)
        batch = data["global_batch_size"] / devices / batches
        assert batch == int(batch) <= most
        assert batch > most / 2 or batches == 1  # no step is cut into needlessly small batches


def test_no_part_interpolates_but_from_the_environment():
    for path in CONFIGS.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            assert "${" not in line.replace("${oc.env:", ""), f"{path}: {line}"


def test_the_repository_names_every_recipe():
    described = (CONFIGS / "README.md").read_text()
    for path in RECIPES:
        assert str(path.relative_to(CONFIGS)) in described


@pytest.mark.parametrize("path", sorted((CONFIGS / "extract").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_extracted_is_what_codecs_and_encoders_are_called(path):
    settings = yaml.safe_load(path.read_text())
    assert set(settings) == {"codec", "vision", "segment_seconds", "video_fps"}
    assert settings.keys() <= inspect.signature(extract).parameters.keys()
    assert settings["codec"] in CODECS
    if settings["vision"] != "tiny":
        open_clip = pytest.importorskip("open_clip")
        wanted = parse(settings["vision"])
        assert wanted.tag in open_clip.list_pretrained_tags_by_model(wanted.model)


@pytest.mark.parametrize("path", sorted((CONFIGS / "extract" / "tweak").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", ["paper", "dac"])
def test_a_change_of_an_extraction_is_merged_over_a_recipe(recipe, path, capsys):
    first, change = (
        yaml.safe_load((CONFIGS / "extract" / f"{recipe}.yaml").read_text()),
        yaml.safe_load(path.read_text()),
    )
    assert not {"codec", "vision"} & set(change)
    with pytest.raises(SystemExit) as stop:
        main(["extract", "--config", str(CONFIGS / "extract" / f"{recipe}.yaml"), "--config", str(path), "--media=m",
              "--out=o", "--num_workers=3", "--print_config"])  # fmt: skip
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    defaults = {name: one.default for name, one in inspect.signature(extract).parameters.items()}
    assert printed == defaults | {"media": "m", "out": "o", "num_workers": 3} | first | change
    assert change.items() - (defaults | first).items() == change.items()  # nothing is said twice


def test_weights_that_are_not_there_are_one_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("encodec")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VAB_WEIGHTS", str(tmp_path))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").touch()
    with pytest.raises(SystemExit) as stop:
        main(["extract", "--config", str(CONFIGS / "extract" / "paper.yaml"), f"--media={tmp_path}/in", "--out=o"])
    assert stop.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: codec audiogen_16khz needs audiogen_16khz/compression_state_dict.bin")
    assert len(complaint.splitlines()) == 1


def job_script(name):
    """Text and options of a job script; srun must give each task all of its cores."""
    path = CONFIGS / "slurm" / f"{name}.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"' in text
    return text, dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))


def test_the_job_script_of_extraction_is_sound_and_its_flags_are_known(capsys):
    text, options = job_script("extract")
    assert options["array"].startswith("1-")  # parts are counted from 1
    (command,) = re.findall(r"^srun .*$", text, re.MULTILINE)
    command = command.replace("$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT", "2/16").replace('"$@"', "")
    words = shlex.split(command)
    settings = parsed([*words[words.index("vab") + 1 :], "--media=x", "--out=y"], capsys)
    assert (settings["part"], settings["devices"]) == ("2/16", 1)


def test_the_job_script_of_pretraining_is_sound_and_its_flags_are_known(capsys):
    text, options = job_script("pretrain")
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "#SBATCH --requeue" in text
    assert re.fullmatch(r"USR1@\d+", options["signal"])  # to the tasks, not the script: no B: in front
    (command,) = re.findall(r"^srun .*?[^\\]$", text, re.MULTILINE | re.DOTALL)
    command = command.replace("$SLURM_NNODES", options["nodes"]).replace("\\\n", " ").replace('"$@"', "")
    words = shlex.split(command.replace("$SLURM_NTASKS_PER_NODE", options["ntasks-per-node"]))
    settings = parsed(words[words.index("vab") + 1 :], capsys)
    assert [int(settings["trainer"][name]) for name in ("num_nodes", "devices")] == [2, 8]


def test_a_recipe_takes_another_trainer(capsys):
    recipe, trainer = CONFIGS / "pretrain.yaml", CONFIGS / "trainer" / "fsdp.yaml"
    settings = parsed(["fit", "--config", str(recipe), "--trainer", str(trainer)], capsys)["trainer"]
    assert settings["strategy"]["class_path"] == "vab.engines.FSDP"
    assert settings["max_steps"] == read(trainer)["max_steps"]


def test_the_sharded_trainer_differs_in_its_strategy_alone():
    whole, sharded = (read(CONFIGS / "trainer" / f"{name}.yaml") for name in ("ddp", "fsdp"))
    assert whole.pop("strategy") != sharded.pop("strategy")
    assert whole == sharded


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_recipe_for_real_data_refuses_shards_of_a_toy_network_alone(path, shards, tmp_path, capsys):
    """Of the tiny codec, or of the tiny vision encoder, by any command; shards of others begin to train, in silence."""
    if path.parent.name == "demo":
        module_of(path, shards)
        return
    codec, vision = "audiogen_16khz", "EVA02-L-14-336/merged2b_s6b_b61k"
    for name, names, words in (
        ("real", (codec, vision), ""),
        ("both", ("tiny8", "tiny"), "codec tiny8 and vision encoder tiny, made for"),
        ("codec", ("tiny", vision), "codec tiny, made for"),
        ("vision", (codec, "tiny"), "vision encoder tiny, made for"),
    ):
        folder = tmp_path / name
        shutil.copytree(shards, folder)
        for manifest in folder.rglob("manifest.json"):
            facts = json.loads(manifest.read_text())
            facts["spec"] |= dict(zip(("codec", "vision"), names, strict=True))
            manifest.write_text(json.dumps(facts))
        if not words:
            module_of(path, folder)
            continue
        with pytest.raises(UserError, match=f"^{folder}/train was extracted with {words}.*--data.allow_tiny true$"):
            module_of(path, folder)
        module_of(path, folder, allow_tiny=True)
    assert capsys.readouterr().err == ""


def module_of(path, shards, **changes):
    """The data module of a recipe, on other shards."""
    given = read(path.parent / yaml.safe_load(path.read_text())["data"])
    others = {"vocabulary": None, "fold": None, "levels": None, "splice": 0.0, "roll": 0.0, "val": str(shards / "val")}
    return ShardDataModule(**given | others | {"train": str(shards / "train"), "test": None} | changes)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_each_command_says_in_one_line_that_the_shards_are_of_a_toy_network(command, shards, tmp_path, capsys):
    (tmp_path / "some.ckpt").touch()  # not read before the data
    checkpoint = [] if command == "fit" else [f"--ckpt_path={tmp_path / 'some.ckpt'}"]
    checkpoint += [f"--out={tmp_path / 'made'}"] if command == "predict" else []
    folders = [f"--data.train={shards / 'train'}", f"--data.val={shards / 'val'}"]
    with pytest.raises(SystemExit) as stop:
        main([command, f"--config={CONFIGS / 'pretrain.yaml'}", *folders, *checkpoint])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {shards / 'train'} was extracted with codec tiny and vision encoder tiny")
