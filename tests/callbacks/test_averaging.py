import copy
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from vab.callbacks import EMA
from vab.tasks import load_task


class History(Callback):
    """The live weights after each step, and those in place while validating."""

    def __init__(self):
        self.live, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.live.append(copy.deepcopy(module.backbone.state_dict()))

    def on_validation_batch_end(self, trainer, module, *_):
        self.validated.append(copy.deepcopy(module.backbone.state_dict()))


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_ema_is_the_average_in_closed_form(run):
    history = History()
    _, task, checkpoint = run(history, EMA(decay=0.2), steps=4)
    name = "audio_input.weight"
    expected = history.live[0][name]
    for decay, weights in zip((2 / 11, 0.2, 0.2), history.live[1:], strict=True):
        expected = decay * expected + (1 - decay) * weights[name]
    saved = torch.load(checkpoint, weights_only=True)
    torch.testing.assert_close(saved["state_dict"][f"backbone.{name}"], expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(saved["live_state_dict"][f"backbone.{name}"], history.live[-1][name])
    assert torch.equal(task.backbone.state_dict()[name], history.live[-1][name])  # the live weights stay in place


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_the_share_of_the_random_start_is_that_of_the_closed_form(decay):
    module, ema = torch.nn.Linear(1, 1, bias=False), EMA(decay)
    torch.nn.init.ones_(module.weight)
    updates = 60
    for step in range(1, updates + 1):
        ema.on_train_batch_end(SimpleNamespace(global_step=step), module)
        torch.nn.init.zeros_(module.weight)  # only the first update sees ones
    # While (1 + n) / (10 + n) is below the decay, the shares multiply to a quotient of factorials.
    ramp = min(updates, math.ceil((10 * decay - 1) / (1 - decay)))
    share = math.factorial(10) * math.factorial(ramp) / math.factorial(ramp + 9) * decay ** (updates - ramp)
    assert ema.weights[0].item() == pytest.approx(share, rel=1e-4)


def test_validation_sees_the_average_and_training_goes_on_with_the_live_weights(run):
    history, plain = History(), History()
    run(history, EMA(decay=0.5), steps=4)
    run(plain, steps=4, name="plain")
    assert not same(history.validated[-1], history.live[-1])
    assert same(plain.validated[-1], plain.live[-1])
    assert same(history.live[-1], plain.live[-1])


def test_a_run_that_ends_before_the_average_starts_keeps_its_trained_weights(run):
    history = History()
    _, task, checkpoint = run(history, EMA(decay=0.5, start_step=100), steps=4)
    saved = torch.load(checkpoint, weights_only=True)
    assert "live_state_dict" not in saved
    assert same({f"backbone.{k}": v for k, v in history.live[-1].items()},
                {k: v for k, v in saved["state_dict"].items() if k.startswith("backbone.")})  # fmt: skip
    assert same(task.backbone.state_dict(), history.live[-1])
    assert same(history.validated[-1], history.live[-1])


@pytest.mark.parametrize("start_step", [0, 3])
def test_a_resumed_run_has_the_same_average_bit_for_bit(run, start_step):
    _, _, whole = run(EMA(decay=0.9, start_step=start_step), steps=6, name="whole")
    _, _, half = run(EMA(decay=0.9, start_step=start_step), steps=2, name="half")
    _, _, resumed = run(EMA(decay=0.9, start_step=start_step), steps=6, resume=half, name="resumed")
    first, second = torch.load(whole, weights_only=True), torch.load(resumed, weights_only=True)
    assert same(first["state_dict"], second["state_dict"])
    assert same(first["live_state_dict"], second["live_state_dict"])
    assert first["ema_updates"] == second["ema_updates"] == 6 - start_step


def test_both_sets_of_weights_load_by_name(run):
    _, _, checkpoint = run(EMA(decay=0.5), steps=4)
    saved = torch.load(checkpoint, weights_only=True)
    name = "backbone.audio_input.weight"
    assert torch.equal(load_task(checkpoint).state_dict()[name], saved["state_dict"][name])
    assert torch.equal(load_task(checkpoint, weights="live").state_dict()[name], saved["live_state_dict"][name])
