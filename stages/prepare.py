"""Train problems, teacher solutions, evaluation splits and text corpora."""

from collections import Counter

from featdiff.pipeline.stage import stage
from featdiff.tasks.prepare import prepare

with stage("prepare", out="data") as run:
    data = prepare(run.params, run.seed)
    data.save(run.out)
    run.metrics(
        {
            "train": len(data.train),
            "eval": dict(Counter(sample.split for sample in data.eval)),
            "corpus": len(data.corpus),
            "pretrain": len(data.pretrain),
        }
    )
