"""Ways to train the same network: each has the loss and the gradient of the plain one."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from engine_runs import run
from tasks_help import quiet_trainer, small_backbone
from vab.callbacks import EMA, Checkpoints
from vab.data.reading.datamodule import ShardDataModule
from vab.engines import FSDP, is_sharded
from vab.spec import UserError
from vab.tasks import AlignTask, ClassifyTask, PretrainTask, load_task

STEPS = {"warmup_steps": 2, "schedule_steps": 50}


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, *unused):
        if not trainer.fit_loop._should_accumulate():
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def fit(shards, folder, *callbacks, batch_size=8, resume=None, task=None, backbone=None, **settings):
    """A run of some steps in this process; the task, the losses, and the checkpoint's content."""
    data = ShardDataModule(f"{shards}/train", f"{shards}/val", batch_size=batch_size, num_workers=0)
    made = PretrainTask(small_backbone(data.spec, **(backbone or {})), **STEPS, **(task or {}))
    losses = Losses()
    keep = Checkpoints(dirpath=str(folder), save_last=True, save_top_k=0)
    settings = {"max_steps": 4, "max_epochs": -1, "enable_checkpointing": True, "gradient_clip_val": 1.0} | settings
    trainer = quiet_trainer(callbacks=[EMA(0.9), losses, *callbacks, keep], limit_val_batches=0, **settings)
    trainer.fit(made, data, ckpt_path=resume, weights_only=True)
    return made, losses.losses, torch.load(folder / "last.ckpt", weights_only=True)


def distance(one, other):
    """The largest difference between two checkpoints' weights, average and live."""
    pairs = []
    for name in ("state_dict", "live_state_dict"):
        assert one[name].keys() == other[name].keys()
        pairs += [(one[name][key], other[name][key]) for key in one[name]]
    return max(float((mine.double() - theirs.double()).abs().max()) for mine, theirs in pairs)


def saved_bytes(spec, batch, **settings):
    """Loss, gradients, and how many bytes of activations one training step keeps for the gradient."""
    backbone = small_backbone(spec, num_modality_layers=4, num_joint_layers=4, dropout=0.2, **settings)
    backbone.set_codebooks(torch.randn_like(backbone.codebooks))
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    mask = torch.rand(batch.codes.shape) < 0.5
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = backbone(batch.codes, batch.features, mask).square().mean()
    loss.backward()
    own = {parameter.data_ptr() for parameter in backbone.parameters()}
    bytes_kept = sum(size for place, size in kept.items() if place not in own)
    return loss.detach(), {name: p.grad for name, p in backbone.named_parameters()}, bytes_kept


def test_activation_checkpointing_keeps_less_and_changes_nothing(shards):
    data = ShardDataModule(f"{shards}/train", f"{shards}/val", batch_size=8, num_workers=0)
    batch = data.train_dataset.__getitems__(list(range(8))).widened()
    loss, gradients, plain = saved_bytes(data.spec, batch)
    torch.manual_seed(0)
    loss_again, gradients_again, less = saved_bytes(data.spec, batch, activation_checkpointing=True)
    assert loss_again == loss
    assert gradients_again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradients_again[name], gradient), name
    assert less < plain / 3, (less, plain)


def test_a_run_with_activation_checkpointing_is_the_same_run(shards, tmp_path):
    _, losses, plain = fit(shards, tmp_path / "plain", backbone={"dropout": 0.1})
    again = {"dropout": 0.1, "activation_checkpointing": True}
    _, losses_again, other = fit(shards, tmp_path / "again", backbone=again)
    assert losses_again == losses
    assert distance(plain, other) == 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_compiled_blocks_train_alike_and_checkpoints_are_the_same(backend, shards, tmp_path):
    torch._dynamo.reset()
    _, losses, plain = fit(shards, tmp_path / "plain", max_steps=6)
    task, compiled_losses, compiled = fit(shards, tmp_path / "compiled", max_steps=3, task={"compile": backend})
    assert all(block._compiled_call_impl is not None for block in task.backbone.blocks)
    assert compiled["state_dict"].keys() == plain["state_dict"].keys()
    assert compiled_losses == pytest.approx(losses[:3], rel=1e-5)
    # A compiled run goes on plainly, and a plain one compiled.
    _, rest, end = fit(shards, tmp_path / "rest", max_steps=6, resume=tmp_path / "compiled" / "last.ckpt")
    assert rest == pytest.approx(losses[3:], rel=1e-4)
    assert distance(end, plain) < 1e-4
    fit(shards, tmp_path / "half", max_steps=3)
    resume = tmp_path / "half" / "last.ckpt"
    _, rest, end = fit(shards, tmp_path / "on", max_steps=6, resume=resume, task={"compile": backend})
    assert rest == pytest.approx(losses[3:], rel=1e-4)
    assert distance(end, plain) < 1e-4
    assert isinstance(load_task(tmp_path / "on" / "last.ckpt"), PretrainTask)


