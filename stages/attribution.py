"""Decoder norms compared between models: NRN, MAS and a class for every feature of every crosscoder."""

from safetensors.torch import load_file

from featdiff.analysis.attribution import attribute, class_counts
from featdiff.config import load_study
from featdiff.crosscoder.model import Crosscoder
from featdiff.launch import stage
from featdiff.tasks.task import write_rows

with stage("attribution", out="analysis/attribution") as run:
    rows = []
    for name in load_study().crosscoder.fits:
        folder = run.read(f"crosscoders/{name}")
        rows += attribute(name, Crosscoder.load(folder), load_file(folder / "features.safetensors"), run.params)
    write_rows(run.out / "features.parquet", rows)
    run.metrics(class_counts(rows))
