import itertools
import json
import os

import pytest
import torch
from torchmetrics.retrieval import RetrievalRecall

from ranks import in_ranks
from vab.metrics.classification import Classification
from vab.metrics.recall import Retrieval, chance_table, match_ranks, matching_loss, retrieval_table
from vab.metrics.synchrony import Synchrony


def naive(queries, gallery):
    """The full matrix, item by item."""
    ranks = []
    for i, query in enumerate(queries.double()):
        scores = [float(torch.cosine_similarity(query, item, dim=0)) for item in gallery.double()]
        ranks.append(sum(score >= scores[i] for j, score in enumerate(scores) if j != i))
    return ranks


def pairs(count=40, width=6, noise=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randn(count, width, generator=generator)
    return audio, audio + noise * torch.randn(count, width, generator=generator)


def test_equal_sides_are_all_first():
    audio, _ = pairs()
    assert match_ranks(audio, audio).tolist() == [0] * 40


def test_opposite_sides_are_all_last():
    audio, _ = pairs()
    assert match_ranks(audio, -audio).tolist() == [39] * 40


@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_the_full_matrix_on_any_chunk(seed):
    audio, video = pairs(seed=seed)
    expected = naive(audio, video)
    assert expected != [0] * 40
    for chunk in (1, 7, 40, 1024):
        assert match_ranks(audio, video, chunk).tolist() == expected


def test_length_does_not_matter():
    audio, video = pairs()
    scale = torch.logspace(-30, 30, 40)[:, None].double()
    assert match_ranks(audio * scale, video / scale).tolist() == match_ranks(audio, video).tolist()


@pytest.mark.parametrize("width", [1, 3, 64, 513])
def test_a_collapsed_network_finds_nothing(width):
    same = torch.randn(width).expand(50, width)
    assert match_ranks(same, same, chunk=7).tolist() == [49] * 50
    table = retrieval_table(match_ranks(same, same), match_ranks(same, same))
    assert float(table["recall_at_10_a2v"]) == 0


def test_one_tie_costs_one_rank():
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert match_ranks(gallery, gallery).tolist() == [1, 1, 0]


def test_negative_cosines_are_right_where_torchmetrics_is_not():
    # Query 0 is most like item 0, though all cosines are below 0.
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    gallery = torch.tensor([[-0.1, -1.0], [-1.0, -0.1]])
    assert match_ranks(queries, gallery).tolist() == [0, 0]
    scores = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(gallery).T
    theirs = RetrievalRecall(top_k=1)(scores.flatten(), torch.eye(2).bool().flatten(), torch.tensor([0, 0, 1, 1]))
    assert float(theirs) == 0


@pytest.mark.parametrize(
    ("audio", "video", "words"),
    [
        (torch.tensor([[float("nan")]]), torch.ones(1, 1), "not finite"),
        (torch.ones(1, 1), torch.tensor([[float("inf")]]), "not finite"),
        (torch.zeros(1, 2), torch.ones(1, 2), "no direction"),
        (torch.ones(2, 2), torch.ones(3, 2), "one shape"),
        (torch.ones(0, 2), torch.ones(0, 2), "one shape"),
    ],
)
def test_what_has_no_rank_is_refused(audio, video, words):
    with pytest.raises(ValueError, match=words):
        match_ranks(audio, video)


def test_the_table_by_hand():
    table = retrieval_table(torch.tensor([0, 1, 4, 9]), torch.tensor([0, 0, 20]))
    assert {name: float(value) for name, value in table.items()} == pytest.approx(
        {
            "recall_at_1_a2v": 0.25,
            "recall_at_5_a2v": 0.75,
            "recall_at_10_a2v": 1.0,
            "median_rank_a2v": 3.5,
            "mrr_a2v": (1 + 1 / 2 + 1 / 5 + 1 / 10) / 4,
            "recall_at_1_v2a": 2 / 3,
            "recall_at_5_v2a": 2 / 3,
            "recall_at_10_v2a": 2 / 3,
            "median_rank_v2a": 1.0,
            "mrr_v2a": (1 + 1 + 1 / 21) / 3,
        },
        abs=1e-15,
    )
    with pytest.raises(ValueError, match="at least one query"):
        retrieval_table(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def test_audio_asks_for_video():
    # Both sounds are like video 0, so sound 1 is second; each video is most like its own sound.
    audio = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    video = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    metric = Retrieval()
    metric.update(audio, video, torch.arange(2))
    table = metric.compute()
    assert float(table["recall_at_1_a2v"]) == 0.5
    assert float(table["recall_at_1_v2a"]) == 1.0


def test_batches_order_and_repetition_do_not_matter():
    audio, video = pairs()
    whole, parts = Retrieval(), Retrieval()
    whole.update(audio, video, torch.arange(40))
    order = torch.randperm(40)
    for rows in (*order.split(7), order[:5]):
        parts.update(audio[rows], video[rows], rows)
    assert whole.compute() == parts.compute()
    assert whole.compute() == retrieval_table(match_ranks(audio, video), match_ranks(video, audio))


def by_loops(queries, gallery, groups):
    """Ranks by recording, from the definition."""
    unit = torch.nn.functional.normalize
    scores = (unit(queries.double(), dim=1) @ unit(gallery.double(), dim=1).T).tolist()
    ranks = []
    for row, own in zip(scores, groups, strict=True):
        best = max(score for score, group in zip(row, groups, strict=True) if group == own)
        ranks.append(sum(score >= best - 1e-12 for score, group in zip(row, groups, strict=True) if group != own))
    return ranks


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_ranks_by_recording_are_those_of_the_best_segment(chunk):
    audio, video = pairs(30)
    video[3] = video[17]  # a tie between recordings
    groups = torch.randint(0, 9, (30,))
    assert match_ranks(audio, video, chunk, groups).tolist() == by_loops(audio, video, groups.tolist())
    alone = torch.randperm(30)
    assert match_ranks(audio, video, chunk, alone).tolist() == match_ranks(audio, video, chunk).tolist()
    assert match_ranks(audio, video, chunk, torch.zeros(30)).tolist() == [0] * 30
    with pytest.raises(ValueError, match=r"groups are \(N,\)"):
        match_ranks(audio, video, chunk, groups[1:])


def test_other_segments_of_a_recording_are_not_wrong():
    """100 recordings of 4 segments that are nearly equal, each with its own noise on both sides."""
    centres = torch.randn(100, 32).repeat_interleave(4, 0)
    audio, video = (centres + 0.05 * torch.randn(400, 32) for _ in range(2))
    source = torch.arange(100).repeat_interleave(4)
    by_segment, by_recording = Retrieval(), Retrieval()
    by_segment.update(audio, video, torch.arange(400))
    for rows in torch.randperm(400).split(90):
        by_recording.update(audio[rows], video[rows], rows, source[rows])
    assert float(by_segment.compute()["recall_at_1_a2v"]) < 0.5
    assert float(by_recording.compute()["recall_at_1_a2v"]) == float(by_recording.compute()["recall_at_1_v2a"]) == 1


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 2, 3], [0, 0, 0, 0, 1, 2], [5, 5, 5]])
def test_chance_is_the_mean_over_all_orders(groups):
    count, ranks = len(groups), []
    for order in itertools.permutations(range(count)):
        ranks += [min(order[item] for item in range(count) if groups[item] == own) for own in groups]
    table = retrieval_table(torch.tensor(ranks), torch.tensor(ranks))
    got = chance_table(torch.tensor(groups))
    assert got == pytest.approx({name: float(table[f"{name}_a2v"]) for name in got}, rel=1e-12)


