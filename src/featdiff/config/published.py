"""``conf/published.yaml``: figures that a paper printed, to be shown beside those of a study (ours)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from featdiff.config.parse import parse
from featdiff.config.reading import ConfigError, closest, legible, read_yaml
from featdiff.config.values import Many, Name, Params, Positive

PUBLISHED = Path("conf/published.yaml")
Percent = Annotated[float, Field(ge=0, le=100)]
Points = Annotated[float, Field(ge=-100, le=100)]
"""A difference of two percentages."""


class PublishedTask(Params):
    name: str
    """What the paper calls it."""
    questions: Positive | None
    """Of how many it is known to consist; None where the paper does not say on how many it was asked."""


class PublishedAccuracy(Params):
    """Accuracy by task, for the model in each role of a study."""

    original: dict[Name, Percent]
    contrast: dict[Name, Percent]
    tuned: dict[Name, Percent]


class PublishedModel(Params):
    """What was printed of one base model."""

    accuracy: PublishedAccuracy
    features: Many
    """In the set that was edited."""
    zeroed: dict[Name, Points]
    """Change of the tuned model's accuracy on flipped samples once the set is zeroed, by task."""
    amplified: dict[Name, Points]
    """Change of the original's on the same once it is amplified."""


class Published(Params):
    """The whole file."""

    source: str
    tasks: dict[Name, PublishedTask]
    """By the name that a profile gives the task."""
    models: dict[str, PublishedModel]

    @model_validator(mode="after")
    def _tasks_are_known(self) -> Published:
        for name, model in self.models.items():
            groups = {f"accuracy.{role}": figures for role, figures in model.accuracy} | {
                "zeroed": model.zeroed,
                "amplified": model.amplified,
            }
            for key, figures in groups.items():
                if unknown := [task for task in figures if task not in self.tasks]:
                    raise ValueError(f"{name}.{key}: {unknown[0]} is not in tasks; {closest(unknown[0], self.tasks)}")
        return self


def published(model: str | None) -> Published | None:
    """The file, which has figures of ``model``; None without one. Raises ConfigError where it has none of it."""
    if model is None:
        return None
    found = parse(Published, read_yaml(PUBLISHED), str(PUBLISHED))
    if model not in found.models:
        known = closest(model, found.models)
        raise ConfigError(f"params.yaml: report.paper_model: {legible(model)}: not in {PUBLISHED}; {known}")
    return found
