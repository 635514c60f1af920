"""The hand-written gradient against finite differences and against dense products, in double precision."""

import pytest
import torch
from torch import Tensor

from featdiff.crosscoder.losses.loss import SPARSE_BELOW, rebuild
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.sparse import Entries, autoencode

ROWS, INPUTS, FEATURES = 5, 4, 7


def weights() -> tuple[Tensor, ...]:
    """x, W_enc, b_enc, W_dec, b_dec. Feature 3 never fires, feature 6 always does."""
    generator = torch.Generator().manual_seed(0)
    x, W_enc, b_enc, W_dec, b_dec = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((ROWS, INPUTS), (INPUTS, FEATURES), (FEATURES,), (FEATURES, INPUTS), (INPUTS,))
    )
    b_enc[3], b_enc[6] = -50, 50
    return x, *(weight.requires_grad_() for weight in (W_enc, b_enc, W_dec, b_dec))


def kept(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """The entries of a selection: every positive one but those of row 2 and one of row 0."""
    chosen = (x @ W_enc + b_enc).detach() > 0
    chosen[2] = False
    chosen[0, 6] = False
    return chosen


def places(chosen: Tensor) -> Tensor:
    """Where ``chosen`` is not 0, in the flattened tensor."""
    return chosen.flatten().nonzero().squeeze(1)


def entries_of(code: Tensor) -> Entries:
    return Entries.of(code, places(code))


@pytest.mark.parametrize("uses", ["reconstruction", "values", "both"])
def test_gradients_are_finite_differences(uses: str) -> None:
    x, *parameters = weights()
    chosen = kept(x, *parameters[:2])

    def outputs(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, ...]:
        code = torch.relu(x @ W_enc + b_enc).detach() * chosen
        rebuilt, value = autoencode(x, W_enc, b_enc, W_dec, b_dec, entries_of(code))
        return {"reconstruction": (rebuilt.sin(),), "values": (value.square(),), "both": (rebuilt.sin(), value.square())}[uses]

    assert torch.autograd.gradcheck(outputs, tuple(parameters))


def test_reconstruction_and_values_are_those_of_the_dense_products() -> None:
    x, W_enc, b_enc, W_dec, b_dec = weights()
    code = (torch.relu(x @ W_enc + b_enc) * kept(x, W_enc, b_enc)).detach()
    entries = entries_of(code)
    rebuilt, value = autoencode(x, W_enc, b_enc, W_dec, b_dec, entries)
    torch.testing.assert_close(rebuilt, code @ W_dec + b_dec)
    assert torch.equal(rebuilt[2], b_dec)
    assert torch.equal(code[entries.row_E, entries.column_E], value)
    assert len(value) == (code > 0).sum()


def test_entries_of_rows_and_columns_that_are_empty() -> None:
    found = entries_of(torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 3.0], [0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]))
    assert [part.tolist() for part in found] == [[1, 1, 3], [1, 2, 0], [2.0, 3.0, 4.0], [0, 0, 2, 2]]


def test_the_same_batch_gives_the_same_gradient_bytes_with_several_threads() -> None:
    """Sums over entries are shared out among threads from 32,768 entries on, and must not depend on who comes first."""
    crosscoder = Crosscoder(["base", "sft", "grpo"], 96, 768, "l1")
    crosscoder.initialise(0.1, torch.Generator().manual_seed(0), tied=False)
    x = torch.randn(1024, 3, 96, generator=torch.Generator().manual_seed(1))
    f = crosscoder.preactivations(x).detach()
    chosen = f > f.flatten().kthvalue(int(0.951 * f.numel())).values
    assert 32_768 < chosen.sum() < SPARSE_BELOW * f.numel()
    threads, found = torch.get_num_threads(), set()
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            crosscoder.zero_grad()
            error, activity, _ = rebuild(crosscoder, x, crosscoder.preactivations(x), places(chosen))
            (error.square().sum() + activity).backward()
            found.add(b"".join(weight.grad.contiguous().numpy().tobytes() for weight in crosscoder.parameters()))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
