"""Edits of the residual stream: formulas, positions, and what has to stay untouched."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featdiff.activations import store
from featdiff.config.params import Position
from featdiff.crosscoder.edits import Editor, FeatureEdit, largest_values
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.language.decode import generate, score_options
from tiny import random_crosscoder, store_of, tiny_model

MODELS = ("base", "grpo")
SET = [7, 2, 5]
CPU = torch.device("cpu")
DOSES = st.floats(0.25, 4, width=32)
POSITIONS = get_args(Position)


def resid(seed: int = 1, tokens: int = 4) -> Tensor:
    return torch.randn(3, tokens, 6, generator=torch.Generator().manual_seed(seed)) * 3


def editor(crosscoder: Crosscoder | None = None, model: str = "base") -> Editor:
    return Editor(crosscoder or random_crosscoder(MODELS), model, 2, CPU, torch.arange(12.0) + 1, donor_name="grpo")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(POSITIONS), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_factor_of_one_is_an_exact_no_op(seed: int, positions: str, prompt: bool, dtype: torch.dtype) -> None:
    made = editor(random_crosscoder(MODELS, seed=seed)).edit("scale", SET, positions, 1.0)
    before = resid(seed).to(dtype)
    after = made(before.clone(), None, prompt=prompt)
    assert after.dtype == dtype
    assert torch.equal(after, before)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["l1", "batchtopk"]))
def test_zero_takes_away_what_the_features_add_and_keeps_the_error(seed: int, loss: str) -> None:
    crosscoder = random_crosscoder(MODELS, loss=loss, seed=seed)
    before, reader = resid(seed), Reader(crosscoder, "base")
    after = editor(crosscoder).edit("zero", SET, "all", 0.0)(before, None, prompt=True)
    f = reader(before)
    torch.testing.assert_close(after, before - f[..., SET] @ reader.directions_FD[SET], rtol=1e-4, atol=1e-4)
    without = f.clone()
    without[..., SET] = 0
    error_before = before - reader.reconstruct(before)
    error_after = after - (without @ reader.directions_FD + reader.offset_D)
    torch.testing.assert_close(error_after, error_before, rtol=1e-3, atol=1e-3)


def test_after_zeroing_an_orthogonal_dictionary_reads_nothing_of_the_set_and_the_rest_as_before() -> None:
    crosscoder = Crosscoder(list(MODELS), 6, 6, "l1")
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    crosscoder.W_dec.data[:] = basis[:, None]
    crosscoder.W_enc.data[:] = basis.T / 2
    crosscoder.scale.copy_(torch.tensor([0.5, 2.0]))
    reader, before = Reader(crosscoder, "base"), resid()
    after = editor(crosscoder).edit("zero", [1, 4], "all", 0.0)(before, None, prompt=True)
    assert (reader(before)[..., [1, 4]] > 0.1).any()
    assert reader(after)[..., [1, 4]].max() < 1e-5
    torch.testing.assert_close(reader(after)[..., [0, 2, 3, 5]], reader(before)[..., [0, 2, 3, 5]], rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), DOSES)
def test_scale_and_add_and_transplant_follow_their_formulas(seed: int, dose: float) -> None:
    crosscoder = random_crosscoder(MODELS, seed=seed)
    before, donated = resid(seed), resid(seed + 1)
    own, donor = Reader(crosscoder, "base"), Reader(crosscoder, "grpo")
    maker = editor(crosscoder)
    wanted: dict[str, Callable[[int], Tensor]] = {
        "scale": lambda k: (dose - 1) * own(before)[..., k],
        "add": lambda k: torch.full((3, 4), dose * (k + 1.0)),
        "transplant": lambda k: dose * (donor(donated)[..., k] - own(before)[..., k]),
    }
    for kind, coefficient in wanted.items():
        change = sum(
            (coefficient(k)[..., None] * crosscoder.W_dec[k, 0] / crosscoder.scale[0] for k in SET), torch.zeros(3, 4, 6)
        )
        after = maker.edit(kind, SET, "all", dose)(before, donated, prompt=False)
        torch.testing.assert_close(after, before + change, rtol=1e-3, atol=1e-3, msg=lambda text, kind=kind: f"{kind}: {text}")


def test_transplanting_a_model_into_itself_changes_nothing() -> None:
    crosscoder, before = random_crosscoder(MODELS), resid()
    maker = Editor(crosscoder, "grpo", 2, CPU, torch.ones(12), donor_name="grpo")
    assert torch.equal(maker.edit("transplant", SET, "all", 1.7)(before, before.clone(), prompt=True), before)


def test_reconstruct_leaves_nothing_but_the_reconstruction() -> None:
    crosscoder, before = random_crosscoder(MODELS), resid()
    after = editor(crosscoder, "grpo").edit("reconstruct", None, "all", 0.0)(before, None, prompt=True)
    torch.testing.assert_close(after, Reader(crosscoder, "grpo").reconstruct(before), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize(
    ("positions", "in_prompt", "later"),
    [
        ("all", [0, 1, 2, 3], [0, 1, 2, 3]),
        ("prompt", [0, 1, 2, 3], []),
        ("prompt_last", [3], []),
        ("generated", [], [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("kind", ["zero", "add", "reconstruct"])
def test_positions(kind: str, positions: str, in_prompt: list[int], later: list[int]) -> None:
    before, features = resid(), None if kind == "reconstruct" else list(range(12))
    made = editor().edit(kind, features, positions, 0.5)
    for prompt, touched in ((True, in_prompt), (False, later)):
        after = made(before, None, prompt=prompt)
        changed = (after != before).flatten(2).any(2).any(0)
        assert changed.nonzero().squeeze(1).tolist() == touched
        everywhere = editor().edit(kind, features, "all", 0.5)(before, None, prompt=prompt)
        torch.testing.assert_close(after[:, touched], everywhere[:, touched])


class Watched:
    """An edit that notes what it changed, row by row: the number of changed positions from the right."""

    def __init__(self, edit: FeatureEdit) -> None:
        self.edit, self.layer, self.donor = edit, edit.layer, edit.donor
        self.changed: list[tuple[bool, list[list[int]]]] = []

    def __call__(self, resid_BTD: Tensor, donor_BTD: Tensor | None, *, prompt: bool) -> Tensor:
        after = self.edit(resid_BTD, donor_BTD, prompt=prompt)
        places = (after != resid_BTD).any(2)
        self.changed.append((prompt, [(row.nonzero().squeeze(1) - len(row)).tolist() for row in places]))
        return after


def model_editor(seed: int = 0) -> tuple[Editor, list[list[int]], dict[str, int]]:
    _, tokenizer = tiny_model(seed)
    crosscoder = random_crosscoder(MODELS, d_model=16, n_features=32, threshold=0.5)
    prompts = tokenizer(["add 12 34=", "rev a="])["input_ids"]
    return (
        Editor(crosscoder, "base", 1, CPU, torch.full((32,), 5.0), donor_name="grpo", donor=tiny_model(seed + 1)[0]),
        prompts,
        {"pad": tokenizer.pad_token_id},
    )


@pytest.mark.parametrize("kind", ["zero", "add", "transplant", "reconstruct"])
def test_the_last_prompt_token_is_the_last_one_of_every_left_padded_prompt(kind: str) -> None:
    maker, prompts, pad = model_editor()
    model, _ = tiny_model()
    made = Watched(
        maker.edit(kind, None if kind == "reconstruct" else list(range(32)), "prompt_last", 0.0 if kind == "zero" else 1.0)
    )
    generate(model, prompts, max_new_tokens=4, eos=-1, batch_size=2, edit=made, **pad)
    assert made.changed == [(True, [[-1], [-1]]), *[(False, [[], []])] * 3]


def test_generated_edits_leave_the_prompt_and_its_first_answer_token_alone() -> None:
    maker, prompts, pad = model_editor()
    model, _ = tiny_model()
    made = Watched(maker.edit("add", list(range(32)), "generated", 4.0))
    edited = generate(model, prompts, max_new_tokens=6, eos=-1, batch_size=2, edit=made, **pad)
    plain = generate(model, prompts, max_new_tokens=6, eos=-1, batch_size=2, **pad)
    assert made.changed == [(True, [[], []]), *[(False, [[-1], [-1]])] * 5]
    assert [answer[0] for answer in edited] == [answer[0] for answer in plain]
    assert edited != plain


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_no_op_gives_the_same_answers_and_the_same_bits_of_likelihood(positions: str) -> None:
    maker, prompts, pad = model_editor()
    model, _ = tiny_model()
    made = maker.edit("scale", SET, positions, 1.0)
    assert generate(model, prompts, max_new_tokens=8, eos=-1, batch_size=2, edit=made, **pad) == generate(
        model, prompts, max_new_tokens=8, eos=-1, batch_size=2, **pad
    )
    options = [[[5, 6, 7], [8]], [[9, 4], [6, 6]]]
    scored = [score_options(model, prompts, options, batch_size=2, edit=edit, **pad) for edit in (made, None)]
    assert scored[0] == scored[1]


def test_transplanting_every_direction_of_a_full_dictionary_gives_the_donors_answers() -> None:
    _, prompts, pad = model_editor()
    model, donor = tiny_model()[0], tiny_model(1)[0]
    crosscoder = Crosscoder(list(MODELS), 16, 32, "l1")  # +e_i and -e_i: reads and writes any stream exactly
    axes = torch.cat([torch.eye(16), -torch.eye(16)])
    crosscoder.W_dec.data[:] = axes[:, None]
    crosscoder.W_enc.data[:] = axes.T / 2
    maker = Editor(crosscoder, "base", 2, CPU, torch.ones(32), donor_name="grpo", donor=donor)
    made = maker.edit("transplant", list(range(32)), "all", 1.0)
    model.lm_head.weight.data, model.model.norm.weight.data = donor.lm_head.weight.data, donor.model.norm.weight.data
    alone = generate(donor, prompts, max_new_tokens=6, eos=-1, batch_size=2, **pad)
    assert generate(model, prompts, max_new_tokens=6, eos=-1, batch_size=2, **pad) != alone
    assert generate(model, prompts, max_new_tokens=6, eos=-1, batch_size=2, edit=made, **pad) == alone


def test_largest_values_over_the_whole_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crosscoder = random_crosscoder(MODELS)
    acts = torch.randn(25, 1, 6, generator=torch.Generator().manual_seed(0))
    source = store_of(tmp_path, acts, ("grpo",))
    wanted = torch.stack([Reader(crosscoder, "grpo")(row[0]) for row in acts]).amax(0)
    monkeypatch.setattr(store, "READ_ROWS", 4)
    torch.testing.assert_close(largest_values(crosscoder, source), wanted)


def test_only_a_transplant_runs_the_donor() -> None:
    maker, _, _ = model_editor()
    assert maker.edit("transplant", SET, "all", 1.0).donor is maker.donor
    assert all(maker.edit(kind, SET, "all", 1.0).donor is None for kind in ("zero", "scale", "add"))


@pytest.mark.parametrize(
    ("kind", "said"), [("add", "largest value"), ("transplant", "donor model"), ("twist", "unknown edit twist; known: zero")]
)
def test_edits_that_cannot_be_made(kind: str, said: str) -> None:
    made = FeatureEdit(kind, 1, "all", 1.0, Reader(random_crosscoder(MODELS), "base", features=SET))
    with pytest.raises(ValueError, match=said):
        made(resid(), None, prompt=True)


def along(model: str = "base") -> Editor:
    made = editor(model=model)
    generator = torch.Generator().manual_seed(5)
    made.directions = {name: torch.randn(6, generator=generator) for name in ("mean_difference", "original_mean")}
    return made


def test_a_push_adds_the_direction_and_nothing_else() -> None:
    made, before = along(), resid()
    after = made.direct("push", "mean_difference", "prompt_last", 2.0)(before.clone(), None, prompt=True)
    assert torch.equal(after[:, :-1], before[:, :-1])
    torch.testing.assert_close(after[:, -1], before[:, -1] + 2 * made.directions["mean_difference"])


def test_a_projection_leaves_the_original_s_component_along_the_direction_and_all_others_as_they_were() -> None:
    made, before = along(), resid()
    after = made.direct("project", "mean_difference", "all", 0.0)(before.clone(), None, prompt=True)
    unit = made.directions["mean_difference"] / made.directions["mean_difference"].norm()
    torch.testing.assert_close(after @ unit, (made.directions["original_mean"] @ unit).expand(3, 4))
    across = torch.eye(6) - torch.outer(unit, unit)
    torch.testing.assert_close(after @ across, before @ across)
    again = made.direct("project", "mean_difference", "all", 0.0)(after.clone(), None, prompt=True)
    torch.testing.assert_close(again, after)
