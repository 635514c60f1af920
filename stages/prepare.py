"""Train problems, teacher solutions, evaluation splits and text corpora."""

from collections import Counter

from featdiff.artifacts.artifact import write_json
from featdiff.pipeline.stage import stage
from featdiff.tasks.prepare import prepare, sources_read

with stage("prepare", out="data") as run:
    data = prepare(run.params, run.seed)
    data.save(run.out)
    write_json(run.out / "sources.json", sources_read(run.params))
    run.metrics(
        {
            "train": len(data.train),
            "eval": dict(Counter(sample.split for sample in data.eval)),
            "corpus": len(data.corpus),
            "pretrain": len(data.pretrain),
        }
    )
