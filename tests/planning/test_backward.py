import pytest
import torch
from lightning.pytorch import seed_everything
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tasks_help import quiet_trainer, small_backbone
from tone_shards import LABELS, short_spec, write_shards
from vab.data.reading.datamodule import ShardDataModule
from vab.losses import hidden_code_loss
from vab.planning.backward import backward, backward_in_python
from vab.planning.memory import LiveMemory
from vab.tasks import AlignTask, ClassifyTask, PretrainTask

SCHEDULE = {"warmup_steps": 1, "schedule_steps": 10}
TASKS = {
    "pretrain": lambda: PretrainTask(small_backbone(dropout=0.1), **SCHEDULE),
    "pretrain, alibi, recomputed": lambda: PretrainTask(
        small_backbone(dropout=0.1, positions="alibi", activation_checkpointing=True), **SCHEDULE
    ),
    "pretrain, fine": lambda: PretrainTask(small_backbone(), conditioning_levels=2, **SCHEDULE),
    "align": lambda: AlignTask(small_backbone(dropout=0.1), **SCHEDULE),
    "align in parts": lambda: AlignTask(small_backbone(dropout=0.1), micro_batch_size=3, **SCHEDULE),
    "classify": lambda: ClassifyTask(small_backbone(dropout=0.1), LABELS, head_dropout=0.1, **SCHEDULE),
    "classify, several labels": lambda: ClassifyTask(small_backbone(), LABELS, multi_label=True, **SCHEDULE),
    "classify, frozen": lambda: ClassifyTask(small_backbone(), LABELS, freeze_backbone=True, **SCHEDULE),
}


@pytest.fixture(scope="module")
def ragged_shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("ragged") / "train", short_spec(), 24, ragged=True)


def trained_weights(make, folder, settings, in_python):
    seed_everything(0, verbose=False)
    task = make()
    data = ShardDataModule(train=str(folder), val=str(folder), batch_size=8, num_workers=0, allow_tiny=True)
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0, gradient_clip_val=1.0, **settings)
    if in_python:
        with backward_in_python():
            trainer.fit(task, data)
    else:
        trainer.fit(task, data)
    return task.state_dict()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", TASKS)
def test_training_gives_the_weights_that_the_engine_gives_bit_for_bit(name, precision, ragged_shards):
    settings = {"precision": precision, "accumulate_grad_batches": 1 if "align" in name else 2}
    mine, engine = (trained_weights(TASKS[name], ragged_shards, settings, way) for way in (True, False))
    assert mine.keys() == engine.keys()
    assert all(torch.equal(mine[key], engine[key]) for key in mine)


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b, a + b

    @staticmethod
    def backward(ctx, product, total):
        a, b = ctx.saved_tensors
        return product * b + total, product * a + total


def of_many_kinds(x, w):
    broadcast = (x[:, None] + w).sum((0, 1)) * w.new_ones(())
    _unused, used = TwoOutputs.apply(x * 2, x)
    both = sum(TwoOutputs.apply(x, used))
    joined = torch.cat([x, both.sin(), x.t().contiguous().t()], dim=1)
    recomputed = checkpoint(lambda y: (y @ w).relu().exp(), both, use_reentrant=False)
    in_place = (x @ w).mul_(2).add_(x)
    in_place[:, 0] = broadcast[0]
    parts = in_place.unbind(1)
    half = F.linear(x.bfloat16(), w.bfloat16()).float()
    return broadcast.sum() + joined.sum() + recomputed.mean() + (parts[0] * parts[1]).sum() + half.std() + w.sum()


def test_gradients_of_many_kinds_of_nodes_equal_the_engines():
    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    grads = []
    for run in (torch.Tensor.backward, backward):
        x.grad = w.grad = None
        for _ in range(2):  # the second adds to .grad
            run(of_many_kinds(x, w))
        grads.append((x.grad, w.grad))
    for mine, engine in zip(*grads, strict=True):
        assert torch.equal(mine, engine)


def test_a_given_gradient_is_used_and_a_leafs_hooks_run():
    x = torch.randn(3, requires_grad=True)
    seen = []
    x.register_hook(lambda grad: 2 * grad)
    x.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.clone()))
    backward(x * 3, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(x.grad, torch.tensor([6.0, 12.0, 18.0]))
    assert torch.equal(seen[0], x.grad)


def test_a_leafs_gradient_has_its_layout_and_memory_of_its_own():
    x, y = torch.randn(4, 3).t().requires_grad_(), torch.randn(3, 4, requires_grad=True)
    backward((x + y).sum())  # the gradient is one expanded number
    assert x.grad.stride() == x.stride()
    assert y.grad.stride() == y.stride()
    x.grad.zero_()
    assert y.grad.eq(1).all()


def test_what_it_cannot_do_is_refused():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no graph"):
        backward(torch.zeros(()))
    with pytest.raises(RuntimeError, match="needs a gradient"):
        backward(x * 2)
    with pytest.raises(RuntimeError, match="is on cpu, its tensor on meta"):
        backward((x.to("meta") * 2), torch.ones(3))
    loss = (x * x).sum()
    backward(loss)
    with pytest.raises(RuntimeError, match="no graph"):
        backward(loss)
    with backward_in_python(), pytest.raises(NotImplementedError):
        (x * 2).sum().backward(retain_graph=True)
    (x * 2).sum().backward(retain_graph=True)  # the engine again


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_live_bytes_through_the_pass_are_the_engines(positions, recompute):
    network = small_backbone(positions=positions, activation_checkpointing=recompute, num_joint_layers=4).train()
    network.has_codebooks = True
    spec = network.spec
    codes = torch.randint(spec.codebook_size, (16, spec.num_codebooks, spec.num_steps))
    features, mask = torch.randn(16, spec.num_frames, spec.feature_dim), torch.rand(codes.shape) < 0.5
    found, one = [], torch.ones(())
    for run in (torch.Tensor.backward, backward):
        network.zero_grad()
        with LiveMemory("cpu") as memory:
            for weight in network.parameters():
                memory.count(weight)
            loss = hidden_code_loss(network.trunk(codes, features, mask), network.heads, codes, mask)
            before = memory.live
            memory.reset_peak()
            live = []
            weights = [block.attention.norm.weight for block in network.blocks]
            hooks = [w.register_post_accumulate_grad_hook(lambda _: live.append(memory.live)) for w in weights]  # noqa: B023
            run(loss, one)  # as it is held here, it counts in both
            found.append((before, live, memory.peak, memory.live))
            for hook in hooks:
                hook.remove()
            del loss
    assert found[0] == found[1]
    assert found[1][1] == sorted(found[1][1], reverse=True) or recompute  # nodes are freed once they are done
    assert found[1][3] < found[1][0]
