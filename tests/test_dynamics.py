"""Features over checkpoints: change, overlap, trajectories."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featdiff.artifacts.artifact import ContractError
from featdiff.artifacts.tables import BOOTSTRAP
from featdiff.attribution import dynamics
from featdiff.attribution.dynamics import (
    BLOCKS,
    block_changes,
    bootstrap_rows,
    change_from_base,
    overlap_rows,
    refit,
    text_blocks,
    top_overlap,
    trajectory_rows,
)
from featdiff.config.dictionary import CrosscoderTraining
from tiny import params_of, random_crosscoder

MODELS = ("base", "sft", "grpo")


def streams(rows: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 6, generator=generator)


@pytest.mark.parametrize("arm", ["sft", "grpo"])
def test_change_is_the_mean_absolute_difference_times_the_arms_norm(arm: str) -> None:
    crosscoder, (base, tuned) = random_crosscoder(MODELS), streams()
    slot = MODELS.index(arm)
    wanted = torch.zeros(12)
    for before, after in zip(base, tuned, strict=True):
        f_before = crosscoder.encode((before * crosscoder.scale[0] - crosscoder.mean).expand(1, 3, 6))[0]
        f_after = crosscoder.encode((after * crosscoder.scale[slot] - crosscoder.mean).expand(1, 3, 6))[0]
        wanted += (f_after - f_before).abs() / len(base)
    wanted *= crosscoder.W_dec[:, slot].norm(dim=1)
    torch.testing.assert_close(change_from_base(crosscoder, base, tuned, arm), wanted, rtol=1e-4, atol=1e-5)


def test_reading_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    crosscoder, (base, tuned) = random_crosscoder(MODELS), streams()
    whole = change_from_base(crosscoder, base, tuned, "grpo")
    monkeypatch.setattr(dynamics, "READ_ROWS", 7)
    torch.testing.assert_close(change_from_base(crosscoder, base, tuned, "grpo"), whole)


def test_a_checkpoint_that_equals_the_base_has_not_moved() -> None:
    crosscoder, (base, _) = random_crosscoder(MODELS), streams()
    crosscoder.scale[2] = crosscoder.scale[0]
    assert (change_from_base(crosscoder, base, base.clone(), "grpo") == 0).all()


def test_blocks_hold_whole_texts_and_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = torch.tensor([4] * 3 + [5] * 1 + [9] * 7 + [10] * 2 + [2] * 7)
    assert text_blocks(texts).tolist() == [0] * 3 + [1] + [2] * 7 + [3] * 2 + [4] * 7
    many = text_blocks(torch.arange(1000).repeat_interleave(3))
    assert many.bincount().tolist() == pytest.approx([3000 / BLOCKS] * BLOCKS, abs=3)
    assert (many.view(1000, 3) == many.view(1000, 3)[:, :1]).all()
    crosscoder, (base, tuned) = random_crosscoder(MODELS), streams()
    monkeypatch.setattr(dynamics, "READ_ROWS", 7)
    sums = block_changes(crosscoder, base, tuned, "grpo", text_blocks(texts))
    torch.testing.assert_close(sums.sum(0) / 20, change_from_base(crosscoder, base, tuned, "grpo"))
    torch.testing.assert_close(sums[2] / 7, change_from_base(crosscoder, base[4:11], tuned[4:11], "grpo"))


def block_sums(strength_F: Tensor, seed: int, noise: float = 1.0, blocks: int = 32) -> Tensor:
    """Sums over blocks of ten rows of features that change by ``strength_F``, with noise."""
    return 10 * (strength_F + noise * torch.rand(blocks, len(strength_F), generator=torch.Generator().manual_seed(seed)))


def relative(rows: list[dict[str, float]], checkpoint: int) -> Tensor:
    kept = [row for row in rows if row["checkpoint"] == checkpoint]
    return torch.tensor([(row["overlap"] - row["chance"]) / (row["ceiling"] - row["chance"]) for row in kept])


def test_overlap_is_measured_between_chance_and_one_checkpoint_read_twice() -> None:
    """The last set is half the early one, in truth; reading noise lowers what is seen, and the ceiling with it."""
    strength = torch.zeros(400)
    strength[:20] = 0.3
    moved = strength.roll(10)
    rows = bootstrap_rows("a", {1: block_sums(moved, 0), 2: block_sums(strength, 1)}, torch.full((32,), 10.0), [20], 200, 0)
    seen = next(row for row in rows if (row["checkpoint"], row["draw"]) == (1, 0))
    assert seen["chance"] == 20 / 400
    assert seen["ceiling"] < 0.95
    assert seen["overlap"] < 0.48
    found = relative(rows, 1)
    assert len(found) == 201
    assert found[0] == pytest.approx((0.5 - 0.05) / 0.95, abs=0.08)
    assert 0 < found.std() < 0.2
    torch.testing.assert_close(relative(rows, 2), torch.ones(201))
    strangers = bootstrap_rows(
        "a", {1: block_sums(strength.roll(200), 0), 2: block_sums(strength, 1)}, torch.full((32,), 10.0), [20], 1, 0
    )
    assert relative(strangers, 1)[0] == pytest.approx(0, abs=0.1)


def test_no_token_is_read_for_both_sides() -> None:
    """Two checkpoints that have changed nothing but share their noise are strangers."""
    noise = block_sums(torch.zeros(300), 0)
    rows = bootstrap_rows("a", {1: noise, 2: noise.clone()}, torch.full((32,), 10.0), [30], 50, 0)
    assert sum(row["overlap"] for row in rows) / len(rows) < 0.3


def test_an_early_checkpoint_that_has_changed_less_is_not_taken_for_another_one() -> None:
    """The same features at a third of their strength, under the same noise: they overlap less, and are the same."""
    strength = torch.zeros(400)
    strength[:20] = 0.6
    made = {1: block_sums(strength / 3, 0), 2: block_sums(strength, 1)}
    rows = bootstrap_rows("a", made, torch.full((32,), 10.0), [20], 1, 0)
    assert rows[0]["overlap"] < 0.85
    assert relative(rows, 1)[0] == pytest.approx(1, abs=0.15)


def test_draws_are_the_same_for_every_arm_and_change_is_the_sum_over_features(tmp_path: Path) -> None:
    strength, rows_K = torch.linspace(0, 1, 50), torch.full((8,), 10.0)
    sums = block_sums(strength, 3, blocks=8)
    once = bootstrap_rows("a", {1: sums / 2, 2: sums}, rows_K, [5, 10, 99], 20, 4)
    assert once == bootstrap_rows("a", {1: sums / 2, 2: sums}, rows_K, [5, 10], 20, 4)
    BOOTSTRAP.write(tmp_path, once)
    assert once[0]["change"] == pytest.approx((sums / 2).sum().item() / 80)
    doubled = bootstrap_rows("b", {1: sums, 2: 2 * sums}, rows_K, [5, 10], 20, 4)
    assert [row["change"] for row in doubled] == pytest.approx([2 * row["change"] for row in once])
    assert len({row["change"] for row in once}) > 20
    assert (
        bootstrap_rows("a", {1: sums[:3]}, rows_K[:3], [5], 20, 4) == bootstrap_rows("a", {1: sums}, rows_K, [50], 9, 4) == []
    )


def test_overlap_counts_shared_members_of_the_top_sets() -> None:
    a, b = torch.tensor([5.0, 4, 3, 2, 1, 0]), torch.tensor([5.0, 0, 4, 1, 2, 3])
    assert [top_overlap(a, b, n) for n in (1, 2, 3, 6, 99)] == [1, 1 / 2, 2 / 3, 1, 1]
    assert top_overlap(a, -a, 3) == 0


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 15))
def test_overlap_is_symmetric_and_one_with_itself(seed: int, top: int) -> None:
    a, b = torch.rand(2, 12, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert top_overlap(a, a, top) == 1
    assert top_overlap(a, b, top) == top_overlap(b, a, top) == top_overlap(a[order], b[order], top)
    assert 0 <= top_overlap(a, b, top) <= 1


def changes() -> dict[int, Tensor]:
    return {1: torch.tensor([3.0, 2, 1, 0, 0.5]), 2: torch.tensor([0.0, 1, 3, 4, 2]), 3: torch.tensor([5.0, 1, 0, 4, 3])}


def test_every_pair_of_checkpoints_for_every_size() -> None:
    floor = (torch.tensor([3.0, 2, 1]), torch.tensor([3.0, 1, 2]))
    rows = overlap_rows("sft", "fixed", changes(), floor, [1, 2])
    assert {row["method"] for row in rows} == {"fixed"}
    done_twice = {row["top"]: row["overlap"] for row in rows if row["a"] == row["b"] == 0}
    assert done_twice == {1: 1.0, 2: 0.5}
    rows = [row for row in rows if row["a"]]
    assert len(rows) == 2 * 3 * 3
    table = {(row["top"], row["a"], row["b"]): row["overlap"] for row in rows}
    assert all(table[top, a, a] == 1 for top in (1, 2) for a in (1, 2, 3))
    assert (table[2, 1, 2], table[2, 1, 3], table[2, 2, 3]) == (0, 0.5, 0.5)
    assert all(table[top, a, b] == table[top, b, a] for top, a, b in table)
    assert {row["arm"] for row in rows} == {"sft"}


def test_trajectories_follow_every_feature_from_zero_on() -> None:
    rows = trajectory_rows("grpo", changes())
    assert len(rows) == 5 * (1 + 3)
    assert {row["arm"] for row in rows} == {"grpo"}
    assert all(row["change"] == 0 and row["rank"] is None for row in rows if row["checkpoint"] == 0)
    table = {(row["checkpoint"], row["feature_id"]): (row["change"], row["rank"]) for row in rows}
    assert len(table) == len(rows)
    assert table[1, 0] == (3, 1)
    assert table[1, 3] == (0, 5)
    assert table[2, 3] == (4, 1)
    assert table[2, 0] == (0, 5)
    assert table[3, 1] == (1, 4)
    for checkpoint in (1, 2, 3):
        assert sorted(table[checkpoint, k][1] for k in range(5)) == [1, 2, 3, 4, 5]


def test_training_on_keeps_the_numbers_of_features_and_follows_the_checkpoint() -> None:
    generator = torch.Generator().manual_seed(0)
    pair = random_crosscoder(("base", "sft"), d_model=16, n_features=12)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q[:12]
    pair.W_dec.data = directions.unsqueeze(1).repeat(1, 2, 1)
    pair.W_enc.data, pair.scale = pair.W_dec.data.permute(1, 2, 0) / 2, torch.ones(2)
    source = torch.relu(torch.randn(4000, 12, generator=generator) - 0.5)
    acts = (source @ directions).unsqueeze(1).repeat(1, 2, 1)
    acts[:, 1] -= source[:, 3:4] * directions[3]  # what the checkpoint does not have yet
    small = {"n_features": 12, "batch_tokens": 200, "steps": 150, "lr": 0.01, "k": 3, "dead_after_tokens": 10**6}
    training = params_of(CrosscoderTraining, "crosscoder", "training", **small)
    found = refit(pair, acts, training, 0, "test")
    others = torch.cat([found[:3], found[4:]])
    assert found[3] < 0.3
    assert (others - 0.5).abs().max() < 0.15
    again = refit(pair, acts, training, 1, "test")
    assert not torch.equal(found, again)
    torch.testing.assert_close(found, refit(pair, acts, training, 0, "test"))


def test_a_checkpoint_with_fewer_tokens_than_a_batch_is_one_line() -> None:
    pair = random_crosscoder(("base", "sft"))
    training = params_of(CrosscoderTraining, "crosscoder", "training", n_features=12, k=3, batch_tokens=256, heldout_share=0.1)
    with pytest.raises(
        ContractError, match=r"batch_tokens: expected at most 180 .*, found 256; .*activations.checkpoint_tokens"
    ):
        refit(pair, torch.randn(200, 2, 6), training, 0, "test")
