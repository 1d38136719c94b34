"""Still pictures against Pillow's reading of them, and pictures of a video in one pass against those read by place."""

import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from vab.data.media.pictures import tone_mapped
from vab.data.media.segments import MediaError, is_picture, read_frames, read_picture, read_segments, stream_frames
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


def test_a_picture_of_16_bits_is_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 40 * 56).reshape(40, 56).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    pixels, _ = read_picture(tmp_path / "x.png")
    assert np.array_equal(pixels[..., 1], levels >> 8)


@pytest.mark.parametrize(("pixel", "size"), [((2, 1), (48, 128)), ((2, 3), (72, 64)), ((448, 447), (48, 64))])
def test_pixels_that_are_not_square_are_stretched(tmp_path, pixel, size):
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", 5, width=64, height=48, pix_fmt="yuv420p")
        stream.codec_context.sample_aspect_ratio = Fraction(*pixel)
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(ramp(48, 64), format="rgb24")))
        container.mux(stream.encode())
    frames = read_frames(tmp_path / "x.mp4", 5.0, count=5).frames
    assert frames.shape[1:3] == size
    expected = np.array(Image.fromarray(ramp(48, 64)).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(frames[2] - expected).mean() < 6


@pytest.mark.parametrize(("transfer", "white"), [(16, 0.5807), (18, 0.75)])
def test_hdr_is_mapped_to_what_a_common_screen_shows(tmp_path, transfer, white):
    # Codes of diffuse white (203 cd/m2) by ITU-R BT.2408, table 1; at the right the brightest there is.
    grey = np.zeros((32, 96, 3), np.uint16)
    grey[:, 32:64], grey[:, 64:] = round(white * 65535), 65535
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        stream = container.add_stream("libx265", 5, width=96, height=32, pix_fmt="yuv420p10le")
        stream.options = {"x265-params": "log-level=none"}
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, 9, 9
        frame = av.VideoFrame.from_ndarray(grey, format="rgb48le")
        for number in range(5):
            converted = frame.reformat(format="yuv420p10le", dst_colorspace=9)
            converted.color_trc, converted.pts = transfer, number
            container.mux(stream.encode(converted))
        container.mux(stream.encode())
    picture = read_frames(tmp_path / "x.mkv", 5.0, count=1).frames[0].astype(int)
    black, diffuse, brightest = (picture[8:24, x : x + 16].mean() for x in (8, 40, 72))
    assert black < 3
    assert 238 < diffuse < 250
    assert brightest > 253
    red = np.zeros((1, 1, 3), np.uint16)
    red[..., 0] = round(white * 65535)
    assert tone_mapped(red, transfer)[0, 0].tolist()[1:] == [0, 0]


def test_pictures_have_no_padded_rows(tmp_path):
    write_video(tmp_path / "x.mp4", np.zeros((4, 32, 90, 3), np.uint8), 4, None, 16_000)  # 270 bytes a row
    seen = []
    (_,) = read_segments(tmp_path / "x.mp4", None, 4.0, [0.0], 1.0, lambda picture: seen.append(picture) or picture)
    assert len(seen) == 4
    assert all(picture.flags.c_contiguous for picture in seen)


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
    segments = list(stream_frames(tmp_path / "x.mp4", times))
    pieces = [segment.frames for segment in segments]
    running = np.arange(len(times)) < sum(segment.valid_frames for segment in segments)
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
    (segment,) = stream_frames(tmp_path / "x.mp4", np.array([0.7, 0.9]))
    assert segment.valid_frames == 0
    assert segment.frames.shape == (2, 32, 32, 3)
    assert abs(int(segment.frames.mean()) - 160) < 6


def test_a_picture_is_the_same_however_often_it_is_read(tmp_path):
    # Slices of several threads overran each other in one of a hundred readings of a width that fills no vector.
    Image.fromarray(ramp()).save(tmp_path / "x.jpg", quality=95)
    first = read_picture(tmp_path / "x.jpg")[0]
    assert all(np.array_equal(read_picture(tmp_path / "x.jpg")[0], first) for _ in range(1000))
