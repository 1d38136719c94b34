"""``vab sweep`` on short shards, with the tiny networks and an untrained model."""

import csv
import json

import pytest
import torch
import yaml

import tone_shards
from small_media import save_model
from tone_shards import short_spec, write_shards
from vab.cli import main
from vab.commands.sweep import sweep
from vab.data.reading.dataset import ShardDataset
from vab.data.reading.order import spread_evenly
from vab.files import lock_folder
from vab.frozen.judges import load_judge
from vab.generation.generator import Generator
from vab.generation.sampler_files import Setting, changed_sampler
from vab.generation.sweep import Row, Subset, ranked
from vab.metrics.divergence import paired_kl
from vab.metrics.frechet import frechet_distance, moments
from vab.metrics.uncertainty import mean_and_error
from vab.spec import UserError
from vab.tokens.noise import fold_in, record_keys
from vab.tokens.sampler import Sampler

GRID = "decode_steps: [1, 2]\norder: [confidence, halton]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Shards whose labels the judge knows, untrained models, and a grid."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tone_shards, "LABELS", load_judge("tiny").classes[3:5])
        dataset = ShardDataset(write_shards(folder / "val", short_spec(), 13))
    save_model(folder / "last.ckpt", dataset.spec, dataset.codebooks)
    save_model(folder / "other.ckpt", dataset.spec, dataset.codebooks, seed=1)
    coarse = ShardDataset(folder / "val", levels=2)
    save_model(folder / "coarse.ckpt", coarse.spec, coarse.codebooks)
    save_model(folder / "fine.ckpt", dataset.spec, dataset.codebooks, conditioning_levels=2)
    (folder / "grid.yaml").write_text(GRID)
    return folder


def run(place, out, **changes):
    arguments = {
        "checkpoint": str(place / "last.ckpt"), "data": str(place / "val"), "grid": str(place / "grid.yaml"),
        "out": str(out), "num_records": 6, "batch_size": 4, "device": "cpu",
    }  # fmt: skip
    return sweep(**arguments | changes)


