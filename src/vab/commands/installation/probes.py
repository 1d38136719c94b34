"""What ``vab doctor`` tries, in a process of its own: what is tried may crash, hang, or print.

``python -m vab.commands.installation.probes NAME ...`` writes a line of JSON for each, in order. Packages are imported
as the networks that need them do it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import Any

from vab.cores import usable_cores

_RATE = 16000


def try_torch() -> dict[str, Any]:
    """A product of matrices, and the devices."""
    import torch

    product = torch.eye(4) @ torch.arange(16.0).view(4, 4)
    if product.flatten().tolist() != list(range(16)):
        raise RuntimeError(f"its product of matrices is wrong: {product.tolist()}")
    return {"detail": _build(torch), "devices": [_cpu(torch), *_gpus(torch)]}


def _build(torch: Any) -> str:
    if torch.version.cuda:
        return f"for CUDA {torch.version.cuda}"
    return f"for ROCm {torch.version.hip}" if torch.version.hip else "for CPUs"


def _cpu(torch: Any) -> dict[str, Any]:
    usable = usable_cores()
    facts: dict[str, Any] = {"name": "cpu", "state": "ok", "cores": usable, "cores_of_machine": os.cpu_count()}
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    words = f"{usable} of {os.cpu_count()} cores"
    if "avx512_bf16" in capabilities:
        facts["bf16"] = bool(capabilities["avx512_bf16"] or capabilities.get("amx_bf16"))
        words += f", bf16 {'in hardware' if facts['bf16'] else 'emulated'}"
    return facts | {"detail": words}


def _gpus(torch: Any) -> list[dict[str, Any]]:
    if torch.backends.mps.is_available():
        memory = torch.mps.recommended_max_memory()
        return [{"name": "mps", "memory_bytes": memory, **_at_work(torch, "mps", f"{memory / 2**30:.0f} GiB")}]
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
            reason = "torch finds no device"
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition(".")[0]
        if shutil.which("nvidia-smi") and not torch.version.cuda:
            reason += ": there is a driver, but this torch is built for CPUs"
        return [{"name": "cuda", "state": "absent", "detail": reason}]
    return [_gpu(torch, number) for number in range(torch.cuda.device_count())]


def _gpu(torch: Any, number: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(number)
    name, memory = properties.name, properties.total_memory
    capability = f"{properties.major}.{properties.minor}"
    words = f"{name}, {memory / 2**30:.0f} GiB, compute capability {capability}"
    facts = {"name": f"cuda:{number}", "model": name, "memory_bytes": memory, "compute_capability": capability}
    return facts | _at_work(torch, f"cuda:{number}", words)


def _at_work(torch: Any, device: str, words: str) -> dict[str, Any]:
    """Whether a device computes, and in bf16, by doing it: a torch may lack the kernels for a GPU that it shows."""
    try:
        float(torch.ones(8, 8, device=device).matmul(torch.ones(8, 8, device=device)).sum())
    except RuntimeError as error:
        return {"state": "broken", "detail": f"{words}; it does not compute: {_line(error)}"}
    try:
        float(
            torch.ones(8, 8, device=device, dtype=torch.bfloat16).matmul(torch.eye(8).to(device, torch.bfloat16)).sum()
        )
        native = not device.startswith("cuda") or torch.cuda.get_device_capability(device) >= (8, 0)
        bf16 = "yes" if native else "slow"
    except (RuntimeError, TypeError):
        bf16 = "no"
    return {"state": "ok", "detail": f"{words}, bf16 {bf16}", "bf16": bf16}


def try_av() -> dict[str, Any]:
    """Eight pictures and a quarter of a second of sound to MP4 and back."""
    import av
    import numpy as np

    pictures = [np.full((64, 64, 3), 24 * number, np.uint8) for number in range(8)]
    sound = 0.3 * np.sin(np.arange(_RATE // 4) * 2 * np.pi * 440 / _RATE).astype(np.float32)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("libx264", 8, width=64, height=64, pix_fmt="yuv420p")
        audio = container.add_stream("aac", _RATE, layout="mono")
        for pixels in pictures:
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate = _RATE
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    with av.open(io.BytesIO(file.getvalue()), "r") as container:
        levels = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    with av.open(io.BytesIO(file.getvalue()), "r") as container:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    if len(levels) != 8 or max(abs(level - 24 * number) for number, level in enumerate(levels)) > 4:
        raise RuntimeError(
            f"eight grey pictures came back as {len(levels)} with the levels {np.round(levels).tolist()}"
        )
    if len(heard) < len(sound) or not 0.1 < float(np.abs(heard).max()) < 0.6:
        raise RuntimeError(f"{len(sound)} samples up to 0.3 came back as {len(heard)} up to {np.abs(heard).max():.2f}")
    libraries = {name: ".".join(map(str, numbers)) for name, numbers in av.library_versions.items()}
    some = ", ".join(f"{name} {libraries[name]}" for name in ("libavcodec", "libavformat") if name in libraries)
    ffmpeg = getattr(av, "ffmpeg_version_info", None)
    detail = f"FFmpeg {ffmpeg} ({some})" if ffmpeg else some
    return {"detail": f"{detail}; H.264 and AAC there and back", "libraries": libraries, "ffmpeg": ffmpeg}


def try_soundfile() -> dict[str, Any]:
    """A sound to FLAC and back, to the last bit."""
    import numpy as np
    import soundfile

    sound = np.round(8000 * np.sin(np.arange(400) / 7)).astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, sound, _RATE, format="FLAC")
    file.seek(0)
    heard, rate = soundfile.read(file, dtype="int16")
    if rate != _RATE or not np.array_equal(heard, sound):
        raise RuntimeError(f"FLAC gave other samples, at {rate} Hz")
    return {"detail": f"libsndfile {soundfile.__libsndfile_version__}; FLAC there and back"}


def try_soxr() -> dict[str, Any]:
    """A tone from 48 to 16 kHz."""
    import numpy as np
    import soxr

    tone = np.sin(2 * np.pi * 440 * np.arange(4800) / 48000)
    off = np.abs(soxr.resample(tone, 48000, _RATE) - np.sin(2 * np.pi * 440 * np.arange(1600) / _RATE))[100:-100].max()
    if off > 1e-3:
        raise RuntimeError(f"a tone of 440 Hz is off by {off:.1g} after resampling")
    return {"detail": f"libsoxr {soxr.__libsoxr_version__}; 48 to 16 kHz"}


def try_lightning() -> dict[str, Any]:
    """The import that ``vab fit`` begins with."""
    import lightning.pytorch
    import torchmetrics
    import webdataset

    return {"imported": [module.__name__ for module in (lightning.pytorch, torchmetrics, webdataset)]}


def try_shipped() -> dict[str, Any]:
    """The networks that ship with vab: a sound through codec and judge, a picture through the encoder."""
    import numpy as np
    import torch

    from vab.frozen.codec import load_codec
    from vab.frozen.judges import load_judge
    from vab.frozen.vision import load_vision

    sound = torch.sin(torch.arange(_RATE) / 20).view(1, 1, -1)
    for name in ("tiny", "tiny8"):
        codec = load_codec(name)
        if codec.decode(codec.encode(sound), _RATE).shape != sound.shape:
            raise RuntimeError(f"codec {name} changes the length of a sound")
    load_judge("tiny")  # listens to sounds that it knows
    vision = load_vision("tiny")
    vision.encode(vision.preprocess(np.zeros((1, 64, 64, 3), np.uint8)))
    return {"detail": "codec, vision encoder and judge work"}


def try_weights() -> dict[str, Any]:
    """Which weights are where."""
    from vab.commands.weights import weights_found
    from vab.frozen.weight_files.published import folders

    return {
        "findings": [finding.to_json() for finding in weights_found()],
        "folders": [str(path) for path in folders()],
    }


def try_encodec() -> dict[str, Any]:
    """A small EnCodec."""
    from vab.frozen.codec.encodec import Numbers, networks

    networks(Numbers(_RATE, 1, 4, {"dimension": 4, "n_filters": 2, "n_residual_layers": 1, "ratios": [2]}))
    return {}


def try_clip() -> dict[str, Any]:
    """open_clip's list of models."""
    import open_clip

    return {"models": len(open_clip.list_models())}


