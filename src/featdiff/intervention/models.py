"""Models ready to be edited while they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from featdiff.config.sets import InterveneParams
from featdiff.crosscoder.edits import Editor
from featdiff.intervention.purposes import AMPLIFY_ORIGINAL, ZERO_TUNED, Purpose
from featdiff.language.decode import last_token_streams
from featdiff.language.evaluation import Evaluator
from featdiff.language.models import load_model, load_tokenizer
from featdiff.language.session import PromptCache
from featdiff.tasks.task import Sample, TaskInfo


@dataclass(frozen=True)
class EditableModel:
    """The model of one purpose with what makes its edits."""

    purpose: Purpose
    evaluator: Evaluator
    editor: Editor

    def streams(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """Residual streams [Q, 1, D] of the model and of its donor at the last token of each prompt."""
        prompts, evaluator, editor = self.evaluator.prompts(samples), self.evaluator, self.editor
        pad, size = evaluator.tokenizer.pad_token_id, evaluator.batch_size
        own, donors = (last_token_streams(each, prompts, editor.layer, pad=pad, batch_size=size) for each in self._both)
        return own[:, None].to(editor.device), donors[:, None].to(editor.device)

    def prompts(self, samples: list[Sample]) -> PromptCache:
        """For many passes over ``samples``. Under an edit the model mostly answers as it does without one, or as its donor."""
        return PromptCache(self.evaluator.guesses(samples, self._both))

    @property
    def _both(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        return self.evaluator.model, self.editor.donor or self.evaluator.model


@dataclass(frozen=True)
class EditableModels:
    """The models of all purposes. The tuned and the original one stay in memory, any other only as long as it is used."""

    folders: Mapping[Purpose, Path]
    """Where the model of each purpose is; the crosscoder of ``editor`` has a slot for every one."""
    editor: Editor
    """Holds what the edits of all models share; its own model and donor are not read."""
    tasks: dict[str, TaskInfo]
    params: InterveneParams

    def asked(self, side: str) -> list[Purpose]:
        """What is asked on one side, in order; the first is the one whose setting is chosen."""
        return [purpose for purpose in self.folders if purpose.side == side]

    def open(self, purpose: Purpose) -> EditableModel:
        """The model of ``purpose``; its donor is the model that it is to become like."""
        slot = purpose.slot_in(self.editor.crosscoder.models) or purpose.model
        donor = self._tuned if purpose.name == AMPLIFY_ORIGINAL else self._original
        editor = replace(self.editor, model=slot, donor_name=purpose.toward, donor=donor.model)
        return EditableModel(purpose, self._evaluator(purpose), editor)

    @cached_property
    def tuned(self) -> EditableModel:
        """The one from which the set is taken away."""
        return self.open(self.named(ZERO_TUNED))

    @cached_property
    def original(self) -> EditableModel:
        """The one in which the set is amplified."""
        return self.open(self.named(AMPLIFY_ORIGINAL))

    def named(self, name: str) -> Purpose:
        """The purpose called ``name``."""
        return next(purpose for purpose in self.folders if purpose.name == name)

    @cached_property
    def _tuned(self) -> Evaluator:
        return self._load(self.named(ZERO_TUNED))

    @cached_property
    def _original(self) -> Evaluator:
        return self._load(self.named(AMPLIFY_ORIGINAL))

    def _evaluator(self, purpose: Purpose) -> Evaluator:
        if purpose.chosen:
            return self._tuned if purpose.name == ZERO_TUNED else self._original
        return self._load(purpose)

    def _load(self, purpose: Purpose) -> Evaluator:
        # Ids are the same under every model's tokenizer; a chat template need not be, and edits are compared between models.
        tokenizer = load_tokenizer(self.folders[self.named(AMPLIFY_ORIGINAL)])
        model = load_model(self.folders[purpose]).to(self.editor.device)
        sizes = {"batch_size": self.params.batch_size, "max_new_tokens": self.params.max_new_tokens}
        return Evaluator(model, tokenizer, self.tasks, **sizes)
