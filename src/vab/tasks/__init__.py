"""LightningModules: one task, one file, one recipe. They see codes and features, never a frozen network."""

from vab.tasks.align import AlignTask
from vab.tasks.base import BaseTask, load_task
from vab.tasks.classify import ClassifyTask
from vab.tasks.pretrain import PretrainTask

__all__ = ["AlignTask", "BaseTask", "ClassifyTask", "PretrainTask", "load_task"]
