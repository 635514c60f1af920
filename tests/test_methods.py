"""The methods by which an arm comes from the base, each as it is, on a tiny base that is right half of the time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOTrainer

from featdiff.artifacts.artifact import ContractError, write_json
from featdiff.artifacts.tables import COMPLETIONS, SAMPLED_ANSWERS
from featdiff.config.models import DPOParams, RFTParams
from featdiff.language.decode import score_options
from featdiff.language.models import checkpoint_folders, encode_prompts, load_model, load_tokenizer, save_model, trl_row
from featdiff.pipeline.checkpoint import Scratch
from featdiff.tasks.task import Sample, load_samples, load_tasks
from featdiff.training import sampled as sampled_module
from featdiff.training.dpo import pairs
from featdiff.training.engine import Engine
from featdiff.training.grpo import Rollouts
from featdiff.training.sampled import Answer, Answers, sampled_answers
from taught import PROBLEMS, SMALL, hashes, numbers, trained, write_data

TRAINED = [method for method in SMALL if method != "noise"]


@pytest.mark.parametrize("method", SMALL)
def test_a_method_moves_every_weight_keeps_checkpoints_and_repeats_exactly(method: str, world: Path, tmp_path: Path) -> None:
    out, audit = trained(method, world, tmp_path / "one")
    assert len(audit["checkpoints"]) == 3
    models = [load_model(world / "base"), *map(load_model, checkpoint_folders(out))]
    assert len(models) == 4
    for before, after in pairwise(models):
        for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
            assert not torch.equal(old, new), name
    again, _ = trained(method, world, tmp_path / "two")
    other, _ = trained(method, world, tmp_path / "three", seed=1)
    assert hashes(out) == hashes(again)
    assert hashes(out)["model.safetensors"] != hashes(other)["model.safetensors"]


@pytest.mark.parametrize("method", SMALL)
def test_a_method_changes_no_more_than_the_blocks_that_it_is_given(method: str, world: Path, tmp_path: Path) -> None:
    out, _ = trained(method, world, tmp_path / "one", blocks=1)
    base, *models = map(load_model, (world / "base", *checkpoint_folders(out)))
    for model in models:
        for (name, old), (_, new) in zip(base.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(old, new) is not name.startswith("model.layers.0."), name
            assert new.requires_grad
    with pytest.raises(ContractError, match="at most the 2 of the base, or null, found 3"):
        trained(method, world, tmp_path / "two", blocks=3)


LORA = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "up_proj"]}


@pytest.mark.parametrize("method", TRAINED)
def test_low_rank_changes_are_merged_and_resume(method: str, world: Path, tmp_path: Path) -> None:
    """What is saved has the base's names and shapes, and differs from it by matrices of that rank, in the targets alone."""
    out, audit = trained(method, world, tmp_path / "lora", blocks=1, lora=LORA)
    base, *models = (load_model(folder).state_dict() for folder in (world / "base", *checkpoint_folders(out)))
    wanted = {f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj")}
    for model in models:
        assert model.keys() == base.keys()
        assert {name for name in base if not torch.equal(model[name], base[name])} == wanted
        for name in wanted:
            sizes = torch.linalg.svdvals(model[name] - base[name])
            assert sizes[2] < 1e-3 * sizes[0] < sizes[0]
    assert "adapter_config.json" not in hashes(out)
    other, _ = trained(method, world, tmp_path / "other", blocks=1, lora=LORA, seed=1)
    assert hashes(other)["model.safetensors"] != hashes(out)["model.safetensors"]

    def kill(step: int, _: dict[str, float]) -> None:
        if step == 5:
            raise KilledError

    more: dict[str, Any] = {"blocks": 1, "lora": LORA}
    with pytest.raises(KilledError):
        trained(method, world, tmp_path / "killed", scratch=Scratch(tmp_path / "scratch", 0.0), log=kill, **more)
    again, told = trained(method, world, tmp_path / "killed", scratch=Scratch(tmp_path / "scratch", 0.0), **more)
    assert told == audit
    assert hashes(again) == hashes(out)


def test_low_rank_changes_that_cannot_be_are_one_line(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ContractError, match=r"lora.targets: expected of down_proj, gate_proj, .*, found lm_head; change it"):
        trained("sft", world, tmp_path / "sft", lora=LORA | {"targets": ["q_proj", "lm_head"]})
    monkeypatch.setattr(Engine, "here", classmethod(lambda cls: cls(torch.float32, True, False, 2)))
    with pytest.raises(ContractError, match="lora: expected null where ranks share a model, found an adapter"):
        trained("sft", world, tmp_path / "sft", lora=LORA)


@pytest.mark.parametrize("chat", [False, True])
def test_rollouts_read_prompts_as_evaluation_does_and_end_where_the_model_ends(world: Path, chat: bool) -> None:
    params, tokenizer, model = numbers("grpo"), load_tokenizer(world / "base"), load_model(world / "base")
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{% endfor %}"
    samples = load_samples(world / "data", "train")[:2]
    prompts = [trl_row(sample, chat=chat, solution=False)["prompt"] for sample in samples for _ in range(8)]
    accelerator = SimpleNamespace(unwrap_model=lambda each: each, process_index=0, autocast=nullcontext)
    state = SimpleNamespace(global_step=3)
    trainer: Any = SimpleNamespace(processing_class=tokenizer, model=model, accelerator=accelerator, state=state)
    drawn = Rollouts(params, 0)(prompts, trainer)
    wanted = encode_prompts(tokenizer, samples, chat=chat)
    assert drawn["prompt_ids"] == [ids for ids in wanted for _ in range(8)]
    ends = tokenizer.eos_token_id
    assert all(ids[-1] == ends or len(ids) == params.max_new_tokens for ids in drawn["completion_ids"])
    assert all(ends not in ids[:-1] and len(ids) <= params.max_new_tokens for ids in drawn["completion_ids"])
    assert len({tuple(ids) for ids in drawn["completion_ids"]}) > 1
    assert Rollouts(params, 0)(prompts, trainer) == drawn
    state.global_step = 4
    assert Rollouts(params, 0)(prompts, trainer) != drawn


@pytest.fixture(scope="module")
def two_ends(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a base of which ``d``, which is no special token, ends an answer too."""
    root = tmp_path_factory.mktemp("two ends")
    model, tokenizer = load_model(world / "base"), load_tokenizer(world / "base")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer("d", add_special_tokens=False)["input_ids"]]
    save_model(model, tokenizer, root / "base")
    write_json(root / "base/manifest.json", {})
    copytree(world / "data", root / "data")
    return root


@pytest.mark.parametrize("method", SMALL)
def test_a_method_keeps_every_end_token_of_its_base(method: str, two_ends: Path, tmp_path: Path) -> None:
    out, _ = trained(method, two_ends, tmp_path / "one")
    declared = [load_model(folder).generation_config.eos_token_id for folder in (two_ends / "base", *checkpoint_folders(out))]
    assert len(declared) == 4
    assert all(ends == declared[0] and len(ends) == 2 for ends in declared)


def test_grpo_learns_from_the_end_token_that_was_drawn(two_ends: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(two_ends / "base")
    eos, (c, d, dot) = tokenizer.eos_token_id, tokenizer("cd.", add_special_tokens=False)["input_ids"]
    learnt: list[list[int]] = []
    loss = GRPOTrainer._compute_loss

    def watched(self: GRPOTrainer, model: Any, inputs: dict[str, Any]) -> Any:
        for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True):
            learnt.append(ids[mask.bool()].tolist())
            assert mask.sum() == len(learnt[-1])
        return loss(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", watched)
    out, audit = trained("grpo", two_ends, tmp_path / "one", steps=12, lr=0.003)
    assert len(learnt) == 12 * 8
    for ids in learnt:
        assert ids[-1] in (eos, d) or len(ids) == 4
        assert not {eos, d} & {*ids[:-1]}
    assert [d] in learnt
    assert [c, dot, eos] in learnt
    assert audit["tokens_seen"] == sum(map(len, learnt))
    kept = COMPLETIONS.read(out)
    assert {row["completion"] for row in kept} >= {"", "c."}
    assert not any("d" in row["completion"] for row in kept), "what is graded is what evaluation reads: without the end"
    contexts = tokenizer(PROBLEMS)["input_ids"]
    first = [
        torch.tensor(score_options(load_model(folder), contexts, [[[c], [d]]] * 24, pad=tokenizer.pad_token_id, batch_size=24))
        for folder in (two_ends / "base", out)
    ]
    assert first[0][:, 1].exp().mean() > 0.3
    assert (first[1][:, 1] < first[0][:, 1] - 0.5).all(), "an end that earned nothing is drawn less"


def test_reinforcement_counts_the_tokens_of_its_completions(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    real = Rollouts.__call__

    def count(*given: Any) -> dict[str, Any]:
        found = real(*given)
        drawn.extend(map(len, found["completion_ids"]))
        return found

    monkeypatch.setattr(Rollouts, "__call__", count)
    _, audit = trained("grpo", world, tmp_path / "grpo")
    assert (audit["samples_seen"], audit["tokens_seen"]) == (len(drawn), sum(drawn))


class KilledError(Exception):
    """Stands for a kill between two updates."""


@pytest.mark.parametrize("method", TRAINED)
def test_a_training_tells_its_steps_and_ends_in_the_same_bytes_after_a_kill(
    method: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: list[tuple[int, dict[str, float]]] = []
    whole, audit = trained(method, world, tmp_path / "whole", log=lambda *point: points.append(point))
    assert audit["updates"] == 6
    assert audit["checkpoints"] == [2, 4, 6]
    assert audit["problems"] == 24
    assert audit["samples_seen"] > 0
    assert audit["tokens_seen"] > 0
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6]
    assert points[0][1].keys() >= {"loss", "grad_norm", "learning_rate"}

    def kill(step: int, _: dict[str, float]) -> None:
        if step == 5:
            raise KilledError

    with pytest.raises(KilledError):
        trained(method, world, tmp_path / "killed", scratch=Scratch(tmp_path / "scratch", 0.0), log=kill)
    asked: list[int] = []
    real = sampled_module.generate
    monkeypatch.setattr(sampled_module, "generate", lambda *a, **k: [asked.append(1), real(*a, **k)][1])
    steps: list[int] = []
    out, again = trained(
        method, world, tmp_path / "killed", scratch=Scratch(tmp_path / "scratch", 0.0), log=lambda step, _: steps.append(step)
    )
    assert steps == [5, 6]
    assert asked == []
    assert again == audit
    assert hashes(out) == hashes(whole)


def test_noise_is_as_long_as_asked_equally_strong_on_every_weight_and_on_one_line(world: Path, tmp_path: Path) -> None:
    before = hashes(world / "base")
    out, audit = trained("noise", world, tmp_path / "noise")
    assert hashes(world / "base") == before
    assert audit == {"updates": 0, "checkpoints": [1, 2, 3], "problems": 0, "moved": pytest.approx(0.2, rel=1e-5)}
    base, *models = (load_model(folder).state_dict() for folder in (world / "base", *checkpoint_folders(out)))
    every = torch.cat([weight.flatten() for name, weight in base.items() if name != "lm_head.weight"])  # which is tied
    spread = 0.2 * every.norm().item() / len(every) ** 0.5
    for name, start in base.items():
        way = models[-1][name] - start
        assert way.square().mean().sqrt().item() == pytest.approx(spread, rel=4 / (2 * way.numel()) ** 0.5), name
        for number, model in enumerate(models, start=1):
            torch.testing.assert_close(model[name] - start, way * number / 3, rtol=0, atol=1e-6)
    kept, _ = trained("noise", world, tmp_path / "kept", checkpoints=1)
    assert hashes(kept)["model.safetensors"] == hashes(out)["model.safetensors"]


def test_sft_is_taught_in_the_wording_asked_for(world: Path, tmp_path: Path) -> None:
    samples = load_samples(world / "data", "train")
    write_data(tmp_path / "data", list(load_tasks(world / "data").values()), [replace(s, solution=s.own) for s in samples])
    wordings = (None, "foreign", "own")
    found = {teacher: hashes(trained("sft", world, tmp_path / str(teacher), teacher=teacher)[0]) for teacher in wordings}
    told = hashes(trained("sft", world, tmp_path / "told", data=str(tmp_path / "data"))[0])
    assert found[None] == found["foreign"] != found["own"] == told


def test_a_wording_that_does_not_exist_is_one_line(world: Path, tmp_path: Path) -> None:
    samples = load_samples(world / "data", "train")
    write_data(tmp_path / "data", list(load_tasks(world / "data").values()), [*samples[:3], replace(samples[3], own="")])
    with pytest.raises(
        ContractError, match=r"train.parquet: t-3: expected a solution in the wording own, found none"
    ) as caught:
        trained("sft", world, tmp_path / "sft", data=str(tmp_path / "data"), teacher="own")
    assert "\n" not in str(caught.value)


def test_a_solution_that_is_too_long_is_one_line(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"t-0: expected at most sft.max_length = 9 tokens, found 10; raise it"):
        trained("sft", world, tmp_path / "sft", max_length=9)


def answers_of(world: Path, **changes: Any) -> list[Answers]:
    seed = changes.pop("seed", 0)
    tasks, samples = load_tasks(world / "data"), load_samples(world / "data", "train")
    base = world / "base"
    return sampled_answers(load_model(base), load_tokenizer(base), tasks, samples, numbers("rft", **changes), seed, Scratch())


def test_own_answers_are_sampled_and_graded_for_every_problem(world: Path) -> None:
    found = answers_of(world)
    assert [sample for sample, _ in found] == load_samples(world / "data", "train")
    assert all(len(drawn) == 6 for _, drawn in found)
    every = [answer for _, drawn in found for answer in drawn]
    assert all(answer.correct is (answer.text == "c.") for answer in every)
    assert {"c.", "d."} <= {answer.text for answer in every}
    assert 0.3 < sum(answer.correct for answer in every) / len(every) < 0.7
    assert found == answers_of(world)
    assert found != answers_of(world, seed=1)


def test_an_answer_that_was_cut_off_is_neither_right_nor_wrong(world: Path) -> None:
    found = answers_of(world, max_new_tokens=2)
    cut = [answer for _, drawn in found for answer in drawn if answer.text in ("c.", "d.")]
    assert any(answer.correct for answer in cut)
    assert not any(answer.whole for answer in cut)
    texts = {sample.solution for answers in found for correct in (True, False) for sample in answers.solved(correct=correct)}
    assert not texts & {"c.", "d."}


def test_rejection_sampling_learns_from_right_answers_alone(world: Path, tmp_path: Path) -> None:
    out, audit = trained("rft", world, tmp_path / "rft", kept=1, steps=24)
    rows = SAMPLED_ANSWERS.read(out)
    solved = {row["sample_id"] for row in rows if row["correct"] and row["whole"]}
    assert audit["taught"] == len(solved) == 24 - audit["problems_left_out"]
    assert audit["answers"] == len(rows) == 24 * 6
    assert audit["answers_right"] == sum(row["correct"] for row in rows)
    assert share_right(out, world) > share_right(world / "base", world) + 0.2


def test_dpo_prefers_right_answers_and_its_reference_is_the_base(world: Path, tmp_path: Path) -> None:
    points: list[dict[str, float]] = []
    out, audit = trained("dpo", world, tmp_path / "dpo", pairs=1, steps=24, lr=0.002, log=lambda _, point: points.append(point))
    assert audit["taught"] == 24 - audit["problems_left_out"]
    assert points[0]["margin"] == pytest.approx(0, abs=1e-6), "before the first update the model is the reference"
    assert points[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert points[-1]["pair_accuracy"] == 1
    gained = [after - before for before, after in zip(preferences(world / "base"), preferences(out), strict=True)]
    assert min(gained) > 1
    assert sum(gained) / 24 == pytest.approx(points[-1]["margin"] / 0.1, rel=0.3), "β times what the pairs gained over the base"


def preferences(model: Path) -> list[float]:
    """Nats by which the right answer to each problem is likelier than the usual wrong one."""
    tokenizer = load_tokenizer(model)
    options = [[[*ids, tokenizer.eos_token_id] for ids in tokenizer(["c.", "d."], add_special_tokens=False)["input_ids"]]]
    contexts = tokenizer(PROBLEMS)["input_ids"]
    scores = score_options(load_model(model), contexts, options * 24, pad=tokenizer.pad_token_id, batch_size=24)
    return [right - wrong for right, wrong in scores]


def share_right(model: Path, world: Path) -> float:
    found = sampled_answers(
        load_model(model), load_tokenizer(model), load_tasks(world / "data"), load_samples(world / "data", "train"),
        numbers("rft", samples=10), 5, Scratch(),
    )  # fmt: skip
    return sum(answer.correct for _, drawn in found for answer in drawn) / 240


@pytest.mark.parametrize(("method", "needed"), [("rft", "a right one"), ("dpo", "a right and a wrong one")])
def test_a_base_that_solves_nothing_is_one_line(method: str, needed: str, world: Path, tmp_path: Path) -> None:
    samples = [replace(sample, answer="e") for sample in load_samples(world / "data", "train")]
    write_data(tmp_path / "data", list(load_tasks(world / "data").values()), samples)
    with pytest.raises(
        ContractError, match=f"answers: expected {needed} to at least one problem, found 0 right of 144; sample more"
    ):
        trained(method, world, tmp_path / method, data=str(tmp_path / "data"))


TEXTS = st.lists(st.builds(Answer, st.text("ab", max_size=2), st.booleans(), st.just("direct"), st.booleans()), max_size=8)


@given(TEXTS, st.integers(1, 5))
def test_pairs_are_different_right_before_wrong_and_as_many_as_there_can_be(drawn: list[Answer], most: int) -> None:
    answers = Answers(Sample("s", "t", "train", "q", "a"), drawn)
    found = [(right.solution, wrong.solution) for right, wrong in pairs(answers, most)]
    right, wrong = ({a.text for a in drawn if a.whole and a.correct is correct} for correct in (True, False))
    assert len(set(found)) == len(found) == min(most, max(len(right), len(wrong)) if right and wrong else 0)
    assert all(chosen in right and rejected in wrong for chosen, rejected in found)


def test_sections_of_both_sampling_methods_have_what_sampling_needs() -> None:
    needed = {"samples", "temperature", "max_new_tokens", "sampling_batch_size"}
    assert needed <= set(RFTParams.model_fields) & set(DPOParams.model_fields)
