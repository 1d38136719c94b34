from vab.callbacks import StepProgress


def test_off_a_terminal_progress_is_a_line_per_validation(run, capsys):
    run(StepProgress(), steps=4, enable_progress_bar=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]
    assert "val/loss" in lines[-1]
