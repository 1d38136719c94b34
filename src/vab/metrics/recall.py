"""Retrieval: whether a segment's sound finds its video among all videos, and its video its sound.

By recording, any segment of the query's recording is a match: segments of one recording are often nearly equal, and
training does not use them as negatives of each other. With one segment of each recording this is the usual recall.

Similarity is the cosine. Ties count against: an item is right at rank r only if it is strictly more similar than all
but r others, so embeddings that are all equal have recall 0, not 1. (An expected rank would not be a whole number, and
would give a collapsed network the recall of chance.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vab.metrics.records import RecordRows

TIE = 1e-12
"""Cosines closer than this are equal. In float64 the same two vectors give results about 1e-16 apart, depending on
their place in a matrix; that must not break a tie. Float32 embeddings that differ at all differ by more."""
CUTS = (1, 5, 10)
"""Recall is reported at these ranks."""


def match_ranks(queries: Tensor, gallery: Tensor, chunk: int = 1024, groups: Tensor | None = None) -> Tensor:
    """The rank of each query's own item in the gallery, sorted by cosine similarity.

    The rank is the number of wrong items that are at least as similar as the right one: ties count against. With
    ``groups`` all items of the query's group are right, and the most similar of them counts, as for pictures with
    several captions each (Karpathy and Fei-Fei 2015): a rank below k says that one of them is among the first k. With
    one item in each group the ranks are those without ``groups``.

    Cosines may be negative. Only ``chunk`` rows of the N x N table of similarities are held at once; the arithmetic is
    float64, so ranks depend neither on ``chunk`` nor on the device.

    Args:
        queries: (N, E) float. Of any length above 0.
        gallery: (N, E) float. Row i is the right item of query i.
        chunk: Queries at once, 1 or more.
        groups: (N,) int64. The recording of each item. None: each item is a recording of its own.

    Returns:
        (N,) int64 in [0, N); 0 = first.

    Raises:
        ValueError: If the shapes differ, there is no row, a number is not finite, or a vector is 0, which has no
            direction.
    """
    if queries.ndim != 2 or queries.shape != gallery.shape or 0 in queries.shape:
        shapes = f"{tuple(queries.shape)} and {tuple(gallery.shape)}"
        raise ValueError(f"match_ranks takes queries and gallery of one shape (N, E), got {shapes}")
    if groups is not None and groups.shape != queries.shape[:1]:
        raise ValueError(f"match_ranks: groups are (N,), one for each of {len(queries)}, got {tuple(groups.shape)}")
    if chunk < 1:
        raise ValueError(f"match_ranks: chunk must be 1 or more, got {chunk}")
    groups = _unless_all_differ(groups)
    queries, gallery = _directions(queries, "queries"), _directions(gallery, "gallery")
    ranks = []
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk]
        scores = part @ gallery.T  # (chunk, N)
        if groups is None:
            right = scores.diagonal(start)[: len(part), None]  # (chunk, 1)
            ranks.append((scores >= right - TIE).sum(1) - 1)  # less the right item itself
        else:
            own = groups[start : start + chunk, None] == groups  # (chunk, N)
            right = scores.masked_fill(~own, -math.inf).amax(1, keepdim=True)
            ranks.append(((scores >= right - TIE) & ~own).sum(1))
    return torch.cat(ranks)


def _unless_all_differ(groups: Tensor | None) -> Tensor | None:
    """None if each item is a group of its own, which needs no comparison of groups."""
    return None if groups is None or len(groups.unique()) == len(groups) else groups


def _directions(embeddings: Tensor, name: str) -> Tensor:
    """Unit vectors in float64."""
    embeddings = embeddings.double()
    if not bool(torch.isfinite(embeddings).all()):
        raise ValueError(f"match_ranks: the {name} have numbers that are not finite")
    # First by the largest magnitude: squares of very small or large numbers would leave float64's range.
    largest = embeddings.abs().amax(1, keepdim=True)
    if not bool((largest > 0).all()):
        raise ValueError(f"match_ranks: the {name} have a vector of zeros, which has no direction")
    embeddings = embeddings / largest
    return embeddings / embeddings.norm(dim=1, keepdim=True)


def retrieval_table(ranks_a2v: Tensor, ranks_v2a: Tensor) -> dict[str, Tensor]:
    """Recall, median rank and mean reciprocal rank, both ways.

    Args:
        ranks_a2v: (N,) int64 from ``match_ranks``, queries are audio.
        ranks_v2a: (N,) int64, queries are video.

    Returns:
        Scalars in float64: ``recall_at_1_a2v``, ``recall_at_5_a2v``, ``recall_at_10_a2v`` (shares of 1),
        ``median_rank_a2v`` (1 = first; for even N the mean of the two in the middle), ``mrr_a2v``, and the same
        ``_v2a``. All depend on N: compare them for galleries of one size only.

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


