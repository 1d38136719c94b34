"""Models of open_clip with random weights: the same vectors as open_clip's own way, and the traps on that way."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vab.frozen import clip
from vab.frozen.clip import Wanted, parse
from vab.frozen.vision import load_vision
from vab.spec import UserError

open_clip = pytest.importorskip("open_clip")

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
CLIP = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
TIMM = {"image_size": 32, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_proj": None}
MODELS = {
    "clip": ({"embed_dim": 12, "vision_cfg": VIT, "text_cfg": TEXT}, CLIP),
    "quick": ({"embed_dim": 12, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT}, CLIP),
    "siglip": (
        {
            "embed_dim": 12,
            "custom_text": True,
            "vision_cfg": {**TIMM, "timm_pool": "token"},
            "text_cfg": TEXT,
        },
        SIGLIP,
    ),
}


def publish(folder, config, preprocessing):
    """A folder as on the hub; gives open_clip's own model of the same weights."""
    folder.mkdir(parents=True)
    facts = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(facts))
    torch.manual_seed(5)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return open_clip.create_model(f"local-dir:{folder}").eval()


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
    pixels = encoder.preprocess(wide_frames())  # the transform is there now, and does not travel
    pickled = pickle.dumps(encoder.preprocessor())
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)(wide_frames()), pixels)
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
    place = clip._place(wanted, Path("anywhere.bin"), open_clip)
    assert place.preprocessing["mean"][0] == mean
    assert place.preprocessing.get("resize_mode", "shortest") == resize
    assert place.quick_gelu == (name.endswith(("/openai", "/dfn5b")))
    assert open_clip.get_model_config(place.model)["vision_cfg"]["image_size"] == size
