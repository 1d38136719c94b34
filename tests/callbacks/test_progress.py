import time

from vab.callbacks import StepProgress


def test_off_a_terminal_progress_is_a_line_per_validation(run, capsys):
    run(StepProgress(), steps=4, enable_progress_bar=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]
    assert "train/loss" in lines[-1]
    assert "val/loss" in lines[-1]


def test_on_a_terminal_the_loss_is_read_once_a_second(run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal for rich
    monkeypatch.setattr(StepProgress, "on_validation_end", lambda *_: None)
    progress = StepProgress()
    texts = []
    text = progress.text
    monkeypatch.setattr(progress, "text", lambda trainer: texts.append(text(trainer)) or texts[-1])
    begin = time.monotonic()
    run(progress, steps=30, enable_progress_bar=True)
    assert 1 <= len(texts) <= 1 + time.monotonic() - begin
    assert texts[0].startswith("train/loss ")
