"""The commands as functions: what ``vab generate`` and its kin do, from Python or from the command line."""

from vab.commands.classify import classify
from vab.commands.compare import compare
from vab.commands.evaluate import evaluate
from vab.commands.extract import extract
from vab.commands.generate import generate
from vab.commands.generation import Generator, Sound
from vab.commands.listen import listen
from vab.commands.preparing import Prepared, Request, window_starts
from vab.commands.recall import recall
from vab.commands.retrieve import retrieve
from vab.commands.shards import index_shards, show_shards, verify_shards
from vab.commands.sweep import sweep

__all__ = [
    "Generator",
    "Prepared",
    "Request",
    "Sound",
    "classify",
    "compare",
    "evaluate",
    "extract",
    "generate",
    "index_shards",
    "listen",
    "recall",
    "retrieve",
    "show_shards",
    "sweep",
    "verify_shards",
    "window_starts",
]
