"""``vab listen``: what pairs are drawn, what the page's folder holds and hides, and what comes of answers."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import av
import numpy as np
import pytest
import soundfile
import torch

from small_media import picture_hash, tone, video
from vab.commands.listen import listen
from vab.data.media.segments import read_audio, scan_packets
from vab.data.media.write import write_wav
from vab.evaluation.listening.chart import draw_chart
from vab.evaluation.listening.media import match_levels
from vab.evaluation.listening.plan import plan_trials
from vab.evaluation.listening.scores import PAGE_ANSWERS, read_key, read_raters, sum_up
from vab.metrics.preference import preference
from vab.spec import UserError

VIDEOS = ("one", "two", "deep/three", "four")
SECRETS = ("zebra", "quagga")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Four videos of 0.6 s, and two systems' sounds: one of 16 kHz and loud, one of 22 kHz, quieter and longer."""
    folder = tmp_path_factory.mktemp("listen")
    for number, name in enumerate(VIDEOS):
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        video(folder / "videos" / f"{name}.mp4", 0.6, seed=number)
        write_wav(folder / "zebra" / f"{name}.wav", tone(0.6, 300 + 50 * number), 16_000)
        (folder / "quagga" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / "quagga" / f"{name}.flac", 0.1 * tone(0.9, 500 + 50 * number, 22_050), 22_050)
    return folder


def run(place, folder, **changes):
    arguments = {
        "systems": [str(place / name) for name in SECRETS], "videos": str(place / "videos"), "out": str(folder),
        "num_pairs": 4,
    }  # fmt: skip
    return listen(**arguments | changes)


@pytest.fixture(scope="module")
def written(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "test"
    run(place, out)
    return out, json.loads((out / "key.json").read_text())


def sound_of(out, trial, side):
    return read_audio(out / "page" / "media" / f"{trial['name']}_{side.lower()}.mp4", 48_000).waveform


# --- which pairs


@pytest.mark.parametrize(("num_videos", "num_systems"), [(7, 2), (6, 3), (5, 4), (4, 4), (1, 3)])
def test_videos_pairs_and_sides_come_up_evenly(num_videos, num_systems):
    videos, systems = [f"v{i}" for i in range(num_videos)], [f"s{i}" for i in range(num_systems)]
    pairs = [frozenset(pair) for pair in itertools.combinations(systems, 2)]
    for num_pairs in range(1, num_videos * len(pairs) + 1):
        trials = plan_trials(videos, systems, num_pairs, seed=num_pairs)
        of_video = Counter(trial.video for trial in trials)
        of_pair = Counter(frozenset(trial.systems) for trial in trials)
        assert max(of_video.values()) - min(of_video[name] for name in videos) <= 1
        assert max(of_pair.values()) - min(of_pair[pair] for pair in pairs) <= 1
        assert len({(trial.video, frozenset(trial.systems)) for trial in trials}) == num_pairs
        for pair in pairs:
            first = sum(trial.systems[0] == min(pair) for trial in trials if set(trial.systems) == pair)
            assert abs(2 * first - of_pair[pair]) <= 1


def test_a_seed_gives_the_same_trials_and_another_seed_others():
    videos, systems = [f"v{i}" for i in range(20)], ["a", "b", "c"]
    assert plan_trials(videos, systems, 30, 5) == plan_trials(videos, systems, 30, 5)
    assert plan_trials(videos, systems, 30, 5) != plan_trials(videos, systems, 30, 6)
    sides = {tuple(t.systems[0] < t.systems[1] for t in plan_trials(videos, systems, 30, seed)) for seed in range(20)}
    assert len(sides) == 20


def test_more_trials_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"num_pairs must be 1 to 9 \(3 videos, 3 pairs of systems\), got 10"):
        plan_trials(["x", "y", "z"], ["a", "b", "c"], 10, 0)


# --- what is written


def test_nothing_in_the_page_says_whose_sound_is_which(place, written):
    out, _ = written
    files = [path for path in (out / "page").rglob("*") if path.is_file()]
    assert len(files) == 1 + 2 * 4
    assert {path.name for path in out.iterdir()} == {"page", "key.json"}
    for path in files:
        content = path.read_bytes().lower()
        for word in (*SECRETS, str(place), "deep/three"):
            assert word.lower().encode() not in content
            assert word.lower() not in str(path.relative_to(out))
        if path.suffix == ".mp4":
            with av.open(str(path)) as container:
                assert container.streams.audio[0].sample_rate == 48_000