def try_dac() -> dict[str, Any]:
    """The classes that codecs dac_16khz, dac_24khz and dac_44khz and judge clap are made of."""
    from transformers import ClapAudioModelWithProjection, DacModel

    return {"imported": [DacModel.__name__, ClapAudioModelWithProjection.__name__]}


def try_fad() -> dict[str, Any]:
    """The networks that judges panns_16k and panns_32k are made of."""
    from vab.frozen.judges.panns import package_models

    return {"imported": [package_models().__name__]}


def try_hdf5() -> dict[str, Any]:
    """A file in memory, written and read."""
    import h5py

    with h5py.File("x", "w", driver="core", backing_store=False) as file:
        file["x"] = [1, 2]
        return {"read": file["x"][:].tolist()}


def try_passt() -> dict[str, Any]:
    """The network that judge passt is made of."""
    from hear21passt.models import passt, preprocess

    return {"imported": [passt.__name__, preprocess.__name__]}


def try_ray() -> dict[str, Any]:
    """What vab extract --engine ray needs; no cluster is started."""
    import ray

    return {"version": ray.__version__}


def try_hub() -> dict[str, Any]:
    """The model hub's client, and where its cache is."""
    from huggingface_hub import constants

    return {"cache": constants.HF_HUB_CACHE}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": try_torch,
    "av": try_av,
    "soundfile": try_soundfile,
    "soxr": try_soxr,
    "lightning": try_lightning,
    "shipped": try_shipped,
    "hub": try_hub,
    "weights": try_weights,
    "encodec": try_encodec,
    "clip": try_clip,
    "dac": try_dac,
    "fad": try_fad,
    "hdf5": try_hdf5,
    "passt": try_passt,
    "ray": try_ray,
}


def _line(error: BaseException) -> str:
    """An exception and what it came from, in one line."""
    chain = [error]
    while (before := _before(chain[-1])) is not None and before not in chain:
        chain.append(before)
    if len(chain) > 1 and type(error).__name__ == "UserError":
        del chain[0]  # ours, which says the same in a sentence
    words = [f"{type(one).__name__}: {(str(one).strip().splitlines() or [''])[0]}" for one in (chain[0], chain[-1])]
    return " <- ".join(dict.fromkeys(word[:200] for word in words))


def _before(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def main(names: list[str]) -> None:
    """Try each; what is printed in between goes where stderr goes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    if "lightning" not in names:
        sys.modules["lightning"] = None  # type: ignore[assignment]  # it may be one that must never be imported
    for name in names:
        try:
            answer = PROBES[name]()
        except (Exception, SystemExit) as error:
            answer = {"error": _line(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
