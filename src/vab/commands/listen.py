"""``vab listen``: write a listening test, in which people compare two sounds of a video, and sum up the answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vab import UserError

if TYPE_CHECKING:
    from vab.evaluation.listening.scores import PairScore


def listen(
    systems: list[str] | None = None,
    videos: str | None = None,
    out: str | None = None,
    names: list[str] | None = None,
    num_pairs: int = 30,
    questions: list[str] | None = None,
    level_match: bool = True,
    on_error: Literal["stop", "skip"] = "stop",
    seed: int = 0,
    score: list[str] | None = None,
    key: str | None = None,
) -> Path | list[PairScore]:
    """Have people compare the sounds of two systems or more for the same videos.

    With --systems: write the test. OUT/page is a folder of plain files; any browser opens its index.html, from a disk
    or a web server. It does not say which sound is of which system. OUT/key.json does: keep it from the listeners. They
    answer two questions for each pair, in five steps from "A much better" to "B much better", and send back the file
    that the page saves.

    With --score: sum those files up. This prints a table, draws the preference chart with 95 % intervals, and writes
    scores.json beside it.

    Args:
        systems: Folders of the systems' sounds (wav, flac, ogg, mp3, ..., or videos with sound), named as the videos.
            One of them may be the folder of the videos, for their own sound.
        videos: Folder of the videos that are shown; H.264, AV1 or VP9.
        out: With --systems: the folder to write. With --score: the chart, a .png; preference.png beside the key if
            not given.
        names: Of the systems, for results; their folders' names if not given.
        num_pairs: Trials of the test. Videos, pairs of systems and sides come up as evenly as can be.
        questions: 'NAME: TEXT' for each question; overall quality and visual relevance if not given.
        level_match: Bring the sounds of a video to the same root mean square: -23 dBFS, or less if one of them would
            clip. Otherwise louder sounds tend to be preferred.
        on_error: What to do if a system lacks a video. stop: refuse; skip: leave the video out.
        seed: Of the draw of trials.
        score: Files of answers, or folders of them.
        key: The key.json of the test that is answered.
    """
    from vab.evaluation.listening.media import require_playable
    from vab.evaluation.listening.page import KEY, ListeningTest, read_questions
    from vab.evaluation.listening.plan import find_material, name_systems, plan_trials

    if (systems is None) == (score is None):
        raise UserError("vab listen takes --systems A_DIR B_DIR, to write a test, or --score FILES, to sum answers up")
    if score is not None:
        given = {"videos": videos, "names": names, "questions": questions}
        if unfit := [f"--{name}" for name, value in given.items() if value is not None]:
            raise UserError(f"--score goes with --key and --out, not with {', '.join(unfit)}")
        if key is None:
            raise UserError("--score needs the --key of the test that is answered: OUT/key.json")
        return _score([Path(place) for place in score], Path(key), None if out is None else Path(out))
    if key is not None:
        raise UserError("--key goes with --score, not with --systems")
    if videos is None or out is None or systems is None:
        raise UserError("--systems needs --videos DIR, the videos to show, and --out DIR, the folder to write")
    asked, folders = read_questions(questions), name_systems(systems, names)
    material = find_material(Path(videos), folders, skip_missing=on_error == "skip")
    trials = plan_trials(list(material), list(folders), num_pairs, seed)
    material = {name: material[name] for name in sorted({trial.video for trial in trials})}
    require_playable(material)
    test, folder = ListeningTest(trials, material, folders, asked, seed, level_match), Path(out)
    done = test.is_in(folder)
    if not done:
        test.write(folder)
    index = folder / "page" / "index.html"
    print(
        f"{index}: {len(trials)} trials of {len(material)} videos, {', '.join(folders)}{'; it was there' * done}\n"
        f"give listeners the folder {index.parent}, and keep {folder / KEY} from them\n"
        f"then: vab listen --score FOLDER_OF_ANSWERS --key {folder / KEY}"
    )
    return index


def _score(places: list[Path], key_file: Path, out: Path | None) -> list[PairScore]:
    from vab.evaluation.listening.chart import draw_chart
    from vab.evaluation.listening.scores import SCORES, print_scores, read_key, read_raters, sum_up, write_scores

    chart = key_file.parent / "preference.png" if out is None else out
    if chart.suffix.lower() != ".png":
        raise UserError(f"--out {chart}: with --score it is the chart, and must end in .png")
    key = read_key(key_file)
    raters = read_raters(places, key)
    scores = sum_up(raters, key)
    print_scores(scores, raters, key)
    draw_chart(chart, scores, key.questions)
    write_scores(chart.parent / SCORES, scores, raters, key)
    print(f"{chart}, {chart.parent / SCORES}")
    return scores