def test_the_page_needs_no_network(written):
    page = (written[0] / "page" / "index.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert "{{" not in page
    content = json.loads(page.split('id="content">')[1].split("</script>")[0])
    for trial in content["trials"]:
        for file in trial["media"]:
            assert (written[0] / "page" / file).is_file()


def test_each_side_is_the_video_with_the_sound_that_the_key_names(place, written):
    out, key = written
    for trial in key["trials"]:
        original = place / "videos" / f"{trial['video']}.mp4"
        pitch = dict.fromkeys(SECRETS, 0.0)
        for side in "AB":
            file = out / "page" / "media" / f"{trial['name']}_{side.lower()}.mp4"
            assert picture_hash(file) == picture_hash(original)
            heard = sound_of(out, trial, side)
            assert len(heard) / 48_000 == pytest.approx(scan_packets(original).video_end, abs=0.03)  # 0.9 s was cut
            spectrum = np.abs(np.fft.rfft(heard * np.hanning(len(heard))))
            pitch[trial[side]] = float(spectrum.argmax() * 48_000 / len(heard))
        number = VIDEOS.index(trial["video"])
        assert pitch["zebra"] == pytest.approx(300 + 50 * number, abs=4)
        assert pitch["quagga"] == pytest.approx(500 + 50 * number, abs=4)


def test_sounds_of_a_trial_are_equally_loud_unless_told_not_to(place, written, tmp_path):
    def levels(out, key):
        return [
            20 * np.log10([np.sqrt(np.mean(sound_of(out, trial, side) ** 2)) for side in "AB"])
            for trial in key["trials"]
        ]

    assert np.abs(np.diff(levels(*written))).max() < 0.3
    assert np.concatenate(levels(*written)) == pytest.approx(-23, abs=0.3)
    run(place, tmp_path / "raw", level_match=False)
    raw = json.loads((tmp_path / "raw" / "key.json").read_text())
    assert np.abs(np.diff(levels(tmp_path / "raw", raw))) == pytest.approx(20, abs=0.5)
    assert raw["page"] != written[1]["page"]


def test_levels_are_equal_and_no_peak_clips_and_silence_stays():
    click = np.zeros(48_000, np.float32)
    click[100:110] = 0.5
    sounds = {"click": click, "hum": tone(1.0, rate=48_000), "silence": np.full(48_000, 1e-5, np.float32)}
    gains = match_levels(sounds)
    assert set(gains) == {"click", "hum"}
    matched = {name: sounds[name] * 10 ** (gain / 20) for name, gain in gains.items()}
    assert np.abs(matched["click"]).max() == pytest.approx(10 ** (-1 / 20))
    assert np.mean(matched["click"] ** 2) == pytest.approx(np.mean(matched["hum"] ** 2), rel=1e-5)


def test_the_same_command_gives_the_same_files_and_does_nothing_twice(place, written, tmp_path, capsys):
    index = run(place, tmp_path / "again")
    ours = sorted(path.relative_to(written[0]) for path in written[0].rglob("*"))
    assert sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*")) == ours
    for path in ours:
        if (written[0] / path).is_file():
            assert (tmp_path / "again" / path).read_bytes() == (written[0] / path).read_bytes()
    before = index.stat().st_mtime_ns
    run(place, tmp_path / "again")
    assert index.stat().st_mtime_ns == before
    assert "it was there" in capsys.readouterr().out


def test_names_and_questions_are_taken(place, tmp_path):
    run(place, tmp_path / "out", names=["ours", "</script>"], questions=["sync: Which is </script><b>in time</b>?"])
    key = json.loads((tmp_path / "out" / "key.json").read_text())
    assert [system["name"] for system in key["systems"]] == ["ours", "</script>"]
    assert key["questions"] == {"sync": "Which is </script><b>in time</b>?"}
    page = (tmp_path / "out" / "page" / "index.html").read_text()
    content = json.loads(page.split('id="content">')[1].split("</script>")[0])
    assert content["questions"] == [{"name": "sync", "text": "Which is </script><b>in time</b>?"}]


def test_a_video_without_sound_of_a_system_is_refused_or_skipped(place, tmp_path, capsys):
    (tmp_path / "zebra").mkdir()
    for name in ("one", "four"):
        (tmp_path / "zebra" / f"{name}.wav").symlink_to(place / "zebra" / f"{name}.wav")
    systems = [str(tmp_path / "zebra"), str(place / "quagga")]
    with pytest.raises(UserError, match=r"no sound for 2 of 4 videos \(deep/three, two\).*--on_error skip"):
        run(place, tmp_path / "out", systems=systems, num_pairs=2)
    assert not (tmp_path / "out").exists()
    run(place, tmp_path / "out", systems=systems, num_pairs=2, on_error="skip")
    key = json.loads((tmp_path / "out" / "key.json").read_text())
    assert sorted(trial["video"] for trial in key["trials"]) == ["four", "one"]


def test_a_short_sound_and_a_silent_one_are_told(tmp_path, capsys):
    video(tmp_path / "videos.mp4", 1.5)
    (tmp_path / "v").mkdir()
    (tmp_path / "videos.mp4").rename(tmp_path / "v" / "x.mp4")
    write_wav(tmp_path / "short" / "x.wav", tone(0.5), 16_000)
    write_wav(tmp_path / "silent" / "x.wav", np.zeros(24_000, np.float32), 16_000)
    listen(
        [str(tmp_path / name) for name in ("short", "silent")], str(tmp_path / "v"), str(tmp_path / "out"), num_pairs=1
    )
    told = capsys.readouterr().err
    assert "1 of 1 sounds of short end more than 0.5 s before their video" in told
    assert "1 of 1 sounds of silent are silent" in told
    (trial,) = json.loads((tmp_path / "out" / "key.json").read_text())["trials"]
    assert trial["seconds"] == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"systems": ["zebra"]}, "compares two systems or more.*got 1"),
        ({"systems": ["zebra", "zebra"]}, "two systems are called 'zebra'.*--names"),
        ({"systems": ["zebra", "none"]}, "there is no such folder"),
        ({"systems": ["zebra", "other"]}, "no video of .* has a sound of every system"),
        ({"names": ["a"]}, "got 1 names for 2 systems"),
        ({"num_pairs": 5}, "num_pairs must be 1 to 4"),
        ({"questions": ["no colon"]}, "a question is 'NAME: TEXT'"),
        ({"videos": None}, "needs --videos"),
        ({"out": None}, "needs --videos DIR.* and --out"),
        ({"key": "key.json"}, "--key goes with --score"),
        ({"score": ["x"]}, "takes --systems .* or --score"),
        ({"systems": None}, "takes --systems .* or --score"),
        ({"systems": None, "score": ["x"]}, "not with --videos"),
        ({"systems": None, "videos": None, "score": ["x"]}, "needs the --key"),
    ],
)
def test_what_cannot_be_a_test_is_refused_in_one_line(place, tmp_path, changes, words):
    write_wav(tmp_path / "other" / "else.wav", tone(0.2), 16_000)
    if changes.get("systems"):
        where = {"other": tmp_path}
        changes = changes | {"systems": [str(where.get(name, place) / name) for name in changes["systems"]]}
    with pytest.raises(UserError, match=words) as refusal:
        run(place, tmp_path / "out", **changes)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_this_test_is_left_alone(place, written, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "key.json").write_text('{"format": "door"}')
    with pytest.raises(UserError, match="is no listening test of vab"):
        run(place, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["key.json"]
    with pytest.raises(UserError, match="holds another listening test"):
        run(place, written[0], seed=1)
    (tmp_path / "empty").mkdir()
    assert run(place, tmp_path / "empty").is_file()


def test_two_sounds_of_one_name_are_refused(place, tmp_path):
    for suffix in ("wav", "flac"):
        write_wav(tmp_path / "twins" / "one.wav", tone(0.6), 16_000)
        soundfile.write(tmp_path / "twins" / f"one.{suffix}", tone(0.6), 16_000)
    with pytest.raises(UserError, match=r"one\.flac and one\.wav"):
        run(place, tmp_path / "out", systems=[str(tmp_path / "twins"), str(place / "zebra")], on_error="skip")


def test_a_failure_on_the_way_leaves_no_folder(place, tmp_path):
    (tmp_path / "broken").mkdir()
    for name in VIDEOS:
        (tmp_path / "broken" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "broken" / f"{name}.wav").write_bytes(b"not a sound")
    with pytest.raises(UserError, match="broken"):
        run(place, tmp_path / "out", systems=[str(tmp_path / "broken"), str(place / "zebra")])
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


# --- what comes of answers


def answers_file(folder, key, name, choose, **changes):
    """As the page saves it; ``choose(trial, question)`` gives a word of PAGE_ANSWERS, or None for no answer yet."""
    answers = []
    for position, trial in enumerate(key["trials"], start=1):
        given = {question: word for question in key["questions"] if (word := choose(trial, question)) is not None}
        if given:
            answers.append({"trial": trial["name"], "position": position, "answers": given})
    content = {
        "format": "vab-listen-answers", "version": 1, "page": key["page"], "rater": name, "session": name,
        "saved": "2026-01-01T00:00:00.000Z", "answers": answers,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    file = folder / f"{changes.pop('file', name)}.json"
    file.write_text(json.dumps(content | changes))
    return file


def for_system(name):
    return lambda trial, _: "a_better" if trial["A"] == name else "b_better"


def test_answers_are_turned_to_the_systems_and_summed(written, tmp_path, capsys):
    out, key = written
    answers_file(tmp_path / "answers", key, "Ann", for_system("zebra"))
    answers_file(
        tmp_path / "answers", key, "Bob", lambda t, q: "no_preference" if q == "overall_quality" else "a_much_better"
    )
    scores = listen(score=[str(tmp_path / "answers")], key=str(out / "key.json"), out=str(tmp_path / "chart.png"))
    quality, relevance = scores
    assert (quality.question, quality.first, quality.second) == ("overall_quality", "zebra", "quagga")
    assert quality.preference.counts == (0, 4, 4, 0, 0)
    is_a = sum(trial["A"] == "zebra" for trial in key["trials"])
    assert relevance.preference.counts == (is_a, 4, 0, 0, 4 - is_a) == (2, 4, 0, 0, 2)
    assert quality.preference.p_trials == 2 / 16
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "scores.json").read_text())
    assert told["scores"][0]["counts"]["first_better"] == 4
    assert told["scores"][0]["first_preferred"]["share"] == 0.5
    assert told["raters"] == {"Ann": 8, "Bob": 8}
    assert "Which sound fits the video better?" in capsys.readouterr().out


