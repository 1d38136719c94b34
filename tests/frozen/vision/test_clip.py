"""Models of open_clip with random weights: the same vectors as open_clip's own way, and the traps on that way."""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clip_weights import CLIP, MODELS, SIGLIP, TIMM, VIT, publish
from PIL import Image

from vab.data.extract.cutting import Segment
from vab.data.extract.encode import encode_pictures
from vab.frozen.vision import clip_files, load_vision
from vab.frozen.vision.clip import OpenClip, _resizer, in_equal_batches
from vab.frozen.vision.clip_files import Wanted, parse
from vab.spec import UserError

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return root, {name: publish(root / name, *facts) for name, facts in MODELS.items()}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("VAB_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))


def wide_frames():
    """(2, 40, 100, 3): far from square, all parts different, so that a wrong resizing or cropping shows."""
    rows, columns = np.mgrid[:40, :100]
    first = np.stack([2.5 * columns, 6 * rows, 255 * ((rows // 5 + columns // 7) % 2)], axis=-1)
    return np.stack([first, first[:, ::-1]]).astype(np.uint8)


def own_pixels(frames, settings, size=32):
    """What open_clip's documentation says of its transform, with PIL and numpy alone."""
    out = []
    for frame in frames:
        picture = Image.fromarray(frame)
        if settings["resize_mode"] == "squash":
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        else:
            width, height = picture.size
            scale = size / min(width, height)
            picture = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
            left, top = round((picture.size[0] - size) / 2), round((picture.size[1] - size) / 2)
            picture = picture.crop((left, top, left + size, top + size))
        values = np.asarray(picture, np.float32) / 255
        out.append((values - np.float32(settings["mean"])) / np.float32(settings["std"]))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [32, (32, 32), (24, 48), (48, 24)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_pixels_are_open_clips_own_bit_for_bit(mode, interpolation, size):
    """Against its evaluation transform, for pictures of many shapes: before its ToTensor, and after normalising."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = {"size": size, "resize_mode": mode, "interpolation": interpolation, "fill_color": 7}
    transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    *steps, _, normalise = transform.transforms
    resizer = _resizer(settings)
    random = np.random.default_rng(0)
    for height, width in ((32, 32), (40, 100), (100, 40), (7, 5), (33, 32), (31, 90), (64, 64), (181, 320)):
        frame = random.integers(0, 256, (height, width, 3), np.uint8)
        picture = Image.fromarray(frame)
        for step in steps:
            picture = step(picture)
        (pixels,) = resizer(frame[None])
        assert np.array_equal(pixels, np.moveaxis(np.asarray(picture), 2, 0)), (height, width)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (normalise.mean, normalise.std))
        own = OpenClip.normalise(SimpleNamespace(mean=mean, std=std), torch.from_numpy(pixels))
        assert torch.equal(own, transform(Image.fromarray(frame)))


@pytest.mark.parametrize("change", [{"resize_mode": "crop"}, {"interpolation": "nearest"}])
def test_an_unknown_way_of_resizing_is_refused(change, published, tmp_path):
    shutil.copytree(published[0] / "clip", tmp_path / "a")
    config = tmp_path / "a/open_clip_config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | {"preprocess_cfg": facts["preprocess_cfg"] | change}))
    (key,) = change
    with pytest.raises(UserError, match=f"{key} must be .*, got '{change[key]}'"):
        load_vision(f"local-dir:{tmp_path / 'a'}")


@pytest.mark.parametrize("name", list(MODELS))
def test_batches_on_a_gpu_have_one_size_and_frames_one_vector(name, published):
    """What runs on a GPU, here on the CPU: a frame's vector is the same in any company and at any place."""
    encoder = load_vision(f"local-dir:{published[0] / name}")
    pixels = torch.randint(0, 256, (11, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = []

    def run(batch):
        sizes.append(len(batch))
        return encoder._features(batch)

    whole = in_equal_batches(run, pixels, 4)
    parts = torch.cat([in_equal_batches(run, part, 4) for part in pixels.split([1, 7, 3])])
    assert set(sizes) == {4}
    assert torch.equal(whole, parts)
    torch.testing.assert_close(whole, encoder.encode(pixels), atol=1e-5, rtol=1e-5)
    assert in_equal_batches(run, pixels[:0], 4).shape == (0, 12)


@pytest.mark.parametrize("name", ["clip", "tiny"])
def test_pictures_of_many_segments_are_encoded_together_and_as_alone(name, published, monkeypatch):
    """Bit for bit; `tiny`, whose frames are not independent of each other, gets those of one segment at a time."""
    encoder = load_vision(f"local-dir:{published[0] / name}" if name == "clip" else name)
    side, random, calls = encoder.resizer.size[0], np.random.default_rng(0), []
    lengths = (3, 0, 5, 1)
    pixels = [random.integers(0, 256, (count, 3, side, side), np.uint8) for count in lengths]
    segments = [Segment(0.0, np.zeros(1, np.float32), 1, some, len(some), 0.0) for some in pixels]
    alone = [encode_pictures(encoder, [segment], 5, torch.device("cpu")) for segment in segments]
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    together = encode_pictures(encoder, segments, 5, torch.device("cpu"))
    assert calls == ([9] if name == "clip" else [3, 5, 1])
    assert np.array_equal(together, np.concatenate(alone))
    assert together.dtype == np.float16
    assert np.array_equal(together[0, 3:], together[0, [2, 2]])  # the last picture stays
    assert not together[1].any()


@pytest.mark.parametrize(
    ("capability", "option", "precision"),
    [
        ((9, 0), "", "bfloat16"),
        ((8, 0), "", "bfloat16"),
        ((7, 5), "", "float32"),
        ((9, 0), ",float32", "float32"),
        ((9, 0), ",fp16", "float16"),
    ],
)
def test_the_device_decides_on_the_precision_unless_the_user_does(
    capability, option, precision, published, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    encoder = OpenClip(f"local-dir:{published[0] / 'clip'}{option}", device="cuda")
    assert encoder.precision == precision
    assert next(encoder.visual.parameters()).dtype == getattr(torch, precision)
    assert load_vision(f"local-dir:{published[0] / 'clip'}{option}").precision == (
        "float16" if option == ",fp16" else "float32"
    )


@pytest.mark.parametrize("name", list(MODELS))
def test_vectors_of_a_wide_picture_are_open_clips_own(name, published):
    root, models = published
    encoder = load_vision(f"local-dir:{root / name}")
    pixels = encoder.preprocess(wide_frames())
    torch.testing.assert_close(pixels, own_pixels(wide_frames(), MODELS[name][1]), atol=1e-5, rtol=0)
    with torch.no_grad():
        expected = models[name].encode_image(pixels)
        unit = models[name].encode_image(pixels, normalize=True)
    assert encoder.feature_dim == 12
    torch.testing.assert_close(encoder.encode(pixels), expected)
    assert float((expected[0] - expected[1]).norm() / expected.norm()) > 0.01  # it sees which way round
    normalised = load_vision(f"local-dir:{root / name},normalised")
    torch.testing.assert_close(normalised.encode(pixels), unit)
    # The other way to prepare pixels gives something else, which only shows on pictures that are not square.
    other = "siglip" if name != "siglip" else "clip"
    wrong = load_vision(f"local-dir:{root / other}").preprocess(wide_frames())
    assert float((encoder.encode(wrong) - expected).norm() / expected.norm()) > 0.01


@pytest.mark.parametrize(("name", "width"), [("clip", 32), ("siglip", 64)])
def test_pooled_is_what_the_last_projection_reads(name, width, published):
    root, models = published
    encoder = load_vision(f"local-dir:{root / name},pooled")
    assert encoder.feature_dim == width
    pooled = encoder.encode(encoder.preprocess(wide_frames()))
    visual = models[name].visual
    with torch.no_grad():
        projected = pooled @ visual.proj if name == "clip" else visual.trunk.head(pooled)
        torch.testing.assert_close(projected, visual(encoder.preprocess(wide_frames())))


@pytest.mark.parametrize("option", ["bf16", "fp16"])
def test_half_precision_is_near_and_is_given_as_float32(option, published):
    root, _ = published
    full, half = (load_vision(f"local-dir:{root / 'clip'}{more}") for more in ("", f",{option}"))
    pixels = full.preprocess(wide_frames())
    expected, got = full.encode(pixels), half.encode(pixels)
    assert got.dtype == torch.float32
    assert (full.precision, half.precision) == ("float32", {"bf16": "bfloat16", "fp16": "float16"}[option])
    assert 0 < float((got - expected).norm() / expected.norm()) < 0.03


def test_golden_vector_of_a_wide_picture(published):
    """Values of these weights, so that a change of any package on the way is seen."""
    encoder = load_vision(f"local-dir:{published[0] / 'clip'}")
    features = encoder.encode(encoder.preprocess(wide_frames()))
    torch.testing.assert_close(features[0, :4], torch.tensor(GOLDEN), atol=2e-4, rtol=0)


GOLDEN = [1.4812, -1.3732, -0.8531, -0.4837]


def test_it_says_what_it_does(published):
    encoder = load_vision(f"local-dir:{published[0] / 'siglip'}")
    for words in ("resize_mode squash", "interpolation bicubic", "mean [0.5, 0.5, 0.5]", "size [32, 32]"):
        assert words in encoder.preprocessing
    assert "QuickGELU" not in encoder.preprocessing
    assert "QuickGELU" in load_vision(f"local-dir:{published[0] / 'quick'}").preprocessing
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_the_preprocessor_travels_without_the_network(published):
    encoder = load_vision(f"local-dir:{published[0] / 'clip'}")
    pickled = pickle.dumps(encoder.resizer)
    assert len(pickled) < 1000
    pixels = torch.from_numpy(pickle.loads(pickled)(wide_frames()))
    assert pixels.dtype == torch.uint8
    assert torch.equal(encoder.normalise(pixels), encoder.preprocess(wide_frames()))
    assert torch.equal(encoder.encode(pixels), encoder.encode(encoder.preprocess(wide_frames())))
    with pytest.raises(ValueError, match=r"\(V, H, W, 3\) uint8"):
        encoder.preprocess(wide_frames().astype(np.float32))


@pytest.fixture
def built_in(monkeypatch, tmp_path):
    """Two small models among open_clip's built-in ones, each with weights under the tag openai, and another."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small", MODELS["clip"][0])
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small-quickgelu", MODELS["quick"][0])
    facts = {"quick_gelu": True, "hf_hub": "them/small/", **CLIP}
    plain = {"url": "https://example.invalid/plain-1234.pt", **SIGLIP}
    for name in ("Small", "Small-quickgelu"):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"openai": facts, "plain": plain})
    monkeypatch.setenv("VAB_WEIGHTS", str(tmp_path))
    return tmp_path


def test_weights_trained_with_quick_gelu_get_it_whatever_the_name(built_in, published):
    root, models = published
    shutil.copy(root / "quick/open_clip_pytorch_model.bin", built_in / "some.bin")
    for name in ("Small/openai", "Small-quickgelu/openai"):
        encoder = load_vision(name, weights=built_in / "some.bin")
        pixels = encoder.preprocess(wide_frames())
        with torch.no_grad():
            torch.testing.assert_close(encoder.encode(pixels), models["quick"].encode_image(pixels))
        without = load_vision("Small/plain", weights=built_in / "some.bin")
        assert not torch.allclose(without.encode(pixels), encoder.encode(pixels), atol=1e-3)
    with pytest.raises(UserError, match="has QuickGELU, its weights plain were trained without: type Small/plain"):
        load_vision("Small-quickgelu/plain", weights=built_in / "some.bin")


def test_pixels_are_prepared_as_the_tag_says_also_for_a_file_of_ones_own(built_in, published):
    for tag, settings in (("openai", CLIP), ("plain", SIGLIP)):
        encoder = load_vision(f"Small/{tag}", weights=published[0] / "clip/open_clip_pytorch_model.bin")
        torch.testing.assert_close(
            encoder.preprocess(wide_frames()), own_pixels(wide_frames(), settings), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("place", ["Small/openai.bin", "small/open_clip_pytorch_model.bin"])
def test_weights_of_a_tag_are_found_where_they_are_put(place, built_in, published):
    with pytest.raises(UserError, match=r"needs its weights \(them/small as published\).*HF_HUB_OFFLINE.*VAB_WEIGHTS"):
        load_vision("Small/openai")
    (built_in / place).parent.mkdir()
    shutil.copy(published[0] / "quick/open_clip_pytorch_model.bin", built_in / place)
    assert load_vision("Small/openai").name == "Small/openai"


def test_weights_of_an_address_are_found_by_their_file_name(built_in, published):
    with pytest.raises(UserError, match=r"plain-1234\.pt as published.*HF_HUB_OFFLINE forbids"):
        load_vision("Small/plain")
    shutil.copy(published[0] / "clip/open_clip_pytorch_model.bin", built_in / "plain-1234.pt")
    assert load_vision("Small/plain,normalised").normalised


def test_a_model_of_the_hub_is_found_in_its_cache(published, monkeypatch, tmp_path):
    import huggingface_hub.constants

    with pytest.raises(UserError, match=r"hf-hub:them/model is not in the hub's cache.*VAB_WEIGHTS"):
        load_vision("hf-hub:them/model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    revision = "1" * 40
    snapshot = tmp_path / "models--them--model" / "snapshots" / revision
    shutil.copytree(published[0] / "siglip", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(revision)
    encoder = load_vision("hf-hub:them/model,pooled")
    assert encoder.name == "hf-hub:them/model,pooled"
    assert "squash" in encoder.preprocessing
    monkeypatch.setenv("VAB_WEIGHTS", str(published[0]))
    assert "shortest" in load_vision("hf-hub:any/clip").preprocessing
    assert load_vision("hf-hub:any/other", weights=published[0] / "clip").weight_hash != encoder.weight_hash


def test_a_folder_that_does_not_say_how_to_prepare_pixels_is_refused(published, tmp_path):
    shutil.copytree(published[0] / "siglip", tmp_path / "a")
    config = tmp_path / "a/open_clip_config.json"
    facts = json.loads(config.read_text())
    for change in ({"preprocess_cfg": {}}, {"preprocess_cfg": {"mean": [0.5] * 3}}):
        config.write_text(json.dumps(facts | change))
        with pytest.raises(UserError, match="does not say how pixels are prepared"):
            load_vision(f"local-dir:{tmp_path / 'a'}")
    config.write_text(json.dumps({"embed_dim": 3}))
    with pytest.raises(UserError, match="lacks model_cfg"):
        load_vision(f"local-dir:{tmp_path / 'a'}")
    config.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_vision(f"local-dir:{tmp_path / 'a'}")
    config.unlink()
    with pytest.raises(UserError, match=r"there is no .*open_clip_config\.json"):
        load_vision(f"local-dir:{tmp_path / 'a'}")


def test_weights_of_another_model_are_refused(published, tmp_path):
    shutil.copytree(published[0] / "siglip", tmp_path / "a")
    shutil.copy(published[0] / "clip/open_clip_pytorch_model.bin", tmp_path / "a")
    with pytest.raises(UserError, match="does not hold the weights of local-dir"):
        load_vision(f"local-dir:{tmp_path / 'a'}")
    (tmp_path / "a/open_clip_pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has no file of weights: expected one of"):
        load_vision(f"local-dir:{tmp_path / 'a'}")


def test_names():
    assert parse("EVA02-L-14-336/merged2b_s6b_b61k") == Wanted("EVA02-L-14-336", "merged2b_s6b_b61k")
    assert parse("hf-hub:timm/x, pooled,bf16") == Wanted("hf-hub:timm/x", "", "pooled", dtype="bf16")
    assert parse("local-dir:/a/b,normalised") == Wanted("local-dir:/a/b", "", normalised=True)
    for name, words in (
        ("ViT-B-32", "expected MODEL/TAG"),
        ("ViT-B-32/openai,int8", "unknown option 'int8'"),
        ("ViT-B-32/openai,bf16,fp16", "'fp16' and 'bf16' do not go together"),
    ):
        with pytest.raises(UserError, match=words):
            parse(name)
    with pytest.raises(UserError, match=r"open_clip has no model 'EVA02-L': did you mean EVA02-L-14"):
        load_vision("EVA02-L/a")
    with pytest.raises(UserError, match=r"no weights 'a' of EVA02-L-14-336, it has: merged2b_s6b_b61k"):
        load_vision("EVA02-L-14-336/a")


@pytest.mark.parametrize(
    ("name", "size", "resize", "mean"),
    [
        ("EVA02-L-14-336/merged2b_s6b_b61k", 336, "shortest", 0.48145466),
        ("EVA01-g-14/laion400m_s11b_b41k", 224, "shortest", 0.48145466),
        ("ViT-L-14/openai", 224, "shortest", 0.48145466),
        ("ViT-B-16-SigLIP2-256/webli", 256, "squash", 0.5),
        ("ViT-H-14-quickgelu/dfn5b", 224, "squash", 0.48145466),
        ("PE-Core-L-14-336/meta", 336, "squash", 0.5),
    ],
)
def test_published_models_get_the_pixels_and_the_gelu_that_they_were_trained_with(name, size, resize, mean):
    """Of the models that the field uses, what is asked of open_clip; their weights are not here."""
    wanted = parse(name)
    place = clip_files.place_of(wanted, Path("anywhere.bin"), open_clip)
    assert place.preprocessing["mean"][0] == mean
    assert place.preprocessing.get("resize_mode", "shortest") == resize
    assert place.quick_gelu == (name.endswith(("/openai", "/dfn5b")))
    assert open_clip.get_model_config(place.model)["vision_cfg"]["image_size"] == size


def test_a_model_whose_text_half_only_the_hub_has_needs_no_network(published, tmp_path):
    root, models = published
    for name, more in (("hub_text", {"hf_model_name": "nobody/no-such-model"}), ("captions", {"vocab_size": 64})):
        shutil.copytree(root / "clip", tmp_path / name)
        config = tmp_path / name / "open_clip_config.json"
        facts = json.loads(config.read_text())
        facts["model_cfg"]["text_cfg"] = {**facts["model_cfg"]["text_cfg"], **more}
        if name == "captions":  # CoCa
            facts["model_cfg"]["custom_text"] = True
            facts["model_cfg"]["multimodal_cfg"] = {"context_length": 8, "width": 12, "heads": 2, "layers": 1}
        config.write_text(json.dumps(facts))
        encoder = load_vision(f"local-dir:{tmp_path / name}")
        pixels = encoder.preprocess(wide_frames())
        with torch.no_grad():
            torch.testing.assert_close(encoder.encode(pixels), models["clip"].encode_image(pixels))


def test_weights_of_another_image_size_are_refused_and_not_stretched(built_in, published, monkeypatch):
    bigger = MODELS["clip"][0] | {"vision_cfg": {**VIT, "image_size": 64}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Small", bigger)
    expected = r"visual\.positional_embedding is \(17, 32\), expected \(65, 32\): it is for another image size"
    with pytest.raises(UserError, match=expected):
        load_vision("Small/plain", weights=published[0] / "clip/open_clip_pytorch_model.bin")


def test_weights_of_which_some_have_another_shape_are_refused(published, tmp_path):
    shutil.copytree(published[0] / "siglip", tmp_path / "a")
    file = tmp_path / "a/open_clip_pytorch_model.bin"
    state = torch.load(file)
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, file)
    assert load_vision(f"local-dir:{tmp_path / 'a'}").feature_dim == 12  # as its trainer had them
    state["visual.trunk.pos_embed"] = state["visual.trunk.pos_embed"][:, :-7]
    torch.save(state, file)
    with pytest.raises(
        UserError, match=r"pos_embed is \(1, 94, 64\), expected \(1, 101, 64\): it is for another image"
    ):
        load_vision(f"local-dir:{tmp_path / 'a'}")
    del state["visual.trunk.pos_embed"]
    torch.save(state, file)
    with pytest.raises(UserError, match=r"does not hold the weights of .*Missing key.*trunk\.pos_embed"):
        load_vision(f"local-dir:{tmp_path / 'a'}")


def test_pictures_that_the_network_does_not_take_are_refused(published, tmp_path):
    shutil.copytree(published[0] / "clip", tmp_path / "a")
    config = tmp_path / "a/open_clip_config.json"
    facts = json.loads(config.read_text())
    facts["model_cfg"]["vision_cfg"]["image_size"] = 34  # positions for 32, as 34 is not a multiple of the patch
    config.write_text(json.dumps(facts))
    assert load_vision(f"local-dir:{tmp_path / 'a'}").preprocess(wide_frames()).shape[-1] == 34
    facts["model_cfg"]["vision_cfg"] = {**TIMM, "timm_model_name": "vit_tiny_patch16_224"}
    model = open_clip.create_model("ViT-B-32", load_weights=False, vision_cfg=facts["model_cfg"]["vision_cfg"])
    torch.save(model.state_dict(), tmp_path / "a/open_clip_pytorch_model.bin")
    facts["model_cfg"]["embed_dim"] = 512
    config.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="does not take pictures of 32 x 32: Input height"):
        load_vision(f"local-dir:{tmp_path / 'a'}")


def test_packages_are_those_of_its_layers(published):
    own = ("open_clip_torch", "torchvision", "pillow")
    assert load_vision(f"local-dir:{published[0] / 'clip'}").packages == own
    assert load_vision(f"local-dir:{published[0] / 'siglip'}").packages == (*own, "timm")
    assert load_vision("tiny").packages == ()
