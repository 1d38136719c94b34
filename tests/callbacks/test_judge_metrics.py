import pytest
import torch

from vab.callbacks.judge_metrics import JudgedRecords, JudgeMetrics, empty_outputs
from vab.frozen.batches import JudgeOutputs, judge_sounds
from vab.frozen.judges import load_judge


def rows(real, generated, logits, truth):
    columns = (torch.arange(len(real)), torch.tensor(real), torch.tensor(generated), torch.tensor(logits))
    return JudgedRecords(*columns, torch.tensor(truth, dtype=torch.bool))


def test_closed_forms():
    outputs = rows(
        real=[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]],
        generated=[[2.0, 0.1], [0.1, 0.3], [0.0, 1.0]],
        logits=[[0.0, 5.0], [0.0, 1.0], [2.0, 0.0]],
        truth=[[0, 1], [1, 1], [0, 1]],
    )
    # Of the two classes of record 1 one was outputs most: it stands in both rows.
    assert outputs.confusion().tolist() == [[0, 1], [1, 2]]
    assert outputs.ranks().tolist() == [0, 0, 2]  # ties count against
    assert outputs.metrics() == pytest.approx({"agreement": 2 / 3, "recall_at_1_g2r": 2 / 3})


def test_what_has_no_value_is_left_out():
    outputs = rows([[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]], [[0.0, 1.0]] * 2, [[0, 0]] * 2)
    assert outputs.ranks() is None
    assert outputs.metrics() == {}


def test_equal_sounds_are_no_distance_apart_whatever_comes_in_which_order():
    judge = load_judge("tiny")
    sounds = [0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    outputs = [judge_sounds(judge, sounds[:3], 16_000), judge_sounds(judge, sounds[3:], 16_000), empty_outputs(judge)]
    metrics = JudgeMetrics(judge, judge.classes[:2], torch.device("cpu"))
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    for part, numbers in ((outputs[1], [3]), (outputs[2], []), (outputs[0], [0, 1, 2])):
        metrics.update(part, part, torch.tensor(numbers, dtype=torch.int64), labels[numbers])
    values, found = metrics.compute()
    assert values["fad_tiny_to_codec"] == pytest.approx(0, abs=1e-6)
    assert values["kld_tiny_to_codec"] == pytest.approx(0, abs=1e-12)
    assert found.index.tolist() == [0, 1, 2, 3]
    assert torch.equal(found.truth[:, :2], labels.bool())
    assert torch.equal(found.real, torch.cat([outputs[0].embedding, outputs[1].embedding]))
    assert found.ranks().tolist() == [0, 0, 0, 0]


def test_a_sound_of_several_windows_is_their_mean():
    judge = load_judge("tiny")
    windows = JudgeOutputs(
        torch.randn(5, judge.embedding_dim), torch.tensor([2, 3]), torch.randn(2, len(judge.classes))
    )
    metrics = JudgeMetrics(judge, ("no such class",), torch.device("cpu"))
    metrics.update(windows, windows, torch.tensor([0, 1]), torch.ones(2, 1))
    _, found = metrics.compute()
    expected = torch.stack([windows.embedding[:2].mean(0), windows.embedding[2:].mean(0)])
    assert torch.equal(found.generated, expected)
    assert not found.truth.any()  # the judge does not know the label
