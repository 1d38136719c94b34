"""The benchmark measures what it says: work counted as torch counts it, a twin that decodes rightly, a table of it."""

import gc
import importlib.util
import json
import mmap

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.codecs import RandomEncodec, fitted
from bench.generate import main
from bench.measure import paper_spec
from bench.timing import Timed, measured, peak_memory, reset_peak_memory
from vab.backbone import Backbone
from vab.flops import pass_flops
from vab.frozen.codec import load_codec
from vab.spec import SegmentSpec

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
CPU = torch.device("cpu")


def small_spec() -> SegmentSpec:
    return SegmentSpec(1.0, 16000, 7.0, 3, 32, 5, 7, 2.0, 2, 6, "c", "0", "v", "0")


def counted(work) -> int:
    """FLOPs as torch counts them, attention as matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture
def twin():
    pytest.importorskip("transformers")
    from bench.autoregressive import AutoregressiveTwin

    torch.manual_seed(0)
    return AutoregressiveTwin(small_spec(), dim=16, num_heads=2, num_layers=2, feedforward_ratio=4).eval()


@pytest.mark.parametrize("layers", [(1, 0), (2, 3)])
def test_flops_of_a_pass_are_what_torch_counts(layers):
    arguments = {"dim": 16, "num_heads": 2, "num_modality_layers": layers[0], "num_joint_layers": layers[1]}
    arguments["feedforward_ratio"] = 3
    spec = small_spec()
    backbone = Backbone(spec, **arguments).eval()
    backbone.set_codebooks(torch.randn(3, 32, 5))
    codes, features = torch.zeros(4, 3, 7, dtype=torch.int64), torch.randn(4, 2, 6)
    assert pass_flops(spec, arguments, 4) == counted(lambda: backbone(codes, features, codes == 0))


def test_flops_of_the_twin_are_what_torch_counts(twin):
    assert twin.flops(3, 6) == counted(lambda: twin.generate(torch.randn(3, 2, 6), top_k=4))
    assert twin.flops(3, 3) == counted(lambda: twin.generate(torch.randn(3, 2, 6), top_k=4, guidance_scale=1.0))


def test_the_cached_steps_of_the_twin_are_one_pass_over_the_whole_sequence(twin):
    spec, features = twin.spec, torch.randn(2, 2, 6)
    codes = twin.generate(features, top_k=1, guidance_scale=3.0)  # greedy
    assert codes.shape == (2, 3, 7)
    assert 0 <= int(codes.min()) <= int(codes.max()) < spec.codebook_size
    # Step n reads what was made at n - 1: level k of moment n - 1 - k, the special entry where there is none.
    sequence = torch.full((2, 3, spec.num_steps + 3), spec.codebook_size)
    for k in range(3):
        sequence[:, k, 1 + k : 1 + k + spec.num_steps] = codes[:, k]
    memory = twin.visual_input(features)
    memory = torch.cat([memory, torch.zeros_like(memory)])
    rows = sequence[..., :-1].repeat(2, 1, 1).flatten(0, 1)
    logits = twin.decoder(rows, encoder_hidden_states=memory).logits.view(4, 3, -1, spec.codebook_size)
    with_video, without_video = logits.chunk(2)
    likeliest = (without_video + 3.0 * (with_video - without_video)).argmax(-1)  # (B, K, T + K - 1)
    for k in range(3):
        assert torch.equal(codes[:, k], likeliest[:, k, k : k + spec.num_steps])


def test_the_twin_listens_to_the_video(twin):
    one, other = (twin.generate(features, top_k=1) for features in 1000 * torch.randn(2, 1, 2, 6))
    assert not torch.equal(one, other)


def test_the_clock_counts_every_call_and_nothing_else():
    network = Timed(torch.nn.Linear(256, 256), CPU)

    def work() -> None:
        for _ in range(3):
            network(torch.zeros(512, 256))

    seconds, _ = measured(work, CPU)
    assert len(network.marks) == 3
    assert 0 < network.seconds() < seconds
    assert torch.equal(network(torch.ones(1, 256)), network.network(torch.ones(1, 256)))


def test_peak_memory_sees_what_came_and_went():
    if peak_memory(CPU) is None:
        pytest.skip("the system does not say")
    gc.collect()  # what earlier tests left must not go in between
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    # From the system itself: a tensor may lie in memory that earlier tests gave back and the process kept.
    with mmap.mmap(-1, 64 * 2**20) as came_and_goes:
        came_and_goes[:: mmap.PAGESIZE] = b"1" * (64 * 2**20 // mmap.PAGESIZE)
    assert 60 * 2**20 < peak_memory(CPU) - before < 200 * 2**20
    reset_peak_memory(CPU)
    assert peak_memory(CPU) - before < 40 * 2**20


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_codec_has_the_paper_s_numbers_and_reads_the_sum_of_its_codebooks():
    pytest.importorskip("encodec")
    codec = RandomEncodec(num_filters=2).freeze()
    spec = paper_spec(0.5)
    assert (codec.num_codebooks, codec.codebook_size, codec.code_dim) == (4, 2048, 128)
    assert (codec.sample_rate, codec.code_rate) == (spec.sample_rate, spec.code_rate)
    codes = torch.randint(0, 2048, (2, 4, spec.num_steps))
    summed = sum(codec.codebooks()[k][codes[:, k]] for k in range(4)).transpose(1, 2)  # (B, code_dim, T)
    with torch.no_grad():
        expected = codec.decoder(summed)
    torch.testing.assert_close(codec.decode(codes, 8000), expected[..., :8000])


def test_codes_of_a_larger_codec_are_folded_into_the_tiny_one_s_range():
    codec = load_codec("tiny")
    codes = fitted(torch.randint(0, 2048, (1, 4, 25)), codec)
    assert codec.decode(codes, 8000).shape == (1, 1, 8000)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_table_and_the_file_hold_what_was_measured(tmp_path, capsys):
    file = tmp_path / "table.json"
    sizes = ["--sizes", "tiny", "--batches", "2", "1", "--steps", "2", "--seconds", "1"]
    main([*sizes, "--device", "cpu", "--json", str(file)])
    out = capsys.readouterr().out
    content = json.loads(file.read_text())
    systems = ["vab", "autoregressive"] if HAS_TRANSFORMERS else ["vab"]
    rows = {(row["batch"], row["system"]): row for row in content["rows"]}
    assert set(rows) == {(batch, system) for batch in (1, 2) for system in systems}
    for row in rows.values():
        assert 0 < row["network_seconds"] < row["loop_seconds"]
        assert row["network_share"] == row["network_seconds"] / row["loop_seconds"]
        assert row["total_seconds"] > row["codec_seconds"] / 2 > 0
    assert rows[2, "vab"]["flops"] == 2 * rows[1, "vab"]["flops"]
    assert rows[1, "vab"]["calls"] == 2
    if HAS_TRANSFORMERS:
        assert rows[1, "autoregressive"]["calls"] == 53
        ratio = rows[2, "autoregressive"]["total_seconds"] / rows[2, "vab"]["total_seconds"]
        line = next(line for line in out.splitlines() if "autoregressive" in line and "|     2 |" in line)
        assert line.split("|")[-2].strip() == f"{ratio:.1f}"
    assert "--sizes tiny small base paper" in out  # what was left out, and how to get it


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sizes", "huge"], "no backbone 'huge': configs/backbone has base, paper, small, tiny"),
        (["--steps", "0"], "decode_steps must be at least 1"),
        (["--batches", "0"], "must be at least 1"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
    ],
)
def test_a_mistake_is_one_line(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--device", "cpu"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert expected in error
    assert len(error.splitlines()) == 1


def test_the_loaders_table_has_every_peer(capsys, tmp_path):
    from bench.loader import main as loader

    pytest.importorskip("litdata")
    loader(["--records", "64", "--batch_size", "8", "--passes", "1", "--workers", "0", "--scratch", str(tmp_path)])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    rates = {row["what"]: row["records_per_second"] for row in figures["rows"]}
    assert rates.keys() == {"reading the tars' bytes, in order", "webdataset", "vab", "LitData"}
    assert rates["reading the tars' bytes, in order"] > rates["vab"] > rates["webdataset"] > 0
    assert not list(tmp_path.iterdir())


def test_the_training_table_has_every_peer_of_equal_work(capsys, tmp_path):
    from bench.peers import PEERS, installed
    from bench.train import ALL_SCORED, OURS
    from bench.train import main as train

    file = tmp_path / "table.json"
    train(
        [
            "--size",
            "tiny",
            "--batch_size",
            "2",
            "--rounds",
            "2",
            "--seconds",
            "1",
            "--device",
            "cpu",
            "--json",
            str(file),
        ]
    )
    rows = {row["system"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["vab", "vab, all codes scored", *installed()]
    assert len({row["flops"] for row in rows.values()}) == 1
    for row in rows.values():
        assert len(row["seconds"]) == 2
        assert 0 < row["outside"] < 1
        assert row["peak_bytes"] > 16 * row["parameters"]
    out = capsys.readouterr().out
    best = max(1 / min(row["seconds"]) for name, row in rows.items() if name not in (OURS, ALL_SCORED))
    line = next(line for line in out.splitlines() if line.startswith("|") and " vab |" in line)
    assert f"{1 / min(rows['vab']['seconds']) / best:.3f}" in line
    assert set(installed()) <= set(PEERS)


@pytest.mark.parametrize("name", ["torch.nn.TransformerEncoder", "x-transformers", "transformers' BERT"])
def test_a_peer_has_the_same_width_layers_and_feed_forward(name):
    from bench.peers import PEERS, Peer, installed
    from vab.losses import masked_code_loss

    if name not in installed():
        pytest.skip(f"{name} is not installed")
    sizes = {"dim": 16, "num_heads": 2, "num_modality_layers": 1, "num_joint_layers": 2, "feedforward_ratio": 3}
    sizes["dropout"] = 0.0
    peer = Peer(small_spec(), sizes, PEERS[name][1](sizes))
    peer.set_codebooks(torch.randn(3, 32, 5))
    matrices = [weight.numel() for weight in peer.encoder.parameters() if weight.dim() == 2]
    assert sum(matrices) == 3 * (4 + 2 * 3) * 16**2
    codes, features = torch.zeros(4, 3, 7, dtype=torch.int64), torch.randn(4, 2, 6)
    loss = masked_code_loss(peer(codes, features, codes == 0), codes, codes == 0)
    loss.backward()
    trained = [weight.grad is not None for weight in peer.encoder.parameters() if weight.dim() == 2]
    assert all(trained)


def test_a_mistake_in_the_training_bench_is_one_line(capsys):
    from bench.train import main as train

    with pytest.raises(SystemExit) as stopped:
        train(["--size", "huge", "--device", "cpu"])
    assert stopped.value.code == 2
    assert "no backbone 'huge'" in capsys.readouterr().err
