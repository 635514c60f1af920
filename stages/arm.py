"""A model that is compared with the base: trained from it by one of the methods, or brought from elsewhere."""

from importlib import import_module

from featdiff.artifacts.artifact import MANIFEST, sha256_file, write_json
from featdiff.artifacts.tables import COMPLETIONS
from featdiff.pipeline.stage import stage, stage_key
from featdiff.processes.ranks import rank

name = stage_key("--arm", __doc__, lambda study: study.arms)

with stage("arm", key=name, out=f"models/{name}", numbers=lambda study: study.numbers(name)) as run:
    base, data = run.read("models/base"), run.read(run.study.problems, "tasks.json", "train.parquet")
    arm = run.study.arms[name]
    method = import_module(f"featdiff.training.{arm.method}")
    audit = method.train(base, data, run.out, run.scratch(), run.params, run.seed + arm.seed, run.log)
    audit |= {"base_manifest": sha256_file(base / MANIFEST), "problems_sha256": sha256_file(data / "train.parquet")}
    if rank() == 0:
        write_json(run.out / "audit.json", audit)
    run.metrics({name: value for name, value in audit.items() if isinstance(value, (int, float))})
    if (run.out / COMPLETIONS.file).exists():
        run.attach(COMPLETIONS.file)
