"""The table generations.csv of a folder of generated sounds, and what of an earlier run it lets a run keep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vab.generation.resumable import ResumableFolder, Row
from vab.spec import UserError

COLUMNS = (
    "file",  # as listed
    "input",  # its size in bytes and its modification time in ns: another file under its name is another input
    "variation",
    "output",  # relative to the folder; empty if there is none
    "seconds",  # of sound
    "seed",
    "sampler",  # JSON, as the next
    "fine_sampler",  # empty without a fine stage
    "checkpoint",
    "checkpoint_sha256",
    "wall_seconds",  # this output's share of the time in which its batch was generated
    "peak",
    "rms_db",
    "silence",
    "entropy",  # of each level, joined by ;
    "longest_repeat_seconds",
    "gain_db",  # by which the sound was scaled down to avoid clipping
    "warnings",  # in words, joined by ;
    "error",  # why there is no output
)
_OVERWRITE = "give another --out, or --overwrite to make all sounds again"


class GenerationFolder(ResumableFolder):
    """A folder of generated sounds. Rank 0 calls `resume`, every rank writes a `journal`, then rank 0 calls `finish`.

    Args:
        folder: Where the outputs go.
        inputs: By output, as a path relative to the folder, the column ``input`` that it should have; in order.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, str]) -> None:
        super().__init__(folder, "generations", _OVERWRITE)
        self.inputs = inputs

    def resume(self, settings: Mapping[str, Any], about: Mapping[str, Any], overwrite: bool = False) -> set[str]:
        """Begin the folder, or resume what an interrupted run left.

        Args:
            settings: What determines the sounds, in plain JSON. A folder of other settings is refused.
            about: Written beside it for the reader.
            overwrite: Delete what an earlier run made, and start from scratch.

        Returns:
            The outputs that are finished.

        Raises:
            UserError: If the folder was begun with other settings, holds sounds of inputs that are not listed any
                more, or holds outputs without a record of how they were made.
        """
        if overwrite:
            self._delete_outputs()
        else:
            self.check(settings, self.inputs)
        # Missing outputs, outputs of changed inputs and failed outputs are made again.
        done = {output: row for output, row in self._rows().items() if (self.folder / output).is_file()}
        if lost := sorted(done.keys() - self.inputs.keys()):
            raise UserError(
                f"{self.folder} holds {len(lost)} sounds of inputs that --video does not list any more, the first is "
                f"{lost[0]}: list them again, {_OVERWRITE}"
            )
        done = {output: row for output, row in done.items() if row["input"] == self.inputs[output]}
        self.begin(settings, about, done)
        return set(done)

    def finish(self) -> list[Row]:
        """Write the table from the journals.

        Returns:
            Its rows: one for each output wanted, in order.

        Raises:
            UserError: If an output is in no journal, or the disk is full.
        """
        rows = dict(self.journal_rows(COLUMNS))
        if missing := [output for output in self.inputs if output not in rows]:
            raise UserError(
                f"{self.folder}: {len(missing)} outputs are in no journal, the first is {missing[0]}; other machines' "
                "journals may not be visible here yet: run the same command again"
            )
        table = [rows[output] for output in self.inputs]
        self.write_table(COLUMNS, table)
        return table

    def _rows(self) -> dict[str, Row]:
        """By output the rows of table and journals that have one."""
        rows = {row["output"]: row for row in self.table_rows(COLUMNS)} | dict(self.journal_rows(COLUMNS))
        return {output: row for output, row in rows.items() if row["output"]}

    def _delete_outputs(self) -> None:
        """Delete the sounds that the table and the journals list, then these. Files that they do not list stay."""
        try:
            outputs = list(self._rows())
        except UserError:  # damaged, so it lists nothing
            outputs = []
        for output in outputs:
            if not Path(output).is_absolute() and ".." not in Path(output).parts:
                (self.folder / output).unlink(missing_ok=True)
        self.clear()
