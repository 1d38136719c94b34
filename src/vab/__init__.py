"""Audio-visual learning on audio tokens: pretrain one masked-token transformer, then generate, retrieve, classify."""

__version__ = "0.1.0"
