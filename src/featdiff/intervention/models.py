"""Models ready to be edited while they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from featdiff.config.params import InterveneParams
from featdiff.crosscoder.edits import Editor
from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, ZERO_TUNED, Purpose
from featdiff.language.evaluation import Evaluator
from featdiff.language.models import load_model, load_tokenizer
from featdiff.tasks.task import TaskInfo


@dataclass(frozen=True)
class EditableModel:
    """The model of one purpose with what makes its edits."""

    purpose: Purpose
    evaluator: Evaluator
    editor: Editor


@dataclass(frozen=True)
class EditableModels:
    """The models of all purposes. The tuned and the original one stay in memory, any other only as long as it is used."""

    folders: Mapping[Purpose, Path]
    """Where the model of each purpose is; the crosscoder of ``editor`` has a slot for every one."""
    editor: Editor
    """Holds what the edits of all models share; its own ``model`` is not read."""
    tasks: dict[str, TaskInfo]
    params: InterveneParams

    @property
    def purposes(self) -> list[Purpose]:
        """What is asked, in order."""
        return list(self.folders)

    def open(self, purpose: Purpose) -> EditableModel:
        """The model of ``purpose``."""
        if purpose.chosen:
            return self.tuned if purpose.name == ZERO_TUNED else self.original
        return self._load(purpose)

    @cached_property
    def tuned(self) -> EditableModel:
        """The one in which the set is zeroed."""
        return self._load(self._named(ZERO_TUNED))

    @cached_property
    def original(self) -> EditableModel:
        """The one in which the set is amplified; the tuned model is its donor."""
        loaded = self._load(self._named(AMPLIFY_ORIGINAL))
        return replace(loaded, editor=replace(loaded.editor, donor=self.tuned.evaluator.model))

    def _named(self, name: str) -> Purpose:
        return next(purpose for purpose in self.purposes if purpose.name == name)

    def _load(self, purpose: Purpose) -> EditableModel:
        # Ids are the same under every model's tokenizer; a chat template need not be, and edits are compared between models.
        tokenizer = load_tokenizer(self.folders[self._named(AMPLIFY_ORIGINAL)])
        model = load_model(self.folders[purpose]).to(self.editor.device)
        sizes = {"batch_size": self.params.batch_size, "max_new_tokens": self.params.max_new_tokens}
        slot = purpose.slot_in(self.editor.crosscoder.models) or purpose.model
        return EditableModel(purpose, Evaluator(model, tokenizer, self.tasks, **sizes), replace(self.editor, model=slot))
