"""Read and merge the listeners' answers, and sum them up for each two systems and each question."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vab import __version__
from vab.console import print_table
from vab.evaluation.listening.page import KEY_FORMAT, VERSION
from vab.files import write_atomically
from vab.metrics.preference import ANSWERS, Interval, Preference, preference
from vab.spec import UserError

ANSWERS_FORMAT, SCORES_FORMAT, SCORES = "vab-listen-answers", "vab-listen-scores", "scores.json"
METHOD = (
    "95 % intervals: Wilson's, for the number of independent answers that would vary as these do, by their two-way "
    "clustered variance (listeners, trials); p: exact two-sided sign test, draws left out, over listeners (which "
    "system each preferred more often) and over trials (which system more listeners preferred)"
)
PAGE_ANSWERS = ("a_much_better", "a_better", "no_preference", "b_better", "b_much_better")
"""As the page calls them, in the order of ``vab.metrics.preference.ANSWERS`` if A is the first system."""


@dataclass(frozen=True)
class Key:
    """What the listeners do not see."""

    page: str
    """The page's id."""
    systems: tuple[str, ...]
    """In the order of the results."""
    questions: dict[str, str]
    """Name -> text."""
    sides: dict[str, tuple[str, str]]
    """Trial -> the systems that it calls A and B."""


@dataclass(frozen=True)
class Rater:
    """One listener's file."""

    name: str
    """As typed."""
    session: str
    """Random, made when the listener began."""
    saved: str
    """When the file was made, ISO 8601 in UTC: later ones sort later."""
    answers: dict[tuple[str, str], int]
    """(trial, question) -> place in ``PAGE_ANSWERS``."""
    file: Path
    """Where it was read."""


@dataclass(frozen=True)
class PairScore:
    """What listeners said about two systems, for one question."""

    question: str
    """Its name."""
    first: str
    """A system."""
    second: str
    """The system that it is compared with."""
    preference: Preference
    """The figures."""


def read_key(file: Path) -> Key:
    """Read ``key.json``.

    Raises:
        UserError: If it cannot be read or is no key.
    """
    content = _json(file)
    if not isinstance(content, dict) or content.get("format") != KEY_FORMAT:
        raise UserError(f"{file} is no key of a listening test: --key takes the key.json that vab listen wrote")
    _require_version(content, file)
    try:
        systems = tuple(system["name"] for system in content["systems"])
        sides = {trial["name"]: (trial["A"], trial["B"]) for trial in content["trials"]}
        return Key(content["page"], systems, dict(content["questions"]), sides)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged: it lacks what a key has ({error!r})") from error


def read_raters(places: Sequence[Path], key: Key) -> list[Rater]:
    """Read the listeners' files; of several of the same session the last saved one counts.

    Args:
        places: Files, or folders of which every .json counts, but for our own keys and scores.
        key: Of the page that they must be of.

    Raises:
        UserError: If a file is no listener's answers to this page, there is none, or two listeners have one name.
    """
    by_name: dict[str, list[Rater]] = {}
    for file in _files(places):
        content = _json(file)
        if file not in places and isinstance(content, dict) and content.get("format") in (KEY_FORMAT, SCORES_FORMAT):
            continue
        rater = _rater(content, key, file)
        same = by_name.setdefault(" ".join(rater.name.split()).lower(), [])  # as the page compares names
        same.append(rater)
        if same[0].session != rater.session:
            raise UserError(
                f"{same[0].file} and {file} are two tests by {rater.name!r}: if they are two people, change 'rater' in "
                f"one of them; else leave one out"
            )
    raters = [max(same, key=lambda rater: rater.saved) for same in by_name.values()]
    for last, same in zip(raters, by_name.values(), strict=True):
        for rater in same:
            if rater is not last:
                print(f"note: {rater.file} is {rater.name!r} again: {last.file} counts", file=sys.stderr)
    if not any(rater.answers for rater in raters):
        raise UserError(f"no answers in {', '.join(map(str, places))}: --score takes the files that listeners saved")
    return raters


def sum_up(raters: Sequence[Rater], key: Key) -> list[PairScore]:
    """Sum up, for each question and each two systems that were compared."""
    scores = []
    for question, (first, second) in itertools.product(key.questions, itertools.combinations(key.systems, 2)):
        rows = []
        for number, rater in enumerate(raters):
            for place, (trial, (a, b)) in enumerate(key.sides.items()):
                answer = rater.answers.get((trial, question))
                if answer is not None and {a, b} == {first, second}:
                    rows.append((answer if a == first else len(ANSWERS) - 1 - answer, number, place))
        if rows:
            answers, who, about = torch.tensor(rows).T
            scores.append(PairScore(question, first, second, preference(answers, who, about)))
    return scores