def test_scores_of_three_systems_are_those_of_each_pair_alone(tmp_path):
    generator = np.random.default_rng(0)
    trials = plan_trials([f"v{i}" for i in range(9)], ["x", "y", "z"], 24, 0)
    key = {
        "format": "vab-listen-key", "version": 1, "page": "0" * 12, "systems": [{"name": n} for n in "xyz"],
        "questions": {"q": "Q?"},
        "trials": [{"name": t.name, "video": t.video, "A": t.systems[0], "B": t.systems[1]} for t in trials],
    }  # fmt: skip
    (tmp_path / "key.json").write_text(json.dumps(key))
    rows = {pair: [] for pair in itertools.combinations("xyz", 2)}
    for rater in range(5):
        given = {trial.name: int(generator.integers(5)) for trial in trials}
        for trial in trials:
            pair = tuple(sorted(trial.systems))
            answer = given[trial.name] if trial.systems == pair else 4 - given[trial.name]
            rows[pair].append((answer, rater, int(trial.name[1:])))
        answers_file(tmp_path / "a", key, f"r{rater}", lambda trial, _, given=given: PAGE_ANSWERS[given[trial["name"]]])
    scores = listen(score=[str(tmp_path / "a")], key=str(tmp_path / "key.json"))
    assert {(entry.first, entry.second): entry.preference for entry in scores} == {
        pair: preference(*torch.tensor(answers).T) for pair, answers in rows.items()
    }
    assert (tmp_path / "preference.png").is_file()


