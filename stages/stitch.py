"""Answers of the original and the tuned model stitched together at several depths: how deep lies what was gained?"""

from functools import partial

from featdiff.artifacts.tables import STITCHED
from featdiff.language.evaluation import Evaluator
from featdiff.language.models import load_model, load_tokenizer, resolve_layer
from featdiff.localization.stitching import seams
from featdiff.pipeline.stage import stage
from featdiff.processes.ranks import rank
from featdiff.tasks.task import first_of_each, load_samples, load_tasks

with stage("stitch", out="analysis/stitch") as run:
    data, roles = run.read("data", "tasks.json", "eval.parquet"), run.study.roles
    folders = {part: run.read(f"models/{name}") for part, name in (("original", roles.original), ("tuned", roles.tuned))}
    models = {part: load_model(folder).to(run.device) for part, folder in folders.items()}
    tasks, tokenizer, once = load_tasks(data), load_tokenizer(folders["original"]), run.shared_scratch().parts
    questions = first_of_each([each for each in load_samples(data, "eval") if each.split == "report"], run.params.questions)
    hooked = resolve_layer(models["original"], run.study.activations.layer)
    limits = {"batch_size": run.params.batch_size, "max_new_tokens": run.params.max_new_tokens}
    asked = {
        (lower, depth): partial(
            Evaluator(each, tokenizer, tasks, **limits).answer, questions, progress=f"{lower} below {depth}"
        )
        for lower, depth, each in seams(models, hooked, run.params.depths)
    }
    given = zip(asked, once([(f"{lower} {depth}", ask) for (lower, depth), ask in asked.items()]), strict=True)
    if rank() == 0:
        rows = [STITCHED.kept({"lower": lower, "depth": depth} | row) for (lower, depth), found in given for row in found]
        STITCHED.write(run.out, rows)
    run.metrics({"questions": len(questions), "seams": len(asked)})