def write_scores(file: Path, scores: Sequence[PairScore], raters: Sequence[Rater], key: Key) -> None:
    """Write the figures as JSON.

    Raises:
        UserError: If the file is there and is not ours, or cannot be written.
    """
    if file.exists():
        theirs = _json(file)
        if not isinstance(theirs, dict) or theirs.get("format") != SCORES_FORMAT:
            raise UserError(f"{file} is there and holds something else: give --out in another folder")
    content = {
        "format": SCORES_FORMAT,
        "version": VERSION,
        "vab": __version__,
        "page": key.page,
        "questions": key.questions,
        "method": METHOD,
        "raters": {rater.name: len(rater.answers) for rater in raters},
        "scores": [_as_json(entry) for entry in scores],
    }
    write_atomically(file, (json.dumps(content, indent=2) + "\n").encode())


def print_scores(scores: Sequence[PairScore], raters: Sequence[Rater], key: Key) -> None:
    """A table for each question."""
    shares = ("much", "better", "none", "better", "much")
    counts = ("answers", "listeners", "p listeners", "p trials")
    headings = ["first", *shares, "second", "prefer first", "prefer second", *counts]
    for question, entries in itertools.groupby(scores, lambda entry: entry.question):
        rows = []
        for entry in entries:
            result = entry.preference
            rows.append(
                [
                    *(entry.first, *(f"{share:.0%}" for share in result.shares), entry.second),
                    *(_percent(result.first), _percent(result.second)),
                    *(f"{result.num_answers}", f"{result.num_raters}"),
                    *(f"{result.p_raters:.2g}", f"{result.p_trials:.2g}"),
                ]
            )
        print_table(f"{question}: {key.questions[question]}", headings, rows, left=(0, 6))
    print(METHOD)
    asked = len(key.sides) * len(key.questions)
    if unfinished := [rater for rater in raters if len(rater.answers) < asked]:
        few = ", ".join(f"{rater.name} ({len(rater.answers)} of {asked} answers)" for rater in unfinished)
        print(f"warning: not finished: {few}; what they answered counts", file=sys.stderr)
    if len(raters) == 1:
        print("warning: one listener only: the intervals are over trials, and say nothing of other listeners",
              file=sys.stderr)  # fmt: skip


def _files(places: Sequence[Path]) -> Iterator[Path]:
    """Each file once."""
    seen = set()
    for place in places:
        files = sorted(place.glob("*.json")) if place.is_dir() else [place]
        if not files:
            raise UserError(f"{place} has no .json file: --score takes the files that listeners saved, or their folder")
        for file in files:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def _rater(content: Any, key: Key, file: Path) -> Rater:
    if not isinstance(content, dict) or content.get("format") != ANSWERS_FORMAT:
        raise UserError(f"{file} is no file of answers that a page of vab listen saved: leave it out")
    _require_version(content, file)
    if content.get("page") != key.page:
        raise UserError(
            f"{file} answers another page ({content.get('page')}) than the key's ({key.page}): leave it out"
        )
    try:
        name, session, saved = (str(content[field]) for field in ("rater", "session", "saved"))
        answers = {}
        for entry in content["answers"]:
            for question, answer in entry["answers"].items():
                if entry["trial"] not in key.sides or question not in key.questions or answer not in PAGE_ANSWERS:
                    raise UserError(
                        f"{file} is damaged: {answer!r} to {question!r} of {entry['trial']!r} is no answer to this page"
                    )
                if (entry["trial"], question) in answers:
                    raise UserError(f"{file} is damaged: {entry['trial']} is answered twice")
                answers[entry["trial"], question] = PAGE_ANSWERS.index(answer)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: it lacks what a file of answers has ({error!r})") from error
    return Rater(name, session, saved, answers, file)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error


def _require_version(content: dict[str, Any], file: Path) -> None:
    if content.get("version") != VERSION:
        raise UserError(f"{file} is of format version {content.get('version')}, and this vab reads version {VERSION}")


def _as_json(entry: PairScore) -> dict[str, Any]:
    said = entry.preference
    return {
        "question": entry.question,
        "first": entry.first,
        "second": entry.second,
        "counts": dict(zip(ANSWERS, said.counts, strict=True)),
        "shares": dict(zip(ANSWERS, said.shares, strict=True)),
        "first_preferred": asdict(said.first),
        "second_preferred": asdict(said.second),
        "answers": said.num_answers,
        "raters": said.num_raters,
        "trials": said.num_trials,
        "p_raters": said.p_raters,
        "p_trials": said.p_trials,
    }


def _percent(interval: Interval) -> str:
    """``40% [31%, 50%]``."""
    return f"{interval.share:.0%} [{interval.low:.0%}, {interval.high:.0%}]"