def test_names_on_the_chart_are_no_mathematics(written, tmp_path):
    out, key = written
    file = answers_file(tmp_path / "answers", key, "Ann", for_system("zebra"))
    scores = sum_up(read_raters([file], read_key(out / "key.json")), read_key(out / "key.json"))
    named = [replace(entry, first="$_{$", second="not utf-8 \udcff") for entry in scores]
    draw_chart(tmp_path / "chart.png", named, {entry.question: "$^$?" for entry in scores})
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_listener_counts_once_by_the_last_file(written, tmp_path, capsys):
    out, key = written
    folder = tmp_path / "answers"
    half = lambda trial, _: "a_better" if trial["name"] < "t003" else None  # noqa: E731
    answers_file(folder, key, "Ann", half, file="early", saved="2026-01-01T00:00:00.000Z")
    file = answers_file(folder, key, "Ann", for_system("quagga"), file="a_late", saved="2026-01-02T00:00:00.000Z")
    answers_file(folder, key, "Ann", half, file="copy", saved="2026-01-01T00:00:00.000Z")
    scores = listen(score=[str(folder), str(file)], key=str(out / "key.json"), out=str(tmp_path / "chart.png"))
    assert [entry.preference.counts for entry in scores] == [(0, 0, 0, 4, 0)] * 2
    told = capsys.readouterr().err
    assert told.count("late.json counts") == 2
    assert "one listener only" in told