def written(out):
    with (out / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_leaves_rows_a_table_and_the_best_sampler(place, tmp_path, capsys):
    rows = run(place, tmp_path / "out")
    assert len(rows) == 4
    divergence = [row.metrics["kld_tiny"] for row in rows]
    assert divergence == sorted(divergence)
    lines = written(tmp_path / "out")
    assert sorted(float(line["kld_tiny"]) for line in lines) == divergence
    assert {(line["decode_steps"], line["order"]) for line in lines} == {
        (steps, order) for steps in "12" for order in ("confidence", "halton")
    }
    best = changed_sampler(Sampler(), str(tmp_path / "out" / "best.yaml"), "--sampler")
    assert best == rows[0].setting.sampler
    assert best.guidance_scale == 2.0  # the checkpoint's own, which the grid does not name
    printed = capsys.readouterr()
    assert "fad_tiny" in printed.out
    assert printed.err.count("warning: fad_tiny is of 6 records, with embeddings of 128 dimensions") == 1
    assert "4/4" in printed.err


def test_figures_are_those_of_the_records_taken_one_by_one(place, tmp_path):
    (row,) = run(place, tmp_path / "out", grid=one(tmp_path, "decode_steps: 2\norder: random\n"))
    dataset, judge = ShardDataset(place / "val"), load_judge("tiny")
    generator = Generator.load(place / "last.ckpt", device="cpu")
    heard = {"real": [], "made": []}
    right = []
    for number in spread_evenly(6, len(dataset)):
        batch = dataset.read([number])
        keys = fold_in(record_keys(0, batch.index), 0)  # of the first window
        made = generator.task.generate(batch.features, keys, row.setting.sampler)
        for name, codes in (("real", batch.codes), ("made", made)):
            heard[name].append(judge(generator.codec.decode(codes), 16_000))
        guess = heard["made"][-1].logits.argmax()
        right.append(float(guess == 3 + int(batch.labels.argmax())))
    real, made = (torch.cat([output.logits for output in heard[name]]) for name in ("real", "made"))
    expected, error = mean_and_error(paired_kl(real, made))
    assert row.metrics["kld_tiny"] == pytest.approx(expected, rel=1e-4)
    assert row.metrics["kld_tiny_error"] == pytest.approx(error, rel=1e-4)
    sides = [moments(torch.cat([output.embedding[:, 0] for output in heard[name]])) for name in ("real", "made")]
    assert row.metrics["fad_tiny"] == pytest.approx(float(frechet_distance(*sides[0], *sides[1])), rel=1e-4)
    assert row.metrics["agreement"] == pytest.approx(sum(right) / 6)
    assert 0 <= row.metrics["warnings"] <= 1
    assert row.metrics["seconds"] > 0


def one(folder, text):
    path = folder / "one.yaml"
    path.write_text(text)
    return str(path)


def test_the_round_trip_itself_is_perfect(place):
    generator, dataset = Generator.load(place / "last.ckpt", device="cpu"), ShardDataset(place / "val")
    subset = Subset(generator, dataset, load_judge("tiny"), 6, 4, 0)
    subset._generate = lambda number, sampler: subset._batches[number].codes
    figures = subset.measure(Sampler(decode_steps=1))
    assert figures["kld_tiny"] == 0
    assert figures["fad_tiny"] == pytest.approx(0, abs=1e-3)
    assert figures["longest_repeat_seconds"] == pytest.approx(
        sum(sound.longest_repeat_seconds for sound in subset._real[1]) / 6
    )


def test_a_second_run_measures_only_what_is_missing(place, tmp_path, capsys):
    out = tmp_path / "out"
    run(place, out, grid=one(tmp_path, "decode_steps: 1\norder: halton\n"))
    before = written(out)
    capsys.readouterr()
    rows = run(place, out)
    assert [line for line in capsys.readouterr().err.splitlines() if "/3 " in line][-1].startswith("3/3")
    assert written(out)[:1] == before
    assert len(written(out)) == len(rows) == 4
    run(place, out, metric="seconds")
    assert "/" not in capsys.readouterr().err.split("warning")[0]  # nothing was measured
    assert len(written(out)) == 4


def test_a_sweep_that_was_killed_goes_on(place, tmp_path, monkeypatch):
    out, done = tmp_path / "out", []
    measure = Subset.measure

    def dies(self, sampler):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(sampler)
        return measure(self, sampler)

    monkeypatch.setattr(Subset, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        run(place, out)
    assert len(written(out)) == 2
    monkeypatch.setattr(Subset, "measure", measure)
    again, whole = run(place, out), run(place, tmp_path / "whole")
    figures = [
        {str(row.setting.sampler): row.metrics | {"seconds": 0.0} for row in rows} for rows in (again, whole)
    ]  # fmt: skip
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"checkpoint": "other.ckpt"}, "checkpoint_sha256"),
        ({"num_records": 5}, "records"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 2}, "batch_size"),
    ],
)
def test_figures_of_something_else_are_refused(place, tmp_path, changes, name):
    quick = one(tmp_path, "decode_steps: 1\n")
    run(place, tmp_path / "out", grid=quick)
    if "checkpoint" in changes:
        changes = {"checkpoint": str(place / changes["checkpoint"])}
    with pytest.raises(UserError, match=f"was begun with other settings.*{name}: .*give another --out"):
        run(place, tmp_path / "out", grid=quick, **changes)


@pytest.mark.parametrize("damage", ["", "name,decode_steps\nx,1\n"])
def test_a_table_of_another_make_is_refused(place, tmp_path, damage):
    quick = one(tmp_path, "decode_steps: 1\n")
    run(place, tmp_path / "out", grid=quick)
    table = tmp_path / "out" / "sweep.csv"
    if damage:
        table.write_text(damage)
        with pytest.raises(UserError, match=r"sweep\.csv is damaged, or of another version"):
            run(place, tmp_path / "out", grid=quick)
    (tmp_path / "out" / "sweep.json").unlink()
    with pytest.raises(UserError, match=r"no sweep\.json beside it"):
        run(place, tmp_path / "out", grid=quick)


