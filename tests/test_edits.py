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
from featdiff.config.values import Position
from featdiff.crosscoder.edits import AsLong, Change, Editor, FeatureEdit, Push, largest_values
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


def every_change(maker: Editor, positions: str, dose: float) -> dict[str, Change]:
    """A change of every kind; the controls are as long as each kind of edit of the set."""
    made: dict[str, Change] = {"reconstruct": maker.edit("reconstruct", None, positions, dose)}
    for kind in ("zero", "scale", "add", "transplant"):
        like, other = (maker.edit(kind, features, positions, dose) for features in (SET, [1, 9]))
        made[kind] = like
        made[f"push like {kind}"] = Push(2, positions, dose, torch.eye(6)[2], like)
        made[f"as long as {kind}"] = AsLong(2, positions, dose, other, like)
    return made


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(POSITIONS), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_dose_zero_is_an_exact_no_op(seed: int, positions: str, prompt: bool, dtype: torch.dtype) -> None:
    maker = editor(random_crosscoder(MODELS, seed=seed))
    before, donated = resid(seed).to(dtype), resid(seed + 1).to(dtype)
    for kind, change in every_change(maker, positions, 0.0).items():
        after = change(before.clone(), donated, prompt=prompt)
        assert after.dtype == dtype
        assert torch.equal(after, before), kind


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), DOSES)
def test_the_change_is_linear_in_the_dose(seed: int, dose: float) -> None:
    maker, before, donated = editor(random_crosscoder(MODELS, seed=seed)), resid(seed), resid(seed + 1)
    whole = every_change(maker, "all", 1.0)
    for kind, change in every_change(maker, "all", dose).items():
        wanted = before + dose * whole[kind].delta(before, donated)
        torch.testing.assert_close(change(before, donated, prompt=True), wanted, msg=lambda text, kind=kind: f"{kind}: {text}")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["zero", "scale", "add", "transplant"]))
def test_controls_are_as_long_as_the_set_token_by_token(seed: int, kind: str) -> None:
    crosscoder, before, donated = random_crosscoder(MODELS, seed=seed), resid(seed, 9), resid(seed + 1, 9)
    made = every_change(editor(crosscoder), "all", 1.0)
    of, like = editor(crosscoder).edit(kind, [1, 9], "all", 1.0), made[kind]
    length, own = (edit.delta(before, donated).norm(dim=-1) for edit in (like, of))
    push = made[f"push like {kind}"].delta(before, donated)
    torch.testing.assert_close(push, length[..., None] * torch.eye(6)[2])
    change = made[f"as long as {kind}"].delta(before, donated)
    torch.testing.assert_close(change.norm(dim=-1), torch.where(own > 0, length, 0.0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(change * own[..., None], of.delta(before, donated) * length[..., None], rtol=1e-4, atol=1e-3)


def test_a_control_whose_features_are_silent_changes_nothing_and_one_like_a_silent_set_neither() -> None:
    maker, before = editor(random_crosscoder(MODELS, threshold=4.0)), resid(tokens=40)
    of, like = maker.edit("zero", [1, 9], "all", 1.0), maker.edit("zero", SET, "all", 1.0)
    acts, wanted = (edit.delta(before, None).norm(dim=-1) > 0 for edit in (of, like))
    assert {(a, w) for a, w in zip(acts.flatten().tolist(), wanted.flatten().tolist(), strict=True)} == {
        (True, True), (True, False), (False, True), (False, False)
    }  # fmt: skip
    after = AsLong(2, "all", 1.0, of, like)(before, None, prompt=True)
    assert torch.equal((after != before).any(-1), acts & wanted)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["l1", "batchtopk"]))
def test_zero_takes_away_what_the_features_add_and_keeps_the_error(seed: int, loss: str) -> None:
    crosscoder = random_crosscoder(MODELS, loss=loss, seed=seed)
    before, reader = resid(seed), Reader(crosscoder, "base")
    after = editor(crosscoder).edit("zero", SET, "all", 1.0)(before, None, prompt=True)
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
    after = editor(crosscoder).edit("zero", [1, 4], "all", 1.0)(before, None, prompt=True)
    assert (reader(before)[..., [1, 4]] > 0.1).any()
    assert reader(after)[..., [1, 4]].max() < 1e-5
    torch.testing.assert_close(reader(after)[..., [0, 2, 3, 5]], reader(before)[..., [0, 2, 3, 5]], rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), DOSES)
