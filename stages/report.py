"""Verdict per claim, figures and tables: one page, and the summary that git shows."""

from pathlib import Path

from featdiff.pipeline.stage import stage
from featdiff.report.build import render
from featdiff.report.evidence import load
from featdiff.report.summary import curated, summarise
from featdiff.report.verdicts import Judge

SUMMARY = Path("metrics/summary.json")

with stage("report", out="report") as run:
    evidence = load(run.read)
    judge = Judge(evidence, run.params, run.seed)
    verdicts = judge.verdicts()
    for name, page in render(evidence, judge, verdicts, run.params, run.study.profile, run.parents).items():
        (run.out / name).parent.mkdir(exist_ok=True)
        (run.out / name).write_text(page, encoding="utf-8")
        run.attach(name)
    summary = summarise(evidence, judge, verdicts)
    run.beside[SUMMARY] = summary
    run.metrics(curated(summary))