def chance_table(groups: Tensor) -> dict[str, float]:
    """The expected ``retrieval_table`` of a gallery in random order; the same both ways.

    Args:
        groups: (N,) int64, N >= 1. As for ``match_ranks``; all different for recall by segment.

    Returns:
        ``recall_at_1``, ``recall_at_5``, ``recall_at_10``, ``median_rank`` and ``mrr``. With one item in each group
        they are k / N, (N + 1) / 2 and the mean of 1 / n over n = 1..N; with m items they are those of the best of m
        places drawn without replacement.
    """
    count = len(groups)
    sizes = groups.unique(return_inverse=True, return_counts=True)[1:]
    own, queries = sizes[1][sizes[0]].unique(return_counts=True)  # items of a query's group, queries with so many
    place = torch.arange(count, dtype=torch.float64)
    missed = torch.zeros(count, dtype=torch.float64)  # share of queries that find nothing in the first 1..N places
    for size, number in zip(own.tolist(), queries.tolist(), strict=True):
        missed += number / count * ((count - size - place).clamp(min=0) / (count - place)).cumprod(0)
    found = 1 - missed
    median = (torch.searchsorted(found, 0.5 - 1e-9) + torch.searchsorted(found, 0.5 + 1e-9, right=True)) / 2 + 1
    each = found - torch.cat([found.new_zeros(1), found[:-1]])  # share of queries that are right at each place
    table = {f"recall_at_{cut}": float(found[min(cut, count) - 1]) for cut in CUTS}
    return table | {"median_rank": float(median), "mrr": float((each / (place + 1)).sum())}


def matching_loss(
    audio: Tensor, video: Tensor, scale: float, chunk: int = 1024, groups: Tensor | None = None
) -> Tensor:
    """InfoNCE over a whole data set, both ways: the loss of contrastive training, with all records as negatives.

    Args:
        audio: (N, E) float.
        video: (N, E) float. Row i belongs with sound i.
        scale: What cosines are multiplied by, the inverse of the temperature.
        chunk: Queries at once, 1 or more.
        groups: (N,) int64. The recording of each record; others of the same one are no negatives, as in training. None:
            each is a recording of its own.

    Returns:
        Scalar float64, nats: the mean over records and both ways; log(N) for equal scores.
    """
    groups = _unless_all_differ(groups)
    sides = (_directions(audio, "sounds"), _directions(video, "videos"))
    total = torch.zeros((), dtype=torch.float64, device=audio.device)
    for queries, choices in (sides, sides[::-1]):
        for start in range(0, len(queries), chunk):
            scores = scale * (queries[start : start + chunk] @ choices.T)  # (chunk, N)
            if groups is not None:
                others = groups[start : start + chunk, None] == groups
                others.diagonal(start).fill_(False)
                scores = scores.masked_fill(others, -math.inf)
            total += (scores.logsumexp(1) - scores.diagonal(start)[: len(scores)]).sum()
    return total / (2 * len(audio))


class Retrieval(RecordRows):
    """``retrieval_table`` over a whole data set, every record against every other, on any number of ranks.

    The gallery is the data set, so embeddings are kept: float32, 2 * N * E * 4 bytes. A mean of recalls over batches or
    ranks would be that of small galleries: another, higher number.

    Recall is by recording where ``update`` is given the recordings, else by record.
    """

    columns = ("audio", "video", "source")

    def __init__(self) -> None:
        super().__init__()
        self.scale: float | None = None
        """What cosines are multiplied by for a loss."""

    def update(
        self, audio_embedding: Tensor, video_embedding: Tensor, index: Tensor, source: Tensor | None = None
    ) -> None:
        """Keep a batch.

        Args:
            audio_embedding: (B, E) float.
            video_embedding: (B, E) float, row by row of the same records.
            index: (B,) int64. Numbers of the records.
            source: (B,) int64. The recording of each record. None: each is a recording of its own, in all updates.

        Raises:
            ValueError: If the shapes do not fit.
        """
        shape = tuple(audio_embedding.shape)
        source = index if source is None else source
        if len(shape) != 2 or shape != tuple(video_embedding.shape) or not index.shape == source.shape == shape[:1]:
            shapes = f"{shape}, {tuple(video_embedding.shape)}, {tuple(index.shape)} and {tuple(source.shape)}"
            raise ValueError(
                f"Retrieval takes embeddings (B, E) of both sides, record numbers and recordings (B,), got {shapes}"
            )
        self.keep(index, audio=audio_embedding.float(), video=video_embedding.float(), source=source)

    def compute(self) -> dict[str, Tensor]:
        """The table, and ``loss`` (see ``matching_loss``) where ``scale`` was set.

        Raises:
            ValueError: If there is no record, or an embedding is not finite or 0.
        """
        _, audio, video, groups = self.rows()
        table = retrieval_table(match_ranks(audio, video, groups=groups), match_ranks(video, audio, groups=groups))
        if self.scale is None:
            return table
        return table | {"loss": matching_loss(audio, video, self.scale, groups=groups)}
