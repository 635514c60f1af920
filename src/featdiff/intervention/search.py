"""Where and how strongly to edit: the same search for a feature set and for everything that it is held against.

On the tune split, tasks used for finding. A dose is chosen where it matters: the grid of doses is widened until it spans from
hardly an effect to saturation, and of the settings that have most of the best effect the gentlest is taken. All of it is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from featdiff.config.sets import InterveneParams
from featdiff.crosscoder.edits import Change
from featdiff.intervention.controls import Control, Draws, Reach, Setting, lengths, reach
from featdiff.intervention.models import EditableModel
from featdiff.intervention.purposes import RIVALS, SET, SINGLE, Purpose
from featdiff.language.evaluation import Row
from featdiff.language.session import PromptCache
from featdiff.processes.ranks import rank
from featdiff.tasks.task import Sample, TaskInfo, first_of_each

WIDENINGS = 8
"""Times that a grid of doses is halved or doubled at most."""
STARTS = 0.1
"""Share of the largest effect that the smallest dose of a grid may have."""
GONE = 1.0
"""Dose at which a set has been taken away: its features are at nothing, or at the values of the original model. What lies
beyond is a push the other way, and chosen for no removal."""
FURTHER = 8
"""Multiple of the chosen dose up to which curves go on, to see at which length a control would do the same."""
FARTHEST = 2.0
"""‖Δh‖ / ‖h‖ beyond which they end."""
T = TypeVar("T")
Line = dict[str, Any]


Job = tuple[str, Callable[[], T]]
"""A JSON value to be computed: its name, which says all that tells it from others, and how."""


class Once(Protocol):
    """Computes JSON values that do not depend on each other, or takes them from a run that was killed. Ranks share the work;
    every one has all values, in the order of the jobs. ``done`` hears the name of each."""

    def __call__(self, jobs: Sequence[Job[T]], done: Callable[[str], object] = ..., /) -> list[T]: ...


@contextmanager
def on_a_bar(once: Once, desc: str, total: int | None = None) -> Iterator[Once]:
    """``once`` with a progress bar, which the first rank shows."""
    with tqdm(total=total, desc=desc, unit="part", disable=rank() > 0) as bar:

        def counted(jobs: Sequence[Job[T]], done: Callable[[str], object] = lambda _: None, /) -> list[T]:
            def tell(name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update(1)
                done(name)

            return once(jobs, tell)

        yield counted


def by_task(rows: list[Row], tasks: Mapping[str, TaskInfo]) -> list[Line]:
    """n, accuracy, share of step-by-step answers and of answers that could not be read, per task."""
    lines = []
    for name in dict.fromkeys(row["task"] for row in rows):
        group = [row for row in rows if row["task"] == name]
        shares = {
            "accuracy": [row["correct"] for row in group],
            "steps": [row["manner"] == "steps" for row in group],
            "unread": [row["parsed"] is None for row in group],
        }
        means = {share: float(np.mean(values)) for share, values in shares.items()}
        lines.append({"task": name, "role": tasks[name].role, "n": len(group)} | means)
    return lines


def mean_accuracy(lines: Sequence[Line]) -> float:
    """Mean over tasks of their accuracy."""
    return float(np.mean([line["accuracy"] for line in lines]))


def asked(
    model: EditableModel, changes: Sequence[Change | None], samples: list[Sample], prompts: PromptCache
) -> list[list[Line]]:
    """What ``model`` answers under each of ``changes``, by task."""
    answered = model.evaluator.answer_under(changes, samples, shared=prompts)
    return [by_task(rows, model.evaluator.tasks) for rows in answered]


def edits_tried(purpose: Purpose, params: InterveneParams) -> list[str]:
    """Edits that take the set away, or bring it in."""
    return list(params.remove if purpose.sign < 0 else params.amplify)


def gentlest(values: Mapping[Setting, float], norms: Mapping[str, float], share: float, positions: Sequence[str]) -> Setting:
    """Of the settings that have at least ``share`` of the largest effect, the one at the first of ``positions``, and there the
    one that moves the residual stream least (``norms``: by edit, at dose 1)."""
    best = max(values.values())
    enough = [setting for setting, value in values.items() if value >= min(best, share * best)]
    return min(enough, key=lambda setting: (positions.index(setting.positions), setting.dose * norms[setting.edit]))


def strongest(values: Mapping[Setting, float], longest: float, positions: Sequence[str]) -> Setting:
    """Of the settings whose dose is at most ``longest`` the one with the largest effect; of several the largest dose, and there
    the first of ``positions``."""
    near = {setting: value for setting, value in values.items() if setting.dose <= longest}
    return max(near, key=lambda setting: (near[setting], setting.dose, -positions.index(setting.positions)))


def wider(effects: Mapping[float, float], sign: int, tolerance: float) -> list[float]:
    """Doses to add to a grid whose smallest still has an effect, or whose largest still adds to it."""
    doses, best = sorted(effects), max(effects.values())
    if best <= tolerance:
        return []
    more = [doses[0] / 2] if effects[doses[0]] > STARTS * best else []
    adds = effects[doses[-1]] - max((effects[dose] for dose in doses[:-1]), default=0.0) > tolerance
    if adds and (sign > 0 or doses[-1] < GONE):
        more.extend(within(sign, [doses[-1] * 2]))
    return more


def within(sign: int, doses: Sequence[float]) -> list[float]:
    """``doses`` in ascending order; where the set is taken away (``sign`` below 0), at most to where it is gone."""
    return sorted({min(dose, GONE) if sign < 0 else dose for dose in doses})


@dataclass(frozen=True)
class Searched:
    """The outcome for one model."""

    controls: list[Control]
    chosen: dict[str, Setting]
    """Of every control, by its label."""
    effects: dict[Setting, float]
    """Of the set, under every setting that it was chosen from."""
    rows: list[Line]
    """Everything tried, by task: the curves of accuracy against dose and length of the change."""

    @property
    def setting(self) -> Setting:
        """That of the set."""
        return self.chosen[f"{SET} 0"]


def search(
    model: EditableModel, draws: Draws, found: Sequence[int], samples: list[Sample], params: InterveneParams, once: Once
) -> Searched:
    """Choose a setting for the set ``found`` and for every control of ``draws`` in one model.

    The set is tried under every edit of its purpose; controls under the edit chosen for it, at every position and dose, on
    the first ``params.control_questions`` samples of each task. A rival of the set has the setting that the same rule chooses
    for it, among longer changes, too. Any other control says what a change of the set's length does by itself, and has the
    setting at which it does most without being longer. Beyond the grid, at the position chosen for the set, curves go on to
    longer changes, which are not chosen from for the set."""
    return _Search(model, draws, found, samples, params, once).run()


class Try(NamedTuple):
    """A control under several settings."""

    control: Control
    settings: list[Setting]
    before: Sequence[Line]
    """What the same questions were answered without an edit."""
    ask: Callable[[Sequence[Change | None]], list[list[Line]]]
    what: str = ""
    """Tells it from another of the same control."""


class _Search:
    def __init__(
        self,
        model: EditableModel,
        draws: Draws,
        found: Sequence[int],
        samples: list[Sample],
        params: InterveneParams,
        once: Once,
    ) -> None:
        self.model, self.draws, self.found, self.samples, self.params, self.once = model, draws, found, samples, params, once
        self.name, self.sign = model.purpose.name, model.purpose.sign
        self.streams = model.streams(samples)
        self.rows: list[Line] = []

    def run(self) -> Searched:
        found = Control(SET, 0, tuple(self.found))
        few = first_of_each(self.samples, self.params.control_questions)
        prompts, fewer = self.model.prompts(self.samples), self.model.prompts(few)
        ask, ask_few = (
            partial(self._ask, samples=group, prompts=cache) for group, cache in ((self.samples, prompts), (few, fewer))
        )
        (unedited,), (unedited_few,) = self.once(
            [
                (f"{self.name} tune unedited", partial(ask, [None])),
                (f"{self.name} few unedited", partial(ask_few, [None])),
            ]
        )
        effects, setting = self._setting(found, unedited, ask)
        doses = sorted({each.dose for each in effects if each.edit == setting.edit})
        controls = self.draws.controls(self.found, self.sign, lengths(self.model.editor, setting.edit, *self.streams))
        grid = [Setting(setting.edit, positions, dose) for positions in self.params.positions for dose in doses]
        beyond = self._beyond(found, setting, max(doses))
        tries = [
            Try(each, beyond, unedited, ask) if each.name == SET else Try(each, grid + beyond, unedited_few, ask_few)
            for each in controls
            if each.name not in SINGLE  # parts of the set are edited as the set is
        ]
        chosen = {each.label: setting for each in controls}
        for control, (tried, far) in zip((each.control for each in tries), self._all(tries, setting), strict=True):
            if control.name in RIVALS:
                chosen[control.label] = gentlest(
                    tried, {setting.edit: far.norm}, self.params.most_of_effect, self.params.positions
                )
            elif control.name != SET:
                chosen[control.label] = strongest(tried, setting.dose, self.params.positions)
        for row in self.rows:
            row["chosen"] = chosen[f"{row['control']} {row['set_draw']}"] == (row["edit"], row["positions"], row["dose"])
        return Searched(controls, chosen, effects, self.rows)

    def _ask(self, changes: Sequence[Change | None], samples: list[Sample], prompts: PromptCache) -> list[list[Line]]:
        return asked(self.model, changes, samples, prompts)

    def _setting(
        self, found: Control, before: Sequence[Line], ask: Callable[[Sequence[Change | None]], list[list[Line]]]
    ) -> tuple[dict[Setting, float], Setting]:
        """Effect of the set under all settings, doses from hardly an effect to saturation, and the one chosen."""
        values: dict[Setting, float] = {}
        norms: dict[str, float] = {}
        tried: dict[tuple[str, str], list[float]] = {
            (edit, positions): within(self.sign, self.params.doses)
            for edit in edits_tried(self.model.purpose, self.params)
            for positions in self.params.positions
        }
        for round_ in range(1 + WIDENINGS):
            tries = [
                Try(found, [Setting(*way, dose) for dose in doses], before, ask, f"{' '.join(way)} {round_} ")
                for way, doses in tried.items()
                if doses
            ]
            for each, (effects, far) in zip(tries, self._all(tries), strict=True):
                values |= effects
                norms[each.settings[0].edit] = far.norm
            tried = {
                chosen: wider(
                    {s.dose: value for s, value in values.items() if s[:2] == chosen}, self.sign, self.params.tolerance
                )
                for chosen in tried
            }
        return values, gentlest(values, norms, self.params.most_of_effect, self.params.positions)

    def _beyond(self, found: Control, setting: Setting, largest: float) -> list[Setting]:
        """Longer changes than those of the grid, up to where they are much longer than the one chosen."""
        norm = reach(found.change(self.model.editor, self.found, setting), *self.streams).norm
        further, dose = [], largest * 2
        while dose <= FURTHER * setting.dose and dose * norm <= FARTHEST:
            further.append(setting._replace(dose=dose))
            dose *= 2
        return further

    def _all(self, tries: Sequence[Try], unedited: Setting | None = None) -> list[tuple[dict[Setting, float], Reach]]:
        """Of each the effect under every setting, in the direction of the claim, and the reach of the edit. The answers without
        an edit are noted as those of ``unedited`` at dose 0."""
        asked = [each for each in tries if each.settings]
        jobs = [(f"{self.name} tune {each.what}{each.control.label}", partial(self._answers, each)) for each in asked]
        answered = dict(zip(map(id, asked), self.once(jobs), strict=True))
        found = []
        for each in tries:
            start, effects, far = mean_accuracy(each.before), dict[Setting, float](), Reach(0.0, 0.0, 0.0)
            if unedited:
                self._note(each.control, unedited._replace(dose=0.0), far, each.before)
            if each.settings:
                change = each.control.change(self.model.editor, self.found, each.settings[0])
                far = reach(change, *self.streams)
            for setting, lines in zip(each.settings, answered.get(id(each), []), strict=True):
                self._note(each.control, setting, far, lines)
                effects[setting] = self.sign * (mean_accuracy(lines) - start)
            found.append((effects, far))
        return found

    def _answers(self, each: Try) -> list[list[Line]]:
        return each.ask([each.control.change(self.model.editor, self.found, setting) for setting in each.settings])

    def _note(self, control: Control, setting: Setting, far: Reach, lines: Sequence[Line]) -> None:
        facts = {"purpose": self.name, "control": control.name, "set_draw": control.number}
        moved = {"norm": far.norm * setting.dose, "acting": far.acting, "unscaled": far.unscaled}
        self.rows += [facts | setting._asdict() | moved | line for line in lines]
