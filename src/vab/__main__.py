"""``python -m vab`` is ``vab``."""

from vab.cli import main

if __name__ == "__main__":  # not again in the processes that it starts
    main()
