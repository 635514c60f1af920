"""Verdict per claim, figures and tables: one page, and the summary that git shows."""

from pathlib import Path

from featdiff.artifacts.artifact import write_json
from featdiff.artifacts.dvc import locked
from featdiff.config.published import published
from featdiff.pipeline.stage import stage
from featdiff.report.build import render
from featdiff.report.calibration import error_rates, false_sets
from featdiff.report.claims import Claims
from featdiff.report.evidence import load
from featdiff.report.readme import results
from featdiff.report.sources import traced
from featdiff.report.summary import headline, plots, summarise

SUMMARY, HEADLINE = Path("metrics/summary.json"), Path("metrics/headline.json")
ATTACHED = ("index.html", "summary.md")  # what MLflow shows by itself; the other pages need files beside them

with stage("report", out="report") as run:
    evidence = load(run.read, run.study)
    claims = Claims(evidence, run.params, run.seed)
    verdicts, rates = claims.verdicts(), error_rates(false_sets(claims), run.params.confidence)
    trace = traced(claims, verdicts, {output.path: output.md5 for output in locked(Path())})
    paper = published(run.params.paper_model)
    pages = render(evidence, claims, verdicts, rates, run.params, run.study.profile, trace, run.parents, paper)
    summary = summarise(evidence, claims, verdicts, rates)
    for name, page in (pages | {"summary.md": results(summary)} | plots(summary)).items():
        (run.out / name).parent.mkdir(exist_ok=True)
        (run.out / name).write_text(page, encoding="utf-8")
        if name in ATTACHED:
            run.attach(name)
    write_json(run.out / "claims.json", trace)
    foremost = headline(claims, summary)
    run.beside |= {SUMMARY: summary, HEADLINE: foremost}
    run.metrics(foremost)