def test_edits_of_features_follow_their_formulas(seed: int, dose: float) -> None:
    crosscoder = random_crosscoder(MODELS, seed=seed)
    before, donated = resid(seed), resid(seed + 1)
    own, donor = Reader(crosscoder, "base"), Reader(crosscoder, "grpo")
    maker = editor(crosscoder)
    wanted: dict[str, Callable[[int], Tensor]] = {
        "zero": lambda k: -dose * own(before)[..., k],
        "scale": lambda k: dose * own(before)[..., k],
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
    after = editor(crosscoder, "grpo").edit("reconstruct", None, "all", 1.0)(before, None, prompt=True)
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
        self.whole_prompt, self.after_prompt = edit.whole_prompt, edit.after_prompt
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
    made = Watched(maker.edit(kind, None if kind == "reconstruct" else list(range(32)), "prompt_last", 1.0))
    generate(model, prompts, max_new_tokens=4, ends=[], batch_size=2, edit=made, **pad)
    assert made.changed == [(True, [[-1], [-1]])], "it is not asked about tokens that it leaves alone"


def test_generated_edits_leave_the_prompt_and_its_first_answer_token_alone() -> None:
    maker, prompts, pad = model_editor()
    model, _ = tiny_model()
    made = Watched(maker.edit("add", list(range(32)), "generated", 4.0))
    edited = generate(model, prompts, max_new_tokens=6, ends=[], batch_size=2, edit=made, **pad)
    plain = generate(model, prompts, max_new_tokens=6, ends=[], batch_size=2, **pad)
    assert made.changed == [(True, [[], []]), *[(False, [[-1], [-1]])] * 5]
    assert [answer[0] for answer in edited] == [answer[0] for answer in plain]
    assert edited != plain


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_no_op_gives_the_same_answers_and_the_same_bits_of_likelihood(positions: str) -> None:
    maker, prompts, pad = model_editor()
    model, _ = tiny_model()
    edits = [None, *(maker.edit(kind, SET, positions, 0.0) for kind in ("zero", "scale", "transplant"))]
    answers = [generate(model, prompts, max_new_tokens=8, ends=[], batch_size=2, edit=edit, **pad) for edit in edits]
    assert answers == answers[:1] * 4
    options = [[[5, 6, 7], [8]], [[9, 4], [6, 6]]]
    scored = [score_options(model, prompts, options, batch_size=2, edit=edit, **pad) for edit in edits]
    assert scored == scored[:1] * 4


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
    alone = generate(donor, prompts, max_new_tokens=6, ends=[], batch_size=2, **pad)
    assert generate(model, prompts, max_new_tokens=6, ends=[], batch_size=2, **pad) != alone
    assert generate(model, prompts, max_new_tokens=6, ends=[], batch_size=2, edit=made, **pad) == alone


def test_largest_values_over_the_whole_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crosscoder = random_crosscoder(MODELS)
    acts = torch.randn(25, 1, 6, generator=torch.Generator().manual_seed(0))
    source = store_of(tmp_path, acts, ("grpo",))
    wanted = torch.stack([Reader(crosscoder, "grpo")(row[0]) for row in acts]).amax(0)
    monkeypatch.setattr(store, "READ_ROWS", 4)
    torch.testing.assert_close(largest_values(crosscoder, source, torch.device("cpu")), wanted)


def test_only_a_transplant_and_what_is_as_long_runs_the_donor() -> None:
    maker, _, _ = model_editor()
    for positions in POSITIONS:
        made = every_change(maker, positions, 1.0)
        assert {kind for kind, change in made.items() if change.donor is maker.donor} == {
            "transplant", "push like transplant", "as long as transplant"
        }  # fmt: skip
        assert all(change.donor is None for kind, change in made.items() if "transplant" not in kind)
        assert {change.whole_prompt for change in made.values()} == {positions in ("prompt", "all")}
        assert {change.after_prompt for change in made.values()} == {positions in ("generated", "all")}


@pytest.mark.parametrize(
    ("kind", "said"), [("add", "largest value"), ("transplant", "donor model"), ("twist", "unknown edit twist; known: zero")]
)
def test_edits_that_cannot_be_made(kind: str, said: str) -> None:
    made = FeatureEdit(1, "all", 1.0, kind, Reader(random_crosscoder(MODELS), "base", features=SET))
    with pytest.raises(ValueError, match=said):
        made(resid(), None, prompt=True)
