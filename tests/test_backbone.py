"""The network against other implementations, its sizes, its masks, and the golden logits of a tiny one."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from vab.backbone import (
    Attention,
    Backbone,
    rotary_angles,
    rotate_queries_and_keys,
    sincos_table,
    symmetric_alibi,
)
from vab.losses import masked_code_loss
from vab.spec import SegmentSpec, UserError

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from make_golden import SIZES, SPEC  # noqa: E402

B, K, T, S, V, C = 3, 3, 12, 11, 4, 6
POSITIONS = ["rotary", "alibi"]


def make_backbone(positions="rotary", **changes):
    backbone = Backbone(SPEC, **{**SIZES, "positions": positions, **changes}).eval()
    for parameter in backbone.parameters():  # large enough that every path tells
        parameter.data = 0.3 * torch.randn(parameter.shape)
    backbone.set_codebooks(torch.randn(K, S, SPEC.code_dim))
    return backbone


@pytest.fixture(params=POSITIONS)
def backbone(request):
    return make_backbone(request.param)


@pytest.fixture
def inputs():
    return torch.randint(0, S, (B, K, T)), torch.randn(B, V, C), torch.rand(B, K, T) < 0.6


def paper_spec():
    return SegmentSpec(10.0, 16_000, 50.0, 4, 2048, 128, 500, 1.0, 10, 768, "encodec_16k", "0", "eva02", "0")


# --- sizes


def test_paper_size(monkeypatch):
    # Weights that no one writes to take no memory; torch's meta device would take seconds to load.
    monkeypatch.setattr(nn.init, "normal_", lambda tensor, **_: tensor)
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda linear: None)
    backbone = Backbone(paper_spec())

    def count(blocks):
        return sum(p.numel() for p in blocks.parameters() if p.dim() == 2)

    modality, joint = count(backbone.modality_blocks), count(backbone.joint_blocks)
    assert modality == 12 * (4 + 16) * 1024**2 == 251_658_240
    assert modality + joint == 24 * 4 * 1024**2 + 36 * 8 * 1024**2 == 402_653_184
    assert not any("bias" in name and "norm" not in name for name, _ in backbone.modality_blocks.named_parameters())


@pytest.mark.slow
def test_paper_size_runs_forward_and_backward():
    backbone = Backbone(paper_spec())
    backbone.set_codebooks(torch.randn(4, 2048, 128))
    codes, mask = torch.randint(0, 2048, (1, 4, 500)), torch.rand(1, 4, 500) < 0.7
    logits = backbone(codes, torch.randn(1, 10, 768), mask)
    loss = masked_code_loss(logits, codes, mask)
    loss.backward()
    assert logits.shape == (1, 4, 500, 2048)
    assert abs(loss.item() - math.log(2048)) < 0.3  # an untrained network guesses almost evenly
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


def test_names_and_shapes_of_weights_do_not_depend_on_the_length(backbone):
    short = SegmentSpec(**{**SPEC.to_dict(), "num_steps": 6, "num_frames": 2, "segment_seconds": 0.25})
    other = Backbone(short, **SIZES, positions=backbone.positions)
    other.load_state_dict(backbone.state_dict())
    assert other(torch.zeros(1, K, 6, dtype=torch.int64), torch.zeros(1, 2, C)).shape == (1, K, 6, S)


def test_init():
    torch.manual_seed(0)
    backbone = Backbone(SPEC, dim=64, num_heads=2, num_modality_layers=2, num_joint_layers=2)
    block = backbone.modality_blocks[0]
    for weight in (block.attention.qkv.weight, block.audio.up.weight, backbone.modality, backbone.heads):
        assert abs(weight.std().item() / 0.02 - 1) < 0.1
    for weight in (
        block.attention.out.weight,
        block.visual.down.weight,
        backbone.joint_blocks[1].feedforward.down.weight,
    ):
        assert abs(weight.std().item() / (0.02 / math.sqrt(8)) - 1) < 0.1


def test_spec_may_be_a_dict():
    assert Backbone(SPEC.to_dict(), **SIZES).spec == SPEC


def test_made_again_from_its_arguments(backbone):
    twin = Backbone(**backbone.init_args)
    assert twin.init_args == backbone.init_args
    assert {n: p.shape for n, p in twin.state_dict().items()} == {n: p.shape for n, p in backbone.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 18, "num_heads": 4}, "multiple of 2 x num_heads"),
        ({"num_modality_layers": 0}, "1 or more"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"positions": "learned"}, "positions must be one of rotary, alibi"),
    ],
)
def test_refuses_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=message):
        Backbone(SPEC, **{**SIZES, **arguments})


# --- against other implementations


@pytest.mark.parametrize("padded", [False, True])
def test_attention_equals_torch_multi_head_attention(padded):
    attention, x = Attention(16, 2), torch.randn(B, 7, 16)
    is_padding = torch.arange(7) >= torch.tensor([7, 4, 2])[:, None] if padded else None
    normed = attention.norm(x).transpose(0, 1)
    expected, _ = F.multi_head_attention_forward(
        *(normed, normed, normed, 16, 2),
        *(attention.qkv.weight, None, None, None, False, 0.0, attention.out.weight, None),
        key_padding_mask=is_padding,
    )
    mask = None if is_padding is None else ~is_padding[:, None, None]
    torch.testing.assert_close(attention(x, None, mask), expected.transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_rotary_angles():
    seconds = torch.tensor([0.01, 0.25, 0.5, 1.0, 9.99], dtype=torch.float64)
    angles = rotary_angles(seconds, code_rate=50.0, head_dim=8)
    for position in range(5):
        for pair in range(4):
            assert angles[position, pair].item() == pytest.approx(seconds[position].item() * 50 * 10_000 ** (-pair / 4))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotation_and_its_gradient_equal_a_complex_product(dtype, compiled):
    rotary, weight = make_backbone().rotary[:, :5], torch.randn(2, 5, 3 * 2 * 8)
    given = torch.randn(2, 5, 3 * 2 * 8, dtype=dtype)

    def complex_product(qkv):
        qk, v = qkv.double().unflatten(-1, (3, 2, 8)).split((2, 1), dim=2)
        turned = torch.view_as_complex(qk.unflatten(-1, (4, 2))) * torch.complex(*rotary[:, :, None, None].double())
        return torch.cat([torch.view_as_real(turned).flatten(-2), v], dim=2).flatten(2).to(dtype)

    def rotate(qkv):
        return rotate_queries_and_keys(qkv, rotary, 2)

    found = []
    for function in (complex_product, torch.compile(rotate, fullgraph=True, backend="eager") if compiled else rotate):
        x = given.clone().requires_grad_()
        rotated = function(x * 1.0)
        (rotated.float() * weight).sum().backward()
        found.append((rotated.detach(), x.grad))
    # Computed in float32 and rounded once: the difference to float64 is at most one unit in the last place.
    torch.testing.assert_close(found[1], found[0], rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-6)
    assert not torch.equal(found[1][0][..., :32], given[..., :32])
    assert torch.equal(found[1][0][..., 32:], given[..., 32:])


def test_rotated_products_depend_on_the_distance_in_time():
    qkv = torch.randn(1, 2, 3 * 8)

    def product(query_seconds, key_seconds):
        angles = rotary_angles(torch.tensor([query_seconds, key_seconds], dtype=torch.float64), 50.0, 8)
        rotary = torch.stack([angles.cos(), angles.sin()]).float()
        rotated = rotate_queries_and_keys(qkv.clone(), rotary, 1)[0]
        return (rotated[0, :8] @ rotated[1, 8:16]).item()

    assert product(1.0, 1.3) == pytest.approx(product(4.0, 4.3), abs=1e-4)
    assert product(1.0, 1.3) != pytest.approx(product(1.0, 1.4), abs=1e-3)


def test_frames_and_steps_share_one_axis_of_time():
    # 8 frames and 24 steps a second: frame k covers steps 3k .. 3k + 2, and its middle is that of the middle one.
    rotary = make_backbone().rotary
    for frame in range(V):
        torch.testing.assert_close(rotary[:, frame], rotary[:, V + 3 * frame + 1])


def test_alibi_and_sinusoids():
    bias = symmetric_alibi(4, 2)
    assert bias[0].tolist() == [[-abs(i - j) / 16 for j in range(4)] for i in range(4)]
    assert bias[1].tolist() == [[-abs(i - j) / 256 for j in range(4)] for i in range(4)]
    table = sincos_table(5, 6)
    for position in range(5):
        for pair in range(3):
            angle = position / 10_000 ** (2 * pair / 6)
            assert table[position, pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 3 + pair].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_audio_input_equals_a_plain_loop(inputs):
    backbone, (codes, _, mask) = make_backbone(), inputs
    result = backbone.embed_codes(codes, mask)
    unmasked = backbone.embed_codes(codes)
    for b in range(B):
        for t in range(T):
            rows = [backbone.codebooks[k, codes[b, k, t]] for k in range(K)]
            seen = [backbone.mask_code[k] if mask[b, k, t] else rows[k] for k in range(K)]
            for summed, got in ((seen, result[b, t]), (rows, unmasked[b, t])):
                torch.testing.assert_close(got, backbone.audio_input(sum(summed)) + backbone.modality[1])


def test_heads_read_the_audio_positions_level_by_level(backbone, inputs):
    codes, features, mask = inputs
    logits = backbone(codes, features, mask)
    assert logits.shape == (B, K, T, S)
    outputs = []
    hook = backbone.joint_norm.register_forward_hook(lambda module, args, output: outputs.append(output))
    backbone(codes, features, mask)
    hook.remove()
    for k in range(K):
        torch.testing.assert_close(logits[:, k], outputs[0] @ backbone.heads[k].T)


def test_gradients_reach_every_weight_but_the_codebooks(backbone, inputs):
    codes, features, mask = inputs
    masked_code_loss(backbone(codes, features, mask), codes, mask).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in backbone.parameters())
    assert "codebooks" not in dict(backbone.named_parameters())


# --- what may and may not matter


def test_hidden_codes_are_unread(backbone, inputs):
    codes, features, mask = inputs
    rubbish = codes.masked_fill(mask, -9)
    assert torch.equal(backbone(rubbish, features, mask), backbone(codes, features, mask))


def test_every_visible_code_and_frame_matters(backbone, inputs):
    codes, features, mask = inputs
    mask[0] = True
    mask[0, 1, 2] = False
    logits = backbone(codes, features, mask)
    other_codes, other_features = codes.clone(), features.clone()
    other_codes[0, 1, 2] = (codes[0, 1, 2] + 1) % S
    other_features[0, 3] += 1
    for changed in (backbone(other_codes, features, mask), backbone(codes, other_features, mask)):
        assert not torch.allclose(changed[0], logits[0], atol=1e-4)
        torch.testing.assert_close(changed[1:], logits[1:])  # and no other record


def test_dropped_features_do_not_matter_but_their_places_stay(backbone, inputs):
    codes, features, mask = inputs
    drop = torch.tensor([True, False, False])
    logits = backbone(codes, features, mask, drop_features=drop)
    other = features.clone()
    other[0] = torch.randn(V, C)
    assert torch.equal(backbone(codes, other, mask, drop_features=drop), logits)
    torch.testing.assert_close(logits[1:], backbone(codes, features, mask)[1:])
    zeroed = copy.deepcopy(backbone)
    zeroed.visual_input.weight.data.zero_()
    zeroed.visual_input.bias.data.zero_()
    torch.testing.assert_close(logits[0], zeroed(codes, features, mask)[0])


@pytest.mark.parametrize("given", [("steps", "frames"), ("steps",), ("frames",)])
def test_padding_does_not_matter(backbone, inputs, given):
    codes, features, mask = inputs
    lengths = {"steps": torch.tensor([T, 7, 1]), "frames": torch.tensor([V, 1, 2])}
    steps = lengths["steps"] if "steps" in given else torch.full((B,), T)
    frames = lengths["frames"] if "frames" in given else torch.full((B,), V)
    lengths = {name: lengths[name] for name in given}
    logits = backbone(codes, features, mask, **lengths)
    is_padding = (torch.arange(T) >= steps[:, None])[:, None].expand(B, K, T)
    other_codes = torch.where(is_padding, torch.randint(0, S, codes.shape), codes)
    other_mask = torch.where(is_padding, torch.rand(mask.shape) < 0.5, mask)
    other_features = torch.where((torch.arange(V) >= frames[:, None])[..., None], torch.randn(features.shape), features)
    changed = backbone(other_codes, other_features, other_mask, **lengths)
    assert torch.equal(changed[~is_padding], logits[~is_padding])
    torch.testing.assert_close(logits[0], backbone(codes, features, mask)[0])  # a whole record: as without lengths


def test_a_padded_record_equals_a_shorter_network(backbone, inputs):
    codes, features, mask = inputs
    short = SegmentSpec(**{**SPEC.to_dict(), "num_steps": 6, "num_frames": V})
    other = Backbone(short, **SIZES, positions=backbone.positions).eval()
    other.load_state_dict(backbone.state_dict())
    padded = backbone(codes, features, mask, steps=torch.full((B,), 6))
    torch.testing.assert_close(padded[:, :, :6], other(codes[..., :6], features, mask[..., :6]), rtol=1e-4, atol=1e-5)


def test_one_modality_alone_is_both_with_the_other_unseen(backbone, inputs):
    codes, features, _ = inputs
    visual_alone, none = backbone.encode(features=features)
    assert none is None
    none, audio_alone = backbone.encode(codes)
    assert none is None

    def stack(visible):
        rotary, mask = backbone._rotary_and_mask(slice(None), None, None)
        seen = torch.zeros(V + T, dtype=torch.bool)
        seen[visible] = True
        mask = seen.expand(1, 1, V + T, V + T) if mask is None else mask.masked_fill(~seen, -torch.inf)
        x = torch.cat([backbone.embed_features(features), backbone.embed_codes(codes)], dim=1)
        return backbone._modality_stack(x, V, rotary, mask)

    torch.testing.assert_close(visual_alone, stack(slice(0, V))[:, :V], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(audio_alone, stack(slice(V, None))[:, V:], rtol=1e-4, atol=1e-5)
    visual, audio = backbone.encode(codes, features)
    assert visual.shape == (B, V, 16)
    assert audio.shape == (B, T, 16)
    assert not torch.allclose(audio, audio_alone, atol=1e-3)  # together they see each other


def test_encoding_ignores_padding_and_the_other_expert(backbone, inputs):
    codes, features, _ = inputs
    steps, frames = torch.tensor([T, 7, 1]), torch.tensor([V, 1, 2])
    _, audio = backbone.encode(codes, steps=steps)
    visual, _ = backbone.encode(features=features, frames=frames)
    is_silent, is_dark = torch.arange(T) >= steps[:, None], torch.arange(V) >= frames[:, None]
    other_codes = torch.where(is_silent[:, None], torch.zeros_like(codes), codes)
    other_features = features.masked_fill(is_dark[..., None], 5.0)
    assert torch.equal(backbone.encode(other_codes, steps=steps)[1][~is_silent], audio[~is_silent])
    assert torch.equal(backbone.encode(features=other_features, frames=frames)[0][~is_dark], visual[~is_dark])
    for block in backbone.modality_blocks:
        block.visual.down.weight.data.zero_()
    assert torch.equal(backbone.encode(codes, steps=steps)[1], audio)


def test_dropout_acts_in_training_alone(inputs):
    backbone = make_backbone(dropout=0.5)
    codes, features, mask = inputs
    assert torch.equal(backbone(codes, features, mask), backbone(codes, features, mask))
    backbone.train()
    assert not torch.equal(backbone(codes, features, mask), backbone(codes, features, mask))


# --- codebooks and checkpoints


def test_codebooks_must_be_given(inputs):
    backbone = Backbone(SPEC, **SIZES)
    with pytest.raises(RuntimeError, match="set_codebooks"):
        backbone(*inputs)
    with pytest.raises(UserError, match=r"shape \(3, 11, 4\), expected \(3, 11, 5\).*'golden'"):
        backbone.set_codebooks(torch.randn(3, 11, 4))
    with pytest.raises(UserError, match="not all zero"):
        backbone.set_codebooks(torch.zeros(3, 11, 5))


def test_a_checkpoint_brings_its_codebooks(backbone, inputs):
    other = Backbone(SPEC, **SIZES, positions=backbone.positions).eval()
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(other(*inputs), backbone(*inputs))
    without = Backbone(SPEC, **SIZES, positions=backbone.positions)
    other.load_state_dict(without.state_dict())
    with pytest.raises(RuntimeError, match="set_codebooks"):
        other(*inputs)


def test_a_copy_keeps_its_own_codebooks(backbone, inputs):
    twin = copy.deepcopy(backbone)
    assert torch.equal(twin(*inputs), backbone(*inputs))
    twin.load_state_dict(Backbone(SPEC, **SIZES, positions=backbone.positions).state_dict())
    assert (twin.has_codebooks, backbone.has_codebooks) == (False, True)


def test_only_weights_and_codebooks_are_saved(backbone):
    names = set(backbone.state_dict())
    assert names == {name for name, _ in backbone.named_parameters()} | {"codebooks"}


@pytest.mark.parametrize(
    ("codes", "features"), [((B, K, T + 1), (B, V, C)), ((B, K, T), (B, V, C + 1)), ((K, T), (B, V, C))]
)
def test_refuses_other_shapes(codes, features):
    with pytest.raises(ValueError, match=r"of shape .* expected \(batch"):
        make_backbone()(torch.zeros(codes, dtype=torch.int64), torch.zeros(features))


def test_encode_needs_something():
    with pytest.raises(ValueError, match="codes, features or both"):
        make_backbone().encode()


# --- speed and precision


def test_rotary_without_padding_gives_attention_no_mask(inputs, monkeypatch):
    backbone, masks = make_backbone(), []
    attend = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask):
        masks.append(attn_mask)
        return attend(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    backbone(*inputs)
    assert masks == [None] * 3


def test_bf16_autocast_stays_close(backbone, inputs):
    expected = backbone(*inputs, steps=torch.tensor([T, 7, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = backbone(*inputs, steps=torch.tensor([T, 7, 1]))
    assert logits.dtype == torch.bfloat16
    assert F.cosine_similarity(logits.float().flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_all_blocks_share_one_attention_mask_that_no_kernel_copies(inputs, autocast, padded):
    kept = []
    lengths = {"steps": torch.tensor([T - 1, 7, 1]), "frames": torch.tensor([V, 1, 2])} if padded else {}
    short = SegmentSpec(**{**SPEC.to_dict(), "num_steps": T - 1})  # the number of positions is no multiple of 8
    backbone = Backbone(short, **SIZES, positions="alibi")
    backbone.set_codebooks(torch.randn(K, S, SPEC.code_dim))

    def keep(tensor):
        if tensor.shape[-2:] == (V + T - 1, V + T - 1):
            kept.append(tensor)
        return tensor

    codes, features, mask = inputs
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        backbone(codes[..., :-1], features, mask[..., :-1], **lengths)
    assert len(kept) == len(backbone.blocks)
    for saved in kept:
        assert saved.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert saved.untyped_storage().data_ptr() == kept[0].untyped_storage().data_ptr()
        assert all(stride % 8 == 0 for stride in saved.stride()[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_in_place_without_a_break(backbone, inputs, padded):
    lengths = {"steps": torch.tensor([T, 7, 1]), "frames": torch.tensor([V, 1, 2])} if padded else {}
    drop = torch.tensor([True, False, False])
    expected, names = backbone(*inputs, drop_features=drop, **lengths), list(backbone.state_dict())
    backbone.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(backbone(*inputs, drop_features=drop, **lengths), expected)
    assert list(backbone.state_dict()) == names
    make_backbone(backbone.positions).load_state_dict(backbone.state_dict())


# --- golden


@pytest.mark.parametrize("positions", POSITIONS)
def test_golden_logits(positions):
    tensors = load_file(GOLDEN / f"backbone_{positions}.safetensors")
    backbone = Backbone(SPEC, **SIZES, positions=positions).eval()
    backbone.load_state_dict({n.removeprefix("weight."): t for n, t in tensors.items() if n.startswith("weight.")})
    inputs = {n.removeprefix("input."): t for n, t in tensors.items() if n.startswith("input.")}
    torch.testing.assert_close(backbone(**inputs), tensors["logits"], rtol=1e-5, atol=1e-5)
