"""Verdict per claim, figures and tables: one page, and the summary that git shows."""

from pathlib import Path

from featdiff.pipeline.stage import stage
from featdiff.report.build import render
from featdiff.report.claims import Claims
from featdiff.report.evidence import load
from featdiff.report.summary import curated, summarise

SUMMARY = Path("metrics/summary.json")

with stage("report", out="report") as run:
    evidence = load(run.read, run.study)
    claims = Claims(evidence, run.params, run.seed)
    verdicts = claims.verdicts()
    for name, page in render(evidence, claims, verdicts, run.params, run.study.profile, run.parents).items():
        (run.out / name).parent.mkdir(exist_ok=True)
        (run.out / name).write_text(page, encoding="utf-8")
        run.attach(name)
    summary = summarise(evidence, claims, verdicts)
    run.beside[SUMMARY] = summary
    run.metrics(curated(summary))
