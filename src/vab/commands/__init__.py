"""The commands as functions: what ``vab generate`` and its kin do, from Python or from the command line.

Each is in the module of its name, as in ``from vab.commands.generate import generate``. Nothing is imported here: what
one command needs would make all others slow to start.
"""