def test_chance_of_single_segments():
    got = chance_table(torch.randperm(1545))
    assert got == pytest.approx(
        {f"recall_at_{k}": k / 1545 for k in (1, 5, 10)}
        | {"median_rank": 773, "mrr": sum(1 / rank for rank in range(1, 1546)) / 1545},
        rel=1e-9,
    )


def test_the_loss_takes_no_segment_of_the_same_recording_as_wrong():
    audio, video = pairs(9)
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 3, 4, 5])
    unit = torch.nn.functional.normalize
    scores = 3 * unit(audio.double(), dim=1) @ unit(video.double(), dim=1).T
    same = (groups[:, None] == groups) & ~torch.eye(9, dtype=torch.bool)
    scores = scores.masked_fill(same, -torch.inf)
    target = torch.arange(9)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(scores, target) + cross_entropy(scores.T, target)) / 2
    for chunk in (1, 4, 99):
        assert float(matching_loss(audio, video, 3.0, chunk, groups)) == pytest.approx(float(expected), rel=1e-9)


def test_nothing_is_an_error():
    metric = Retrieval()
    with pytest.raises(ValueError, match="nothing to report"), pytest.warns(UserWarning, match="before"):
        metric.compute()
    metric.update(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="nothing to report"):
        metric.compute()


def measure(folder):
    """On one of two ranks: the metrics of its shares."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data = torch.load(f"{folder}/data.pt", weights_only=True)
    retrieval, classification, synchrony = Retrieval(), Classification(3), Synchrony()
    for rows in data["shares"][rank]:
        retrieval.update(data["audio"][rows], data["video"][rows], rows)
        classification.update(data["scores"][rows], data["labels"][rows], rows)
        synchrony.update(
            [
                (data["true"][row], data["generated"][row])
                for row in dict.fromkeys(rows.tolist())
                if rank == 0 or row != data["repeated"]
            ]
        )
    tables = [metric.compute() for metric in (retrieval, classification, synchrony)]
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump([{name: value.tolist() for name, value in table.items()} for table in tables], file)


@pytest.mark.ddp
def test_two_ranks_are_one(tmp_path):
    audio, video = pairs(21)
    labels = torch.arange(21) % 3
    data = {
        "audio": audio,
        "video": video,
        "scores": torch.randn(21, 3),
        "labels": labels,
        "true": torch.rand(21, 4),
        "generated": torch.rand(21, 3),
        "repeated": 20,
        # Rank 1 has the last record of rank 0 once more, and a batch of nothing.
        "shares": [[torch.arange(0, 8), torch.tensor([20, 8])], [torch.arange(9, 21), torch.arange(0)]],
    }
    torch.save(data, tmp_path / "data.pt")
    in_ranks(2, measure, tmp_path)
    two = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    retrieval, classification, synchrony = Retrieval(), Classification(3), Synchrony()
    retrieval.update(audio, video, torch.arange(21))
    classification.update(data["scores"], labels, torch.arange(21))
    synchrony.update(list(zip(data["true"], data["generated"], strict=True)))
    for metric, *found in zip((retrieval, classification, synchrony), *two, strict=True):
        one = {name: value.tolist() for name, value in metric.compute().items()}
        assert found[0] == found[1]
        assert found[0].keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(torch.tensor(found[0][name]), torch.tensor(value), rtol=1e-12, atol=1e-12)
