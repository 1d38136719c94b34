"""Audio-visual learning on audio tokens: pretrain one masked-token transformer, then generate, retrieve, classify."""

import os

__version__ = "0.1.0"


class UserError(ValueError):
    """A mistake of the user's: the command line prints the message alone and exits with status 2.

    The message says what was got, what was expected and, where it helps, what to type. It is here, where nothing is
    imported, since ``vab doctor`` and decoding processes run without torch; ``vab.spec`` exports it, too.
    """


def _name_user() -> None:
    """Give a user without an entry in passwd (docker --user 12345, OpenShift) a name and, where none is set, a home.

    torch asks for both while it is imported, and would fail. They hold for processes that this one starts, too.
    """
    if not hasattr(os, "getuid"):  # another system than Unix, which has no passwd
        return
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("LOGNAME", f"uid_{os.getuid()}")
        if not os.environ.get("HOME"):
            import tempfile

            os.environ["HOME"] = os.path.join(tempfile.gettempdir(), os.environ["LOGNAME"])


_name_user()
