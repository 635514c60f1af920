"""Answers of one model to every question of every split, with accuracy, intervals and manner of answering."""

from featdiff.artifacts.tables import EVAL_ACCURACY, EVAL_SAMPLES
from featdiff.config.values import BASE
from featdiff.language.evaluation import Evaluator, accuracy_table, evaluate
from featdiff.language.models import load_model, load_tokenizer, require_same_tokenizer
from featdiff.pipeline.stage import stage, stage_key
from featdiff.processes.ranks import rank
from featdiff.tasks.task import load_samples, load_tasks

name = stage_key("--model", __doc__, lambda study: study.models)

with stage("evaluate", key=name, out=f"evals/{name}") as run:
    data, folder = run.read("data", "tasks.json", "eval.parquet"), run.read(f"models/{name}")
    require_same_tokenizer(folder, run.read(f"models/{BASE}"))
    tasks = load_tasks(data)
    evaluator = Evaluator(
        load_model(folder).to(run.device),
        load_tokenizer(folder),
        tasks,
        batch_size=run.params.batch_size,
        max_new_tokens=run.params.max_new_tokens,
    )
    samples, scratch = load_samples(data, "eval"), run.shared_scratch()
    agreement = evaluator.with_vllm(samples, scratch, str(folder))
    rows = evaluate(evaluator, samples, run.params, run.seed, scratch)
    table = accuracy_table(rows, tasks, run.params, run.seed)
    if rank() == 0:
        EVAL_SAMPLES.write(run.out, rows)
        EVAL_ACCURACY.write(run.out, table)
    run.attach(EVAL_ACCURACY.file)
    run.metrics(agreement | {row["task"]: row["accuracy"] for row in table if row["primary"] and row["split"] == "report"})
