"""Accuracy of every kept checkpoint of one arm on the same questions, and its KL divergence from the base."""

from functools import partial

from featdiff.artifacts.artifact import read_json
from featdiff.artifacts.tables import CHECKPOINT_ACCURACY, CHECKPOINT_DIVERGENCE, CHECKPOINT_SAMPLES
from featdiff.language.divergence import Divergence, divergence_table
from featdiff.language.evaluation import accuracy_table
from featdiff.language.models import checkpoint_folders, load_model, load_tokenizer, require_same_tokenizer
from featdiff.pipeline.stage import stage, stage_key
from featdiff.processes.ranks import rank, shared_out
from featdiff.tasks.task import first_of_each, load_samples, load_tasks

name = stage_key("--arm", __doc__, lambda study: study.arms)

with stage("checkpoints", key=name, out=f"checkpoints/{name}") as run:
    data, base, folder = run.read("data", "tasks.json", "eval.parquet"), run.read("models/base"), run.read(f"models/{name}")
    require_same_tokenizer(folder, base)
    tasks, tokenizer, part = load_tasks(data), load_tokenizer(base), run.shared_scratch().part
    questions = first_of_each([each for each in load_samples(data, "eval") if each.split == "report"], run.params.questions)
    prompts = first_of_each(questions, run.params.prompts)
    divergence = Divergence(load_model(base).to(run.device), tokenizer, prompts, tasks, run.params, run.seed)
    drawn = part("base", partial(divergence.answers, divergence.base))
    folders, (samples, accuracy, distance) = checkpoint_folders(folder), ([], [], [])
    steps = read_json(folder / "audit.json")["checkpoints"] or [None] * len(folders)  # not known of imported ones
    asked = [partial(divergence.checkpoint, path, i, questions, drawn, part) for i, path in enumerate(folders, 1)]
    for number, (step, (answers, found)) in enumerate(zip(steps, shared_out(asked, name), strict=True), 1):
        share = number / len(folders) if step is None else step / steps[-1]
        where = {"arm": name, "checkpoint": number, "step": step, "share": share}
        samples += [CHECKPOINT_SAMPLES.kept(where | row | {"role": tasks[row["task"]].role}) for row in answers]
        accuracy += [CHECKPOINT_ACCURACY.kept(where | row) for row in accuracy_table(answers, tasks, run.params, run.seed)]
        distance += [where | row for row in divergence_table(prompts, tasks, found, run.params, run.seed)]
    if rank() == 0:
        CHECKPOINT_SAMPLES.write(run.out, samples)
        CHECKPOINT_ACCURACY.write(run.out, accuracy)
        CHECKPOINT_DIVERGENCE.write(run.out, distance)
    run.metrics({f"forward_kl/{row['role']}": row["forward_kl"] for row in distance if row["task"] is None})  # of the last
