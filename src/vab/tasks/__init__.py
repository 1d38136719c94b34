"""LightningModules: one task, one file, one recipe. They see codes and features, never a frozen network."""

from vab.tasks.base import BaseTask, load_task
from vab.tasks.pretrain import PretrainTask

__all__ = ["BaseTask", "PretrainTask", "load_task"]
