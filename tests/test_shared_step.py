"""A step shared out among processes, which really run: the same cutoff, entries and weights as by one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from featdiff.config.dictionary import CrosscoderTraining
from featdiff.crosscoder.descent import Descent
from featdiff.crosscoder.losses.batchtopk import BatchTopK
from project import ROOT
from tiny import params_of, random_crosscoder

MODELS, ROWS = ("base", "sft", "grpo"), 64


def trained() -> dict[str, object]:
    """Four steps on rows of which all processes see the same and take every n-th."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1))
    crosscoder, counts = random_crosscoder(MODELS), []
    params = params_of(CrosscoderTraining, "crosscoder", "training", batch_tokens=ROWS, k=2)
    take, descent = BatchTopK(crosscoder, params, 1.0, accelerator), Descent(crosscoder, 0.01, accelerator)
    for step in range(1, 5):
        x = torch.randn(ROWS, len(MODELS), 6, generator=torch.Generator().manual_seed(step))
        x[1::2] *= 0.1 * step  # most of the largest values are in one process
        result = take(x[accelerator.process_index :: accelerator.num_processes], step, torch.zeros(12, dtype=torch.bool))
        result.total.backward()
        descent.step(step, result.total)
        counts.append(accelerator.reduce(result.count_F, "sum").tolist())
    weights = {name: tensor.flatten().tolist() for name, tensor in crosscoder.state_dict().items()}
    return {"counts": counts, "weights": weights, "rank": accelerator.process_index}


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(tmp_path)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    one, two = trained(), [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert two[0]["weights"] == two[1]["weights"], "processes stay equal, bit for bit"
    for each in two:
        assert each["counts"] == one["counts"]
        assert all(sum(counts) == 2 * ROWS for counts in each["counts"])
        for name, values in one["weights"].items():
            torch.testing.assert_close(
                torch.tensor(each["weights"][name]), torch.tensor(values), rtol=1e-4, atol=1e-5, msg=name
            )


if __name__ == "__main__":
    found = trained()
    (Path(sys.argv[1]) / f"{found['rank']}.json").write_text(json.dumps(found))
