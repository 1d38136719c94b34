"""The demo's report: what its runs have learned, measured on segments that no one has seen, in one page."""

from vab.demo.report.report import report

__all__ = ["report"]
