import json
import subprocess
import sys

import pytest

from sound_folders import noisy, write_folder
from vab.commands.compare import compare
from vab.commands.evaluate import evaluate
from vab.spec import UserError


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of two systems, and of one on fewer sounds."""
    folder = tmp_path_factory.mktemp("compare")
    real = write_folder(folder / "real", count=6)
    options = {"seconds": 4.0, "num_workers": 0, "on_error": "skip", "device": "cpu"}
    for name, snr_db, count in (("a", 30, 6), ("b", 0, 6), ("few", 30, 5)):
        made = write_folder(folder / name, count, lambda sound, index, snr_db=snr_db: noisy(sound, index, snr_db))
        evaluate(str(real), str(made), str(folder / f"{name}.json"), **options)
    return folder


def paths(reports, *names):
    return [str(reports / f"{name}.json") for name in names]


def test_like_reports_stand_side_by_side(reports, capsys):
    rows = compare(paths(reports, "a", "b"))
    first, second = rows["kld_tiny"]
    assert first.value < second.value
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "kld_tiny" in line)
    assert f"{second.value - first.value:+.4g}" in line
    assert line.rstrip(" │").endswith("yes")


def test_a_report_beside_itself_is_within_its_error(reports, capsys):
    compare(paths(reports, "a", "a"), only=["kld_tiny"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "kld_tiny" in line)
    assert "+0 +-" in line
    assert line.rstrip(" │").endswith("no")


def test_unlike_reports_are_refused_with_the_differences(reports):
    with pytest.raises(UserError) as refusal:
        compare(paths(reports, "a", "few"))
    line = next(line for line in str(refusal.value).splitlines() if line.startswith("  fad_tiny"))
    assert "num_real: 6 vs 5" in line
    assert "num_generated: 6 vs 5" in line
    assert "real_set: " in line
    assert "generated_set" not in line


def test_only_restricts_to_what_compares(reports):
    with pytest.raises(UserError, match=r"inception_score_tiny .*num_generated: 6 vs 5"):
        compare(paths(reports, "a", "few"), only=["inception_score_tiny"])
    with pytest.raises(UserError, match="--only fad_vggish: the reports have fad_tiny"):
        compare(paths(reports, "a", "b"), only=["fad_vggish"])


def test_a_figure_that_one_lacks_is_a_gap(reports, tmp_path, capsys):
    report = json.loads((reports / "b.json").read_text())
    del report["figures"]["kad_tiny"]
    (tmp_path / "less.json").write_text(json.dumps(report))
    rows = compare([*paths(reports, "a", "b"), str(tmp_path / "less.json")])
    assert [figure is None for figure in rows["kad_tiny"]] == [False, False, True]
    assert "kad_tiny" in capsys.readouterr().out


def test_other_versions_are_said_and_not_refused(reports, tmp_path, capsys):
    report = json.loads((reports / "b.json").read_text())
    for entry in report["figures"].values():
        entry["card"]["libraries"]["soxr"] = "0.0.1"
    (tmp_path / "old.json").write_text(json.dumps(report))
    compare([*paths(reports, "a"), str(tmp_path / "old.json")])
    assert "0.0.1" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1, "figures": {"fad": {}}}'])
def test_what_is_no_report_is_refused(reports, tmp_path, text):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(UserError, match="not a report of vab evaluate"):
        compare([*paths(reports, "a"), str(tmp_path / "odd.json")])
    with pytest.raises(UserError, match="cannot be read"):
        compare([*paths(reports, "a"), str(tmp_path / "none.json")])
    with pytest.raises(UserError, match="two or more"):
        compare(paths(reports, "a"))


def test_comparing_loads_neither_lightning_nor_torch(reports):
    code = (
        "import sys; from vab.cli import main; main(sys.argv[1:]); "
        "print('loaded:', *{'lightning', 'torch', 'torchmetrics'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, "compare", *paths(reports, "a", "b")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "kld_tiny" in printed
    assert printed.splitlines()[-1] == "loaded:"
