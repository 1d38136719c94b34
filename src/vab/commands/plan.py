"""``vab plan``: what a training run needs, before it starts and without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vab import UserError
from vab.console import print_table
from vab.files import check_files, write_atomically
from vab.planning.cards import CARDS, CardName


def plan(
    arguments: list[str],
    gpus: int | None = None,
    memory: float | None = None,
    gpu: CardName | None = None,
    mfu: float = 0.4,
    extract: str | None = None,
    records: int | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """Print the memory, time, epochs and disk space of a training run, without a GPU and without training.

    All other flags are those of vab fit: --config FILE and changes, such as --data.batch_size 72. Memory is counted in
    the trainer's own steps, on tensors without values, which takes about half a minute. Each number says how it was
    got. No shards are needed. vab fit --print_plan prints the same with default values.

    Args:
        arguments: Of vab fit.
        gpus: How many, on all nodes together; default: trainer.devices x trainer.num_nodes, with 8 for auto.
        memory: GB of each, as its maker names it, such as 80; default: that of --gpu, else 80.
        gpu: Model of GPU; times are printed for this one only, default: for each that is known.
        mfu: Assumed share of the GPU's rate of matrix products that training reaches.
        extract: Recipe of vab extract, such as configs/extract/dac.yaml; default: the shards of the recipe, if they
            exist, else configs/extract/paper.yaml.
        records: Records of the training data; default: those of the shards, if they exist.
        out: JSON file to write the plan to as well.

    Returns:
        The plan as plain JSON.

    Raises:
        UserError: If a value is out of range, or the recipe has a setting that cannot be planned for.
    """
    from vab.planning.plan import plan_run
    from vab.training.cli import settings_of_fit

    check_files({"out": (out, ".json")}, [], overwrite=True)
    config = settings_of_fit(arguments)
    trainer = config["trainer"]
    if gpus is None:
        gpus = _devices(trainer.get("devices")) * int(trainer.get("num_nodes") or 1)
    memory = memory or (CARDS[gpu].memory_gb if gpu else 80.0)
    settings = None if extract is None else _read(Path(extract))
    result = plan_run(config, gpus, memory, gpu, mfu, settings, records)
    rows: list[tuple[str, str, str] | None] = []
    section = None
    for row in result.rows:
        if section not in (None, row.section):
            rows.append(None)
        section = row.section
        rows.append((row.name, row.value, row.source))
    print_table(f"{gpus} x {memory:g} GB", ["", "", "how it was got"], rows, left=(0, 2))
    content = {"arguments": list(arguments), "gpus": gpus, "memory_gb": memory, "mfu": mfu, **result.to_json()}
    if out is not None:
        write_atomically(Path(out), json.dumps(content, indent=1) + "\n")
    return content


def _devices(devices: Any) -> int:
    """The GPUs of a node: 8 for auto, the number of a node of the kind that the recipes are for."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    return int(text) if text.isdecimal() and int(text) > 0 else 8


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise UserError(f"--extract {path}: there is no such file")
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--extract {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--extract {path}: expected settings of vab extract, such as codec: dac_16khz")
    return settings
