"""The report as one page: nothing is fetched, it opens from a disk."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vab.demo.report.measures import SOUNDS
from vab.metrics.recall import CUTS

_STYLE = """
:root{color-scheme:light dark;--line:#8885;--card:#8881;--good:#2a7d3f;--bad:#b3402a}
@media(prefers-color-scheme:dark){:root{--good:#6ec486;--bad:#ef8a73}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:68rem;margin:0 auto;padding:1rem}
h1{line-height:1.2}h2{margin-top:2.5rem;border-top:1px solid var(--line);padding-top:1.5rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:11rem}
tr.main td{font-weight:600}
.cards{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.5rem}
.three{display:grid;grid-template-columns:1fr 1fr 1fr;gap:.5rem}
video,img{width:100%;border-radius:.25rem}
figure{margin:0}figcaption,small,.note{font-size:.875rem;opacity:.8}
.plot{background:#fff;border-radius:.25rem}.plot svg{width:100%;height:auto;display:block}
.right{color:var(--good);font-weight:600}.wrong{color:var(--bad)}
"""


@dataclass(frozen=True)
class Example:
    """A record that is shown: its own sound and the one that was made."""

    title: str
    real: str
    """Data URI of the video."""
    made: str
    """The same picture with the made sound."""
    spectrograms: str
    """Data URI of a picture."""


@dataclass(frozen=True)
class Found:
    """What was found for the sound of a record."""

    title: str
    query: str
    """Data URI of the video whose sound was asked with."""
    rank: int
    """At which its own video came."""
    hits: list[tuple[str, str, bool]]
    """Title, data URI, and whether it is the query's own video."""


def page(
    report: Mapping[str, Any], plots: Mapping[str, str], examples: Sequence[Example], found: Sequence[Found]
) -> str:
    """The page's text.

    Args:
        report: All figures.
        plots: By run the curves, SVG.
        examples: To hear and see.
        found: Likewise.
    """
    data = report["data"]
    parts = [
        "<h1>The demo's report</h1>",
        "<p>Pretraining, alignment and classification on the <b>synthetic</b> world of vab: 16 kinds of sounding "
        "objects, one or two at a time among silent distractors, rendered to video files and treated as any video from "
        "there on. It shows what the chain does; it says nothing about real sound.</p>",
        f'<p class="note">Measured on {data["records"]} segments, which no run was trained on or chosen by: '
        f"{_text(data['folder'])}, shards {_hash(data['sha256'])}; vab {report['versions']['vab']}, torch "
        f"{report['versions']['torch']}; seed {report['seed']}. All figures: the .json file beside this page.</p>",
        "<h2>What was trained</h2>",
        _runs(report["runs"], plots),
        "<h2>Sound for silent video</h2>",
        _generation(report["generation"]),
        '<div class="cards">',
        *(_example(example) for example in examples),
        "</div>",
        "<h2>Finding</h2>",
        _retrieval(report["retrieval"]),
        '<div class="cards">',
        *(_found(one) for one in found),
        "</div>",
        "<h2>Classes</h2>",
        _classification(report["classification"]),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>vab: the demo's report</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _runs(runs: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    rows = []
    for name, facts in runs.items():
        whole = facts["max_steps"] in (None, facts["steps"])
        steps = f"{facts['steps']}" if whole else f"{facts['steps']} of {facts['max_steps']}"
        minutes = "" if facts["logged_seconds"] is None else f"{facts['logged_seconds'] / 60:.1f}"
        start = facts["init_from"] or "nothing"
        batch = "" if facts["batch_size"] is None else str(facts["batch_size"])
        parameters = f"{facts['parameters'] / 1e6:.2f} M"
        rows.append([name, facts["task"], parameters, steps, batch, start, minutes, _hash(facts["data_sha256"])])
    heading = ["run", "task", "parameters", "steps", "batch", "begun with", "minutes", "shards"]
    drawn = "".join(
        f'<figure class="card"><figcaption>{_text(name)}</figcaption><div class="plot">{svg}</div></figure>'
        for name, svg in plots.items()
    )
    note = "Minutes: from the first entry of the log to the last. Records with averaged weights where a run kept them."
    return _table(heading, rows) + f'<p class="note">{note}</p><div class="cards">{drawn}</div>'


def _generation(figures: Mapping[str, Any]) -> str:
    heading = ["", "loss", "agreement", "FAD", "KLD", "onset precision", "onset recall"]
    rows = []
    for name, words in SOUNDS.items():
        found = figures["sounds"][name]
        agreement = figures["agreement"].get(name)
        rows.append(
            [
                words,
                f"{figures['loss'][name]:.3f}" if name in figures["loss"] else "",
                "" if agreement is None else f"{agreement[0]:.3f} ± {agreement[1]:.3f}",
                *(_figure(found, figure) for figure in ("fad_tiny", "kld_tiny", "onset_precision", "onset_recall")),
            ]
        )
    note = (
        f"Loss: nats per hidden code over {figures['records']} segments. Agreement: share of the true classes among "
        f"the judge's top guesses, chance {figures['chance']:.3f}; FAD, KLD (nats) and onsets against the videos' own "
        f"sound; {figures['generated']} segments, judge {_text(figures['judge'])}, ± standard error. "
        f"{figures['seconds_per_segment']:.2f} s per segment to generate its codes."
    )
    return _table(heading, rows, main=list(SOUNDS).index("true")) + f'<p class="note">{note}</p>'


def _figure(found: Mapping[str, Any], name: str) -> str:
    if name not in found:
        return ""
    error = found[name]["error"]
    return f"{found[name]['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _retrieval(figures: Mapping[str, Any]) -> str:
    cuts = [cut for cut in CUTS if cut < figures["N"]]
    rows = []
    for name, words in (("aligned", "after alignment"), ("untrained", "the same network, untrained")):
        for way, direction in (("a2v", "sound to video"), ("v2a", "video to sound")):
            got = figures[name]
            two = got.get(f"recall_at_10_{way}_two_objects")
            rows.append(
                [
                    f"{words}, {direction}",
                    *(f"{100 * got[f'recall_at_{cut}_{way}']:.1f}" for cut in cuts),
                    "" if two is None else f"{100 * two:.1f}",
                    f"{got[f'median_rank_{way}']:g}",
                    f"{got[f'mrr_{way}']:.3f}",
                ]
            )
    expected = figures["chance"]
    rows.append(
        [
            "chance",
            *(f"{100 * expected[f'recall_at_{cut}']:.1f}" for cut in cuts),
            f"{100 * expected['recall_at_10']:.1f}",
            f"{expected['median_rank']:g}",
            f"{expected['mrr']:.3f}",
        ]
    )
    heading = ["", *(f"R@{cut}" for cut in cuts), "R@10, two objects", "median rank", "MRR"]
    note = (
        f"Among {figures['N']} segments, of which {figures['two_objects']} hold two sounding objects; recall in %, "
        "ties count against. Below: the videos nearest to a sound, for evenly spaced segments, not chosen by what came "
        "of them."
    )
    return _table(heading, rows, main=0) + f'<p class="note">{note}</p>'


def _classification(figures: Mapping[str, Any]) -> str:
    inputs = figures["inputs"]
    share = sum(figures["records_per_class"]) / len(figures["labels"]) / figures["N"]
    rows = [
        [
            name.replace("_", " and "),
            f"{got['map']:.3f}",
            f"{got['map_shuffled']:.3f}",
            f"{100 * got['top_1']:.1f}" if "top_1" in got else "",
        ]
        for name, got in inputs.items()
    ]
    rows.append(["a guess", f"{share:.3f}", "", f"{100 / len(figures['labels']):.1f}"])
    by_class = [
        [label, str(count), *("" if (v := got["per_class"][n]) is None else f"{v:.3f}" for got in inputs.values())]
        for n, (label, count) in enumerate(zip(figures["labels"], figures["records_per_class"], strict=True))
    ]
    note = (
        f"Mean average precision over {len(figures['labels'])} classes and {figures['N']} segments; the control gives "
        f"each segment another one's classes; top 1, in %, over the {figures['single']} segments with one class."
    )
    detail = _table(["class", "segments", *(name.replace("_", " and ") for name in inputs)], by_class)
    return (
        _table(["looks at", "mAP", "mAP, shuffled", "top 1"], rows)
        + f'<p class="note">{note}</p><details><summary>Average precision of each class</summary>{detail}</details>'
    )


def _example(example: Example) -> str:
    return (
        f'<div class="card"><b>{_text(example.title)}</b><div class="pair">'
        f"<figure>{_video(example.real)}<figcaption>its own sound</figcaption></figure>"
        f"<figure>{_video(example.made)}<figcaption>generated</figcaption></figure></div>"
        f'<img alt="spectrograms of {_text(example.title)}" src="{example.spectrograms}"></div>'
    )


def _found(found: Found) -> str:
    hits = "".join(
        f'<figure>{_video(uri)}<figcaption class="{"right" if right else "wrong"}">{number}. {_text(title)}'
        f"{': right' if right else ''}</figcaption></figure>"
        for number, (title, uri, right) in enumerate(found.hits, start=1)
    )
    return (
        f'<div class="card"><b>By the sound of {_text(found.title)}</b><figure>{_video(found.query)}'
        f"<figcaption>the query: only its sound was given; its own video came at rank {found.rank}</figcaption>"
        "</figure>"
        f'<div class="three">{hits}</div></div>'
    )


def _video(uri: str) -> str:
    return f'<video controls preload="metadata" playsinline src="{uri}"></video>'


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], main: int | None = None) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heading)
    body = "".join(
        f"<tr{' class=main' if number == main else ''}>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(words: str) -> str:
    return html.escape(words)


def _hash(digest: str | None) -> str:
    return "" if digest is None else digest[:12]