def test_unfinished_answers_count_and_are_told(written, tmp_path, capsys):
    out, key = written
    only = lambda trial, question: "b_better" if (trial["name"], question) == ("t001", "visual_relevance") else None  # noqa: E731
    file = answers_file(tmp_path / "answers", key, "Ann", only)
    (entry,) = listen(score=[str(file)], key=str(out / "key.json"), out=str(tmp_path / "chart.png"))
    assert (entry.question, entry.preference.num_answers) == ("visual_relevance", 1)
    assert "Ann (1 of 8 answers)" in capsys.readouterr().err


def test_a_folder_scored_twice_with_key_and_scores_in_it(written, tmp_path):
    out, key = written
    folder = tmp_path / "all"
    answers_file(folder, key, "Ann", for_system("zebra"))
    (folder / "key.json").write_bytes((out / "key.json").read_bytes())
    first = listen(score=[str(folder)], key=str(folder / "key.json"))
    assert listen(score=[str(folder)], key=str(folder / "key.json")) == first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"page": "another"}, r"Eve\.json answers another page"),
        ({"format": "shopping"}, r"Eve\.json is no file of answers"),
        ({"version": 2}, r"Eve\.json is of format version 2"),
        ({"answers": [{"trial": "t999", "answers": {"overall_quality": "a_better"}}]}, r"Eve\.json is damaged.*t999"),
        ({"answers": [{"trial": "t001", "answers": {"overall_quality": "superb"}}]}, r"Eve\.json is damaged.*superb"),
        ({"answers": [{"trial": "t001", "answers": {"overall_quality": ["a"]}}]}, r"Eve\.json is damaged"),
        ({"answers": [{"trial": "t001", "answers": {"overall_quality": "a_better"}}] * 2}, "answered twice"),
        ({"answers": [{"trial": "t001"}]}, r"Eve\.json is damaged"),
        ({"answers": 3}, r"Eve\.json is damaged"),
        ({"answers": []}, "no answers in"),
        ({"rater": " aNN "}, r"Ann\.json and .*Eve\.json are two tests by"),
    ],
)
def test_foreign_and_damaged_answers_are_refused_by_name(written, tmp_path, changes, words):
    out, key = written
    answers_file(tmp_path / "answers", key, "Eve", for_system("zebra"), **changes)
    if "rater" in changes:
        answers_file(tmp_path / "answers", key, "Ann", for_system("zebra"))
    with pytest.raises(UserError, match=words) as refusal:
        listen(score=[str(tmp_path / "answers")], key=str(out / "key.json"), out=str(tmp_path / "chart.png"))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "chart.png").exists()


def test_what_is_no_json_no_key_or_no_chart_is_refused(written, tmp_path):
    out, key = written
    answers_file(tmp_path / "answers", key, "Ann", for_system("zebra"))
    score = {"score": [str(tmp_path / "answers")], "key": str(out / "key.json"), "out": str(tmp_path / "chart.png")}
    with pytest.raises(UserError, match=r"Ann\.json is no key of a listening test"):
        listen(**score | {"key": str(tmp_path / "answers" / "Ann.json")})
    with pytest.raises(UserError, match=r"must end in \.png"):
        listen(**score | {"out": str(tmp_path / "chart")})
    with pytest.raises(UserError, match="cannot be read"):
        listen(**score | {"score": [str(tmp_path / "nowhere.json")]})
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"has no \.json file"):
        listen(**score | {"score": [str(tmp_path / "none")]})
    (tmp_path / "scores.json").write_text("[]")
    with pytest.raises(UserError, match="holds something else"):
        listen(**score)
    (tmp_path / "answers" / "Bob.json").write_text("{")
    with pytest.raises(UserError, match=r"Bob\.json is not JSON"):
        listen(**score)