def test_a_folder_of_another_version_and_a_second_sweep_are_refused(place, tmp_path):
    quick, out = one(tmp_path, "decode_steps: 1\n"), tmp_path / "out"
    with lock_folder(out, "vab sweep"), pytest.raises(UserError, match="another vab sweep is writing"):
        run(place, out, grid=quick)
    (out / "sweep.json").write_text('{"vab": "0.1", "records": 6}')
    with pytest.raises(UserError, match=r"sweep\.json is damaged, or of another version of vab: give another --out"):
        run(place, out, grid=quick)


def test_the_best_is_by_the_metric_asked_for():
    figures = [{"agreement": 0.5, "kld_tiny": 0.1}, {"agreement": 0.9, "kld_tiny": 0.2},
               {"agreement": 0.9, "kld_tiny": 0.1}]  # fmt: skip
    rows = [Row(Setting(str(i), Sampler(decode_steps=9 - i)), row) for i, row in enumerate(figures)]
    assert [row.setting.name for row in ranked(rows, "agreement")] == ["2", "1", "0"]
    assert [row.setting.name for row in ranked(rows, "kld_tiny")] == ["2", "0", "1"]


def test_labels_that_the_judge_does_not_know_leave_the_other_metrics(place, shards, tmp_path):
    data, quick = str(shards / "val"), one(tmp_path, "decode_steps: 1\n")
    with pytest.raises(UserError, match="no labels that judge tiny knows"):
        run(place, tmp_path / "a", data=data, grid=quick, metric="agreement")
    (row,) = run(place, tmp_path / "b", data=data, grid=quick)
    assert "agreement" not in row.metrics
    with pytest.raises(UserError, match="no labels that judge tiny knows"):
        run(place, tmp_path / "b", data=data, grid=quick, metric="agreement")


def test_two_stages_and_a_fine_one_alone(place, tmp_path):
    quick = one(tmp_path, "decode_steps: [[1, 1]]\n")
    fine = str(place / "fine.ckpt")
    (coarse,) = run(place, tmp_path / "coarse", grid=quick, checkpoint=str(place / "coarse.ckpt"))
    (both,) = run(place, tmp_path / "both", grid=quick, checkpoint=str(place / "coarse.ckpt"), fine_checkpoint=fine)
    (alone,) = run(place, tmp_path / "alone", grid=quick, checkpoint=fine)
    assert len({row.metrics["kld_tiny"] for row in (coarse, both, alone)}) == 3
    with pytest.raises(UserError, match="decode_steps lists 3 levels, but the codes have 2"):
        run(place, tmp_path / "more", grid=one(tmp_path, "decode_steps: [[1, 1, 1]]\n"), checkpoint=fine)


def test_the_command_line(place, tmp_path, capsys):
    out = tmp_path / "out"
    grid = one(tmp_path, "- {name: quick, decode_steps: [1]}\n")
    flags = [f"--checkpoint={place / 'last.ckpt'}", f"--data={place / 'val'}", f"--out={out}", "--num_records=4"]
    main(["sweep", *flags, f"--grid={grid}", "--metric=fad"])
    assert yaml.safe_load((out / "best.yaml").read_text())["decode_steps"] == 1
    assert json.loads((out / "sweep.json").read_text())["settings"]["records"] == 4
    assert "quick" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *flags, f"--grid={one(tmp_path, 'choice_temprature: [1]')}"])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: {grid}: unknown key 'choice_temprature'; did you mean 'choice_temperature'?")
    assert len(text.splitlines()) == 1


def test_too_few_records_are_refused(place, tmp_path):
    with pytest.raises(UserError, match="num_records of 2 or more"):
        run(place, tmp_path / "out", num_records=1)


def test_records_are_spread_over_the_set():
    assert spread_evenly(4, 12) == [0, 3, 6, 9]
    assert spread_evenly(5, 3) == [0, 1, 2]
    assert len(set(spread_evenly(7, 10))) == 7
