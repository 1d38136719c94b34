"""Still pictures against Pillow's reading of them, and pictures of a video in one pass against those read by place."""

import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from vab.data.media.segments import MediaError, is_picture, read_frames, read_picture, stream_frames
from vab.data.media.write import write_video

ORIENTATION = 0x0112


def ramp(height=40, width=56):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 4, y * 6, (x + y) * 2], -1).astype(np.uint8)


def over_white(image):
    image = image.convert("RGBA")
    return np.array(Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image).convert("RGB"))


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff", "jpg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
def test_every_kind_of_picture_is_read_as_pillow_reads_it(tmp_path, suffix, mode):
    image = Image.fromarray(ramp()).convert(mode)
    path = tmp_path / f"x.{suffix}"
    try:
        image.save(path, **({"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}))
    except OSError:
        pytest.skip(f"there is no {mode} in {suffix}")
    pixels, transparent = read_picture(path)
    expected = np.array(Image.open(path).convert("RGB")).astype(int)
    assert pixels.dtype == np.uint8
    assert not transparent
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() <= (1.5 if suffix == "jpg" or mode == "CMYK" else 0)
    assert is_picture(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_are_laid_over_white(tmp_path, mode):
    alpha = np.tile(np.linspace(0, 255, 56).astype(np.uint8), (40, 1))
    image = Image.fromarray(np.dstack([ramp(), alpha])).convert(mode)
    image.save(tmp_path / "x.png")
    pixels, transparent = read_picture(tmp_path / "x.png")
    assert transparent
    assert np.abs(pixels.astype(int) - over_white(image)).max() <= 1
    image.putalpha(255)
    image.save(tmp_path / "opaque.png")
    assert read_picture(tmp_path / "opaque.png")[1] is False


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(ramp()).save(path, exif=exif, **({"quality": 95} if suffix == "jpg" else {"lossless": True}))
    expected = np.array(ImageOps.exif_transpose(Image.open(path)))
    pixels = read_picture(path)[0]
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() < 1.5


def test_what_is_no_picture_is_named(tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "x.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "x.jpg")
    for name in ("x.png", "x.jpg"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"half_{name}").write_bytes(content[: len(content) // 2])
    (tmp_path / "words.png").write_text("no picture at all")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    write_video(tmp_path / "video.mp4", np.zeros((3, 32, 32, 3), np.uint8), 10, None, 16_000)
    shutil.move(tmp_path / "video.mp4", tmp_path / "video.png")
    for name in ("half_x.png", "half_x.jpg", "words.png", "empty.png", "folder.png", "video.png"):
        with pytest.raises(MediaError, match=name) as problem:
            read_picture(tmp_path / name)
        assert problem.value.reason == "unreadable"
    with pytest.raises(MediaError, match="no such file"):
        read_picture(tmp_path / "missing.png")


def test_a_stream_of_frames_is_what_reading_each_place_gives(tmp_path):
    random = np.random.default_rng(0)
    write_video(tmp_path / "x.mp4", random.integers(0, 255, (250, 32, 32, 3), dtype=np.uint8), 25, None, 16_000)
    times = np.sort(random.uniform(0, 11.0, 300))  # the video has 10 s
    pieces = []
    running = stream_frames(tmp_path / "x.mp4", times, pieces.append)
    assert len(pieces) > 3  # handed over on the way, not at the end
    frames = np.concatenate(pieces)
    assert len(frames) == len(times)
    assert running.tolist() == (times < 10.0).tolist()
    for number in (0, 1, 77, 150, 230):
        alone = read_frames(tmp_path / "x.mp4", 1000.0, times[number] - 0.0005, 1)
        assert np.array_equal(frames[number], alone.frames[0])
    last = read_frames(tmp_path / "x.mp4", 1000.0, 9.99, 1).frames[0]
    assert (frames[~running] == last).all()


def test_of_a_video_that_ends_before_the_first_time_the_last_picture_is_taken(tmp_path):
    shades = (np.arange(5, dtype=np.uint8) * 40)[:, None, None, None]
    write_video(tmp_path / "x.mp4", np.broadcast_to(shades, (5, 32, 32, 3)), 10, None, 16_000)
    taken = []
    running = stream_frames(tmp_path / "x.mp4", np.array([0.7, 0.9]), taken.append)
    assert running.tolist() == [True, False]
    assert np.concatenate(taken).shape == (2, 32, 32, 3)
    assert abs(int(np.concatenate(taken).mean()) - 160) < 6


def test_a_picture_is_the_same_however_often_it_is_read(tmp_path):
    # Slices of several threads overran each other in one of a hundred readings of a width that fills no vector.
    Image.fromarray(ramp()).save(tmp_path / "x.jpg", quality=95)
    first = read_picture(tmp_path / "x.jpg")[0]
    assert all(np.array_equal(read_picture(tmp_path / "x.jpg")[0], first) for _ in range(1000))
