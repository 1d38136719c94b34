"""Retrieval: whether a segment's sound finds its video among all videos, and its video its sound.

Similarity is the cosine. Ties count against: an item is right at rank r only if it is strictly more alike than all but
r others, so embeddings that are all equal have recall 0, not 1. (An expected rank would be as honest on average, but
no whole number, and would still give a collapsed network a share of luck.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from vab.metrics.records import each_once, joined

TIE = 1e-12
"""Cosines closer than this are equal. In float64 the same two vectors give results some 1e-16 apart, depending on
where in a matrix they stand; that must not break a tie. Float32 embeddings that differ at all differ by more."""
CUTS = (1, 5, 10)
"""Recall is told at these ranks."""


def match_ranks(queries: Tensor, gallery: Tensor, chunk: int = 1024) -> Tensor:
    """At which place each query finds its own item, if the gallery is sorted by cosine similarity.

    The rank is the number of other items that are at least as similar as the right one: ties count against. Negative
    cosines are as good as any. The table of N x N similarities is never held, only ``chunk`` rows of it; the
    arithmetic is float64, so ranks depend neither on ``chunk`` nor on the device.

    Args:
        queries: (N, E) float. Of any length above 0.
        gallery: (N, E) float. Row i is the right item of query i.
        chunk: Queries at once, 1 or more.

    Returns:
        (N,) int64 in [0, N); 0 = first.

    Raises:
        ValueError: If the shapes differ, there is no row, a number is not finite, or a vector is 0, which has no
            direction.
    """
    if queries.ndim != 2 or queries.shape != gallery.shape or 0 in queries.shape:
        shapes = f"{tuple(queries.shape)} and {tuple(gallery.shape)}"
        raise ValueError(f"match_ranks takes queries and gallery of one shape (N, E), got {shapes}")
    if chunk < 1:
        raise ValueError(f"match_ranks: chunk must be 1 or more, got {chunk}")
    queries, gallery = _directions(queries, "queries"), _directions(gallery, "gallery")
    ranks = []
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        scores = part @ gallery.T  # (chunk, N)
        right = scores.diagonal(start)[: len(part), None]  # (chunk, 1)
        ranks.append((scores >= right - TIE).sum(1) - 1)  # less the right item itself
    return torch.cat(ranks)


def _directions(embeddings: Tensor, name: str) -> Tensor:
    """Unit vectors in float64."""
    embeddings = embeddings.double()
    if not bool(torch.isfinite(embeddings).all()):
        raise ValueError(f"match_ranks: the {name} have numbers that are not finite")
    # By the largest magnitude first: squares of very small or large numbers would leave float64's range.
    largest = embeddings.abs().amax(1, keepdim=True)
    if not bool((largest > 0).all()):
        raise ValueError(f"match_ranks: the {name} have a vector of zeros, which has no direction")
    embeddings = embeddings / largest
    return embeddings / embeddings.norm(dim=1, keepdim=True)


def retrieval_table(ranks_a2v: Tensor, ranks_v2a: Tensor) -> dict[str, Tensor]:
    """Recall, median rank and mean reciprocal rank, both ways.

    Args:
        ranks_a2v: (N,) int64 from ``match_ranks``, audio asking for video.
        ranks_v2a: (N,) int64, video asking for audio.

    Returns:
        Scalars in float64: ``recall_at_1_a2v``, ``recall_at_5_a2v``, ``recall_at_10_a2v`` (shares of 1),
        ``median_rank_a2v`` (1 = first; for even N the mean of the two in the middle), ``mrr_a2v``, and the same
        ``_v2a``. All depend on N: figures compare for galleries of one size only.

    Raises:
        ValueError: If there is no rank.
    """
    table: dict[str, Tensor] = {}
    for way, ranks in (("a2v", ranks_a2v), ("v2a", ranks_v2a)):
        if ranks.ndim != 1 or not len(ranks):
            raise ValueError(f"retrieval_table takes ranks (N,) of at least one query, got {tuple(ranks.shape)}")
        places = ranks.double().sort().values + 1  # 1 = first
        for cut in CUTS:
            table[f"recall_at_{cut}_{way}"] = (places <= cut).double().mean()
        table[f"median_rank_{way}"] = (places[(len(places) - 1) // 2] + places[len(places) // 2]) / 2
        table[f"mrr_{way}"] = places.reciprocal().mean()
    return table


def matching_loss(audio: Tensor, video: Tensor, scale: float, chunk: int = 1024) -> Tensor:
    """InfoNCE with a whole data set as the choice, both ways: what a contrastive model is trained for, at full size.

    Args:
        audio: (N, E) float.
        video: (N, E) float. Row i belongs with sound i.
        scale: What cosines are multiplied by, the inverse of the temperature.
        chunk: Queries at once, 1 or more.

    Returns:
        Scalar float64, nats: the mean over records and both ways. log(N) is the score of guessing evenly.
    """
    sides = (_directions(audio, "sounds"), _directions(video, "videos"))
    total = torch.zeros((), dtype=torch.float64, device=audio.device)
    for queries, choices in (sides, sides[::-1]):
        for start in range(0, len(queries), chunk):
            scores = scale * (queries[start : start + chunk] @ choices.T)  # (chunk, N)
            total += (scores.logsumexp(1) - scores.diagonal(start)[: len(scores)]).sum()
    return total / (2 * len(audio))


class Retrieval(Metric):
    """``retrieval_table`` over a whole data set, every record against every other, on any number of ranks.

    The gallery is the data set, so embeddings are kept (float32, 2 * N * E * 4 bytes) and gathered with their record
    numbers; a record that several ranks had counts once. A mean of recalls over batches or ranks would be that of
    small galleries: another, higher number. Where one rank has nothing to add, give it an update with (0, E) tensors.
    """

    full_state_update = False
    audio: list[Tensor]
    video: list[Tensor]
    index: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.scale: float | None = None
        """What cosines are multiplied by for a loss."""
        for name in ("audio", "video", "index"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, audio_embedding: Tensor, video_embedding: Tensor, index: Tensor) -> None:
        """Keep a batch.

        Args:
            audio_embedding: (B, E) float.
            video_embedding: (B, E) float, row by row of the same records.
            index: (B,) int64. Numbers of the records.

        Raises:
            ValueError: If the shapes do not fit.
        """
        shape = tuple(audio_embedding.shape)
        if len(shape) != 2 or shape != tuple(video_embedding.shape) or tuple(index.shape) != shape[:1]:
            shapes = f"{shape}, {tuple(video_embedding.shape)} and {tuple(index.shape)}"
            raise ValueError(f"Retrieval takes embeddings (B, E) of both sides and record numbers (B,), got {shapes}")
        self.audio.append(audio_embedding.detach().float())
        self.video.append(video_embedding.detach().float())
        self.index.append(index)

    def compute(self) -> dict[str, Tensor]:
        """The table, and ``loss`` (see ``matching_loss``) where ``scale`` was set.

        Raises:
            ValueError: If there is no record, or an embedding is not finite or 0.
        """
        audio, video, index = (joined(state) for state in (self.audio, self.video, self.index))
        if not len(index):
            raise ValueError("no record was embedded: there is nothing to retrieve")
        audio, video = each_once(index, audio, video)
        table = retrieval_table(match_ranks(audio, video), match_ranks(video, audio))
        return table if self.scale is None else table | {"loss": matching_loss(audio, video, self.scale)}
