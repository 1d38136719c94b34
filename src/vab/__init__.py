"""Audio-visual learning on audio tokens: pretrain one masked-token transformer, then generate, retrieve, classify."""

__version__ = "0.1.0"


class UserError(ValueError):
    """A mistake of the user's: the command line prints the message alone and exits with status 2.

    The message says what was got, what was expected and, where it helps, what to type. It is here, where nothing is
    imported, since ``vab doctor`` must run where torch does not; the rest of vab takes it from ``vab.spec``.
    """
