"""Sounds of codes and what a judge hears in them, with and without padding."""

import pytest
import torch

from vab.audio import resample
from vab.frozen.batches import class_columns, decode_sounds, judge_sounds, true_classes
from vab.frozen.codec import load_codec
from vab.frozen.judges import load_judge
from vab.frozen.protocols import Codec
from vab.spec import UserError

RATE = 16_000


@pytest.fixture(scope="module")
def codes():
    torch.manual_seed(0)
    return torch.randint(256, (3, 4, 40))


def test_sounds_are_the_decoded_codes_without_padding(codes):
    codec = load_codec("tiny")
    got = decode_sounds(codec, codes, torch.tensor([40, 10, 25]))
    whole = codec.decode(codes)
    assert [len(sound) for sound in got] == [40 * 320, 10 * 320, 25 * 320]
    for sound, decoded in zip(got, whole, strict=True):
        assert torch.equal(sound, decoded[0, : len(sound)])


class Hops(Codec):
    """Sound of nothing but its length: what is under test is where it is cut."""

    def __init__(self, sample_rate, hop):
        super().__init__()
        self.sample_rate, self.hop, self.code_rate = sample_rate, hop, sample_rate / hop
        self.num_codebooks, self.codebook_size = 1, 2
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def codebooks(self):
        return torch.zeros(1, 2, 1)

    def _encode(self, waveform):
        return torch.zeros(len(waveform), 1, self.steps_for(waveform.shape[-1]), dtype=torch.int64)

    def _decode(self, codes):
        return torch.zeros(1, 1, 1).expand(len(codes), 1, self.hop * codes.shape[-1])


@pytest.mark.parametrize(("rate", "hop"), [(16_000, 320), (24_000, 320), (44_100, 512)])  # 50, 75 and 86.13 Hz
def test_a_sound_ends_with_its_last_step_for_any_number_of_steps(rate, hop):
    steps = torch.arange(1, 3001)
    sounds = decode_sounds(Hops(rate, hop), torch.zeros(1, 1, 1, dtype=torch.int64).expand(3000, 1, 3000), steps)
    assert [len(sound) for sound in sounds] == [hop * count for count in range(1, 3001)]


def test_a_judge_hears_each_sound_as_if_alone(codes):
    judge, codec = load_judge("tiny"), load_codec("tiny")
    for lengths in ([40, 40, 40], [40, 12, 25]):
        sounds = decode_sounds(codec, codes, torch.tensor(lengths))
        together = judge_sounds(judge, sounds, RATE)
        alone = [judge(sound[None, None], RATE) for sound in sounds]
        assert together.rows.tolist() == [1, 1, 1]
        torch.testing.assert_close(together.embedding, torch.cat([heard.embedding[:, 0] for heard in alone]))
        torch.testing.assert_close(together.logits, torch.cat([heard.logits for heard in alone]))
        torch.testing.assert_close(together.probabilities, together.logits.softmax(1))


def test_sounds_at_another_rate_are_resampled_to_the_judges():
    judge = load_judge("tiny")
    sound = torch.randn(2 * RATE, generator=torch.Generator().manual_seed(1))
    expected = judge_sounds(judge, [torch.from_numpy(resample(sound.numpy(), 2 * RATE, RATE))], RATE)
    assert torch.equal(judge_sounds(judge, [sound], 2 * RATE).logits, expected.logits)


def test_classes_are_found_in_the_judges_order():
    judge = load_judge("tiny")
    labels = [judge.classes[5], judge.classes[2]]
    columns = class_columns(judge, labels)
    assert columns == [5, 2]
    truth = true_classes(judge, columns, torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    assert truth.shape == (3, len(judge.classes))
    assert truth.nonzero().tolist() == [[0, 5], [1, 2], [1, 5]]


def test_labels_that_the_judge_does_not_know_are_named():
    judge = load_judge("tiny")
    with pytest.raises(UserError, match="labels are theremin"):
        class_columns(judge, [judge.classes[0], "theremin"])
    with pytest.raises(UserError, match="none at all"):
        class_columns(judge, [])
