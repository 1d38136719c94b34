"""What was found about one part of an installation, and how that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

State = Literal["ok", "absent", "broken", "forbidden"]
_STYLES: dict[State, str] = {"ok": "green", "absent": "dim", "broken": "red", "forbidden": "bold white on red"}


@dataclass(frozen=True)
class Finding:
    """One part: whether it works, in words, and what to type where it does not."""

    name: str
    state: State
    detail: str = ""
    """Version and what it was seen to do, or why it does not work, or what it would enable."""
    remedy: str = ""
    """What to type; empty where there is nothing to do."""
    needed: bool = False
    """Whether vab cannot do without it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For bug reports, in plain JSON."""

    @property
    def fails(self) -> bool:
        """Whether vab does not work because of it."""
        return self.state == "forbidden" or (self.needed and self.state != "ok")

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        return {
            "name": self.name, "state": self.state, "needed": self.needed, "detail": self.detail,
            "remedy": self.remedy or None, **self.facts,
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Finding:
        """What `to_json` gave; name, state and detail suffice."""
        own = {name: values[name] for name in ("name", "state", "detail", "needed") if name in values}
        facts = {name: value for name, value in values.items() if name not in own and name != "remedy"}
        return cls(**own, remedy=values.get("remedy") or "", facts=facts)


@dataclass(frozen=True)
class Report:
    """All findings, by section."""

    sections: dict[str, list[Finding]]

    @property
    def failures(self) -> list[Finding]:
        """What vab does not work because of."""
        return [finding for findings in self.sections.values() for finding in findings if finding.fails]

    @property
    def exit_status(self) -> int:
        """0, or 2 if something that is needed is broken or forbidden."""
        return 2 if self.failures else 0

    def to_json(self) -> dict[str, Any]:
        """As a JSON value."""
        sections = {name: [finding.to_json() for finding in some] for name, some in self.sections.items()}
        return {"exit_status": self.exit_status, "verdict": self.verdict, **sections}

    @property
    def verdict(self) -> str:
        """The last line: what it comes to."""
        if not self.failures:
            return "all that is needed works (exit status 0)"
        names = ", ".join(f"{finding.name} is {finding.state}" for finding in self.failures)
        return f"{names} (exit status 2)"


def show(console: Console, report: Report) -> None:
    """Print a report: section by section, and what it comes to."""
    for name, findings in report.sections.items():
        console.print(Text(name, style="bold"))
        show_findings(console, findings)
    console.print(Text(report.verdict, style="bold red" if report.exit_status else "bold green"), soft_wrap=True)


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Print findings, one a line, and below a line what to type; a terminal wraps what is too long for it."""
    width = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        line = Text("  ")
        line.append(f"{finding.state:<10}", style=_STYLES[finding.state])
        line.append(f"{finding.name:<{width}}  {finding.detail}")
        line.rstrip()
        console.print(line, soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{'':<{width + 14}}-> {finding.remedy}"), soft_wrap=True)
