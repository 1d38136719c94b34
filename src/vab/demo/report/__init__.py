"""The demo's report: metrics of its runs on unseen segments, in one page."""

from vab.demo.report.report import report

__all__ = ["report"]