def test_what_cannot_be_compiled_is_said_once_and_trained_all_the_same(shards, tmp_path, caplog):
    def broken(graph, inputs):
        raise OSError("no compiler here")

    torch._dynamo.reset()
    torch._dynamo.register_backend(broken, name="broken")
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        _, losses, other = fit(shards, tmp_path / "broken", task={"compile": "broken"})
    said = [record.getMessage() for record in caplog.records if "torch.compile" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("torch.compile (broken) failed, training continues without it: ")
    assert "no compiler here" in said[0]
    assert len(said[0].splitlines()) == 1
    _, plain_losses, plain = fit(shards, tmp_path / "plain")
    assert losses == plain_losses
    assert distance(other, plain) == 0


@pytest.mark.parametrize("accumulated", [2, 4])
def test_accumulated_batches_train_as_one_large_batch_does(accumulated, shards, tmp_path):
    """The masks hide between half and all of a record, so batches weigh unlike; 48 records are 6 steps of 8."""
    rates = {"plain": [], "parts": []}

    class Rates(Callback):
        def __init__(self, name):
            self.name = name

        def on_before_optimizer_step(self, trainer, *unused):
            rates[self.name].append(trainer.optimizers[0].param_groups[0]["lr"])

    _, losses, plain = fit(shards, tmp_path / "plain", Rates("plain"), max_steps=8)
    size = {"batch_size": 8 // accumulated, "accumulate_grad_batches": accumulated}
    _, parts, other = fit(shards, tmp_path / "parts", Rates("parts"), max_steps=8, **size)
    assert parts == pytest.approx(losses, rel=1e-5)
    assert len(parts) == 8
    assert rates["parts"] == rates["plain"]
    assert plain["global_step"] == other["global_step"] == 8
    assert distance(plain, other) < 1e-6


def test_an_accumulating_run_that_stops_between_two_steps_goes_on_with_the_same_records(shards, tmp_path):
    class Stop(Callback):
        """As a hard interruption that saves: after 5 batches, of which 3 make a step."""

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "between.ckpt")
                raise KeyboardInterrupt

    size = {"batch_size": 4, "accumulate_grad_batches": 3, "max_steps": 6, "backbone": {"dropout": 0.1}}
    _, losses, whole = fit(shards, tmp_path / "whole", **size)
    with pytest.raises(SystemExit):
        fit(shards, tmp_path / "cut", Stop(), **size)
    between = torch.load(tmp_path / "between.ckpt", weights_only=True)
    assert between["global_step"] == 1
    assert between["ShardDataModule"]["records_consumed"] == 12
    assert between["ShardDataModule"]["pending_batches"] == 2
    _, rest, on = fit(shards, tmp_path / "on", resume=tmp_path / "between.ckpt", **size)
    assert rest == losses[1:]
    assert distance(whole, on) == 0


def test_an_epoch_is_whole_optimizer_steps(shards, tmp_path):
    """12 batches of 4: with 5 accumulated an epoch is 2 steps, and 8 records sit out."""
    _, losses, content = fit(shards, tmp_path, batch_size=4, accumulate_grad_batches=5, max_steps=3)
    assert len(losses) == 3
    assert content["ShardDataModule"]["epoch"] == 1
    assert content["ShardDataModule"]["records_consumed"] == 20
    with pytest.raises(UserError, match="fewer than one step takes"):
        fit(shards, tmp_path / "none", batch_size=4, accumulate_grad_batches=13)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_sixteen_bits_train_near_thirty_two(precision, shards, tmp_path):
    _, losses, plain = fit(shards, tmp_path / "plain", max_steps=6)
    task, near, content = fit(shards, tmp_path / "near", max_steps=6, precision=precision)
    assert near == pytest.approx(losses, rel=0.02)
    assert near != losses
    task.quality.reset()
    assert task.quality.per_level.dtype == torch.float64
    assert task.backbone.rotary.dtype == task.backbone.codebooks.dtype == torch.float32
    assert torch.equal(content["state_dict"]["backbone.codebooks"], plain["state_dict"]["backbone.codebooks"])
    dtypes = {name: content[name]["backbone.audio_input.weight"].dtype for name in ("state_dict", "live_state_dict")}
    live = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert dtypes == {"state_dict": torch.float32, "live_state_dict": live}
    average = content["state_dict"]["backbone.audio_input.weight"]
    assert not torch.equal(average.bfloat16().float(), average)  # the average is finer than bfloat16
    assert load_task(tmp_path / "near" / "last.ckpt").dtype == torch.float32


def test_a_fused_optimizer_is_not_clipped_where_gradients_are_scaled(shards, tmp_path):
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(UserError, match=r"bf16-mixed, or --model\.optimizer\.fused false"):
        fit(shards, tmp_path / "clipped", plugins=[scaled])
    fit(shards, tmp_path / "whole", plugins=[scaled], gradient_clip_val=None)


def test_metrics_are_no_coarser_than_before_when_the_network_is():
    whole = ClassifyTask(small_backbone(), ["a", "b"], **STEPS)
    task = ClassifyTask(small_backbone(), ["a", "b"], **STEPS).to(torch.bfloat16)
    assert task.classifier.weight.dtype == torch.bfloat16
    for name, metric in task.named_modules():
        for state, value in getattr(metric, "_defaults", {}).items():
            if isinstance(value, torch.Tensor):
                expected = whole.get_submodule(name)._defaults[state].dtype
                assert value.dtype == getattr(metric, state).dtype == expected, f"{name}.{state}"
    assert task.mean_loss.mean_value.dtype == torch.float64


def test_a_single_number_that_is_learned_cannot_be_sharded():
    task = AlignTask(small_backbone(), **STEPS)
    with pytest.raises(UserError, match="log_scale is a single number"):
        task.require_shardable()
    AlignTask(small_backbone(), learn_temperature=False, **STEPS).require_shardable()


@pytest.fixture
def alone(monkeypatch):
    """For a process that takes itself for the only rank; what it leaves behind is taken away."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was
        monkeypatch.delenv(name)
    yield
    torch.distributed.destroy_process_group()


def test_one_sharded_rank_trains_what_a_plain_one_trains_and_either_goes_on(shards, tmp_path, alone):
    _, losses, plain = fit(shards, tmp_path / "plain")
    task, sharded_losses, _ = fit(shards, tmp_path / "sharded", max_steps=2, strategy=FSDP())
    assert is_sharded(task)
    assert sharded_losses == losses[:2]
    fit(shards, tmp_path / "half", max_steps=2)
    last = tmp_path / "sharded" / "last.ckpt"
    for name, half, strategy in (("plainly", "sharded", "auto"), ("on", "sharded", FSDP()), ("then", "half", FSDP())):
        _, rest, end = fit(shards, tmp_path / name, resume=tmp_path / half / "last.ckpt", strategy=strategy)
        assert rest == losses[2:], name
        assert distance(end, plain) == 0, name
        assert end["ema_updates"] == 4
    assert load_task(last).backbone.has_codebooks


class SavedWeights(Callback):
    """Bytes of blocks' weights, and of copies of them, that are alive between the forward and the backward pass."""

    def on_train_batch_start(self, trainer, module, *unused):
        shapes = {parameter.shape for parameter in module.backbone.blocks[0].parameters() if parameter.ndim == 2}
        self.shapes = shapes | {shape[::-1] for shape in shapes}
        self.saved = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()

    def keep(self, tensor):
        if tensor.shape in self.shapes:
            self.saved.append(tensor)
        return tensor

    def on_before_backward(self, *unused):
        self.hooks.__exit__()
        self.count = len(self.saved)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in self.saved}
        self.bytes = sum(storage.nbytes() for storage in storages.values())
        self.saved.clear()


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_sharded_rank_keeps_no_whole_copy_of_the_blocks_weights(precision, shards, tmp_path, alone):
    watch = SavedWeights()
    sizes = {"feedforward_ratio": 3}  # no other weight has the shape of a block's
    fit(shards, tmp_path / "run", watch, precision=precision, strategy=FSDP(), backbone=sizes)
    assert watch.count > 0
    assert watch.bytes == 0


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(900)
def test_two_sharded_ranks_train_as_two_whole_ones_and_exchange_checkpoints(shards, tmp_path):
    whole = run(tmp_path / "ddp", shards, 2, max_steps=4)
    first = run(tmp_path / "half", shards, 2, strategy="fsdp", max_steps=2)
    assert first["checkpoint"]["state_dict"].keys() == whole["checkpoint"]["state_dict"].keys()
    resume = str(tmp_path / "half" / "last.ckpt")
    on = run(tmp_path / "on", shards, 2, strategy="fsdp", max_steps=4, resume=resume)
    assert on["losses"] == pytest.approx(whole["losses"][2:], rel=1e-6)
    assert on["figures"]["val/loss"] == pytest.approx(whole["figures"]["val/loss"], rel=1e-6)
    assert distance(on["checkpoint"], whole["checkpoint"]) < 1e-6
    assert on["checkpoint"]["ema_updates"] == whole["checkpoint"]["ema_updates"] == 4


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(1800)
def test_every_engine_trains_what_one_process_trains(shards, tmp_path):
    one = run(tmp_path / "one", shards)
    halves = {"batch_size": 2, "accumulate_grad_batches": 2}
    runs = {
        "ddp2": {"devices": 2},
        "ddp4": {"devices": 4},
        "ddp2 accumulating": {"devices": 2, **halves},
        "fsdp1": {"strategy": "fsdp"},
        "fsdp2": {"devices": 2, "strategy": "fsdp"},
        "fsdp4": {"devices": 4, "strategy": "fsdp"},
        "fsdp2 accumulating": {"devices": 2, "strategy": "fsdp", **halves},
        "fsdp2 checkpointing": {"devices": 2, "strategy": "fsdp", "backbone": {"activation_checkpointing": True}},
        "fsdp2 compiled": {
            "devices": 2,
            "strategy": "fsdp",
            "task": {"compile": "aot_eager"},
            "backbone": {"activation_checkpointing": True},
        },
        "ddp2 compiled": {
            "devices": 2,
            "task": {"compile": "aot_eager"},
            "backbone": {"activation_checkpointing": True},
        },
    }
    for name, settings in runs.items():
        other = run(tmp_path / name.replace(" ", "_"), shards, **settings)
        assert distance(one["checkpoint"], other["checkpoint"]) < 1e-5, name
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5), name
        assert other["figures"]["val/loss"] == pytest.approx(one["figures"]["val/loss"], rel=1e-5), name
        assert "torch.compile" not in other["said"], name


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_sharded_ranks_train_in_sixteen_bits(precision, shards, tmp_path):
    one = run(tmp_path / "one", shards)
    two = run(tmp_path / "two", shards, 2, strategy="fsdp", precision=precision)
    assert two["losses"] == pytest.approx(one["losses"], rel=0.02)
    assert two["figures"]["val/loss"] == pytest.approx(one["figures"]["val/loss"], rel=1e-3)
    assert two["checkpoint"]["state_dict"]["backbone.audio_input.weight"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(900)
def test_sharded_ranks_in_mixed_precision_train_as_whole_ones_and_resume(shards, tmp_path):
    mixed = {"precision": "bf16-mixed"}
    whole = run(tmp_path / "ddp", shards, 2, max_steps=4, **mixed)
    first = run(tmp_path / "half", shards, 2, strategy="fsdp", max_steps=2, **mixed)
    resume = str(tmp_path / "half" / "last.ckpt")
    on = run(tmp_path / "on", shards, 2, strategy="fsdp", max_steps=4, resume=resume, **mixed)
    assert first["losses"] + on["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert on["figures"]["val/loss"] == pytest.approx(whole["figures"]["val/loss"], rel=1e-4)
    assert distance(on["checkpoint"], whole["checkpoint"]) < 1e-4
    assert {value.dtype for value in on["checkpoint"]["live_state_dict"].values()} == {torch.float32}


@pytest.fixture(scope="module")
def four_steps(shards, tmp_path_factory):
    """The checkpoint of one process that nothing interrupts."""
    return run(tmp_path_factory.mktemp("engines") / "whole", shards, max_steps=4)["checkpoint"]


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.timeout(900)
@pytest.mark.parametrize("first", ["auto", "ddp", "fsdp"])
def test_a_run_goes_on_under_another_engine(first, four_steps, shards, tmp_path):
    devices = {"auto": 1, "ddp": 2, "fsdp": 2}
    run(tmp_path / "half", shards, devices[first], strategy=first, max_steps=2)
    resume = str(tmp_path / "half" / "last.ckpt")
    for second in devices.keys() - {first}:
        on = run(tmp_path / second, shards, devices[second], strategy=second, max_steps=4, resume=resume)
        assert distance(four_steps, on["checkpoint"]) < 1e-6, second
        assert on["checkpoint"]["global_step"] == 4
