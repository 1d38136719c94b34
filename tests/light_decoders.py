"""What decoding processes of tests do with a file; a module that is imported in no time."""

import itertools
import time


class Slow:
    """Gives each file's name, the first of four files late; notes which were begun."""

    def __init__(self, folder):
        self.folder = folder

    def decode(self, path, start):
        (self.folder / path.name).touch()
        if int(path.name) % 4 == 0:
            time.sleep(0.2)
        yield path.name


class Failing:
    """Raises what nobody foresaw for one file."""

    def decode(self, path, start):
        if path.name == "1":
            raise ZeroDivisionError("a bug\nof ours")
        yield path.name


class Endless:
    """Gives items of a file without end."""

    def decode(self, path, start):
        yield from itertools.count()
