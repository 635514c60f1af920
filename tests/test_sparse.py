"""The hand-written gradient against finite differences and against autograd's of dense products, in double precision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from featdiff.crosscoder.losses.loss import SPARSE_BELOW, part_of, rebuild
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.selection import places
from featdiff.crosscoder.sparse import Columns, Entries, Part, rebuild_parts

ROWS, MODELS, WIDTH, FEATURES = 5, 2, 2, 7
INPUTS = MODELS * WIDTH
Made = Callable[[Tensor, Tensor], list[Part]]
"""Parts of a code, from preactivations and from what a selection keeps."""
SOME = torch.tensor([0, 2, 5, 6])


def weights() -> tuple[Tensor, ...]:
    """x, W_enc, b_enc, W_dec, b_dec. Feature 3 never fires, feature 6 always does."""
    generator = torch.Generator().manual_seed(0)
    x, W_enc, b_enc, W_dec = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((ROWS, INPUTS), (INPUTS, FEATURES), (FEATURES,), (FEATURES, MODELS, WIDTH))
    )
    b_enc[3], b_enc[6] = -50, 50
    return x, *(weight.requires_grad_() for weight in (W_enc, b_enc, W_dec))


def kept(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """The entries of a selection: every positive one but those of row 2 and one of row 0."""
    chosen = (x @ W_enc + b_enc).detach() > 0
    chosen[2] = False
    chosen[0, 6] = False
    return chosen


PARTS: dict[str, Made] = {
    "entries": lambda f, chosen: [Entries(f, places(chosen))],
    "columns": lambda f, chosen: [Columns(f * chosen, FEATURES)],
    "some columns": lambda f, chosen: [Columns((f * chosen)[:, SOME], FEATURES, SOME)],
    "entries, then some columns": lambda f, chosen: [Entries(f, places(chosen)), Columns(f[:, SOME].relu(), FEATURES, SOME)],
    "columns, some columns, entries": lambda f, chosen: [
        Columns(f * chosen, FEATURES),
        Columns(f[:, SOME].relu(), FEATURES, SOME),
        Entries(f, places(chosen)),
    ],
}


def codes(made: str, f: Tensor, chosen: Tensor) -> list[Tensor]:
    """The same parts as dense codes, with the graph of ``f``."""
    some = torch.zeros(FEATURES, dtype=torch.bool).index_fill(0, SOME, True)
    by_name = {"entries": chosen, "columns": chosen, "some columns": chosen & some}
    masks = [by_name.get(name, some.expand_as(chosen)) for name in made.replace(" then ", " ").split(", ")]
    if len(masks) > 1:
        masks[1] = some.expand_as(chosen)
    return [torch.relu(f) * mask for mask in masks]


@pytest.mark.parametrize("made", PARTS)
@pytest.mark.parametrize("uses", ["reconstruction", "activity", "both"])
def test_gradients_are_finite_differences_and_those_of_dense_products(made: str, uses: str) -> None:
    x, *parameters = weights()
    chosen = kept(x, *parameters[:2])

    def outputs(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> tuple[Tensor, ...]:
        f = (x @ W_enc + b_enc).detach()
        activity, rebuilt = rebuild_parts(x, W_enc, b_enc, W_dec, PARTS[made](f, chosen), W_dec.detach().norm(dim=-1))
        used = {"reconstruction": rebuilt, "activity": [activity], "both": [activity, *rebuilt]}[uses]
        return tuple(output.sin() if output.dim() else output.square() for output in used)

    def dense(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> tuple[Tensor, ...]:
        all_codes = codes(made, x @ W_enc + b_enc, chosen)
        activity = sum((code * W_dec.norm(dim=-1).sum(1)).sum() for code in all_codes)
        rebuilt = [code @ W_dec.flatten(1) for code in all_codes]
        used = {"reconstruction": rebuilt, "activity": [activity], "both": [activity, *rebuilt]}[uses]
        return tuple(output.sin() if output.dim() else output.square() for output in used)

    assert torch.autograd.gradcheck(outputs, tuple(parameters))
    found, wanted = outputs(*parameters), dense(*parameters)
    torch.testing.assert_close(found, wanted)
    slopes = [
        torch.autograd.grad(sum(output.sum() for output in outputs), parameters, allow_unused=True, materialize_grads=True)
        for outputs in (found, wanted)
    ]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("made", PARTS)
def test_counts_and_totals_are_those_of_the_dense_code(made: str) -> None:
    x, W_enc, b_enc, _ = weights()
    f, chosen = (x @ W_enc + b_enc).detach(), kept(x, W_enc, b_enc)
    for part, code in zip(PARTS[made](f, chosen), codes(made, f, chosen), strict=True):
        assert part.counts().tolist() == (code > 0).sum(0).tolist()
        torch.testing.assert_close(part.totals(), code.sum(0))


def test_entries_of_rows_and_columns_that_are_empty() -> None:
    f = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 3.0], [0.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    found = Entries(f, places(f > 0))
    assert (found.row_E.tolist(), found.column_E.tolist(), found.value_E.tolist()) == ([1, 1, 3], [1, 2, 0], [2, 3, 4])
    assert (found.start_B.tolist(), found.start_F.tolist()) == ([0, 0, 2, 2], [0, 1, 2])
    assert found.decode(torch.eye(3)).tolist() == f.tolist()


def test_a_code_that_keeps_nothing_has_gradients_of_zero() -> None:
    x, *parameters = weights()
    nothing = Entries(torch.zeros(ROWS, FEATURES, dtype=torch.float64), torch.empty(0, dtype=torch.long))
    activity, (rebuilt,) = rebuild_parts(x, *parameters, [nothing], torch.ones(FEATURES, MODELS, dtype=torch.float64))
    (activity + rebuilt.sum()).backward()
    assert activity == 0
    assert not rebuilt.any()
    assert not any(weight.grad.any() for weight in parameters)


@pytest.mark.parametrize("share", [0.951, 0.9])
def test_the_same_batch_gives_the_same_gradient_bytes_with_several_threads(share: float) -> None:
    """Sums over entries are shared out among threads from 32,768 entries on, and must not depend on who comes first."""
    crosscoder = Crosscoder(["base", "sft", "grpo"], 96, 768, "l1")
    crosscoder.initialise(0.1, torch.Generator().manual_seed(0), tied=False)
    x = torch.randn(1024, 3, 96, generator=torch.Generator().manual_seed(1))
    f = crosscoder.linear(x)
    chosen = f > f.flatten().kthvalue(int(share * f.numel())).values
    assert chosen.sum() > 32_768
    assert (chosen.sum() < SPARSE_BELOW * f.numel()) == (share > 0.95)
    threads, found = torch.get_num_threads(), set()
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            crosscoder.zero_grad()
            dead = Columns(f[:, ::9].relu(), 768, torch.arange(0, 768, 9))
            norms = crosscoder.decoder_norms().detach()
            activity, parts = rebuild(crosscoder, x, part_of(f, places(chosen)), dead, norms_FM=norms)
            (sum(part.square().sum() for part in parts) + activity).backward()
            weights = (crosscoder.W_enc, crosscoder.b_enc, crosscoder.W_dec)
            found.add(b"".join(weight.grad.contiguous().numpy().tobytes() for weight in weights))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
