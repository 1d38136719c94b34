"""What decoding processes of tests do with a file; a module that is imported in no time."""

import itertools
import os
import signal
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


class KilledAtFirst:
    """Its first processes are killed as they begin, as the system does where memory is short.

    Args:
        folder: Where each of them leaves a mark.
        times: How many.
    """

    def __init__(self, folder, times):
        self.folder, self.times = folder, times

    def __setstate__(self, state):
        self.__dict__.update(state)
        if (seen := len(list(self.folder.iterdir()))) < self.times:
            (self.folder / str(seen)).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def decode(self, path, start):
        yield str(path)


class TooLarge:
    """Gives an item that cannot be sent."""

    def decode(self, path, start):
        yield "begun"
        yield (item for item in path.name)
