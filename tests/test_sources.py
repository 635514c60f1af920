"""Every number of a verdict leads to rows that exist, and from an artifact one finds the claims that read it."""

import json

import pytest

from featdiff.report import trace
from featdiff.report.claims import Claims
from featdiff.report.evidence import load
from featdiff.report.sources import sources, traced
from synthetic_study import STUDY, Plan, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folder, claims and verdicts of a synthetic study."""
    folder, plan = tmp_path_factory.mktemp("study"), Plan(n=60, n_features=700)
    write_study(folder, plan)
    claims = Claims(load(lambda name, *_: folder / name, plan.study), STUDY.report, 0)
    return folder, claims, claims.verdicts()


def test_every_number_leads_to_rows(study):
    folder, claims, verdicts = study
    found = traced(claims, verdicts, {"analysis/intervene/remove": "f" * 32}, lambda rows: rows.count(folder))
    numbers = [(key, name, number) for key, claim in found["claims"].items() for name, number in claim["numbers"].items()]
    assert {key for key, _, _ in numbers} == {verdict.key for verdict in verdicts if verdict.estimates}
    assert len(numbers) >= 10
    for key, name, number in numbers:
        assert number["rows"], (key, name)
        assert all(rows["count"] > 0 for rows in number["rows"]), (key, name)
        assert {rows["table"].rpartition("/")[0] for rows in number["rows"]} <= found["artifacts"].keys()
    assert found["artifacts"]["analysis/intervene/remove"] == "f" * 32
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("claim", "number", "purpose"), [("necessary", "found_on", "zero_tuned"), ("sufficient", "heldout", "amplify_original")]
)
def test_the_number_can_be_worked_out_of_its_rows_again(study, claim, number, purpose):
    folder, claims, verdicts = study
    [rows] = sources(claims, verdicts)[claim][number]
    read = [row for row in rows.table.read(folder / rows.path.parent) if all(row[c] in v for c, v in rows.where.items())]
    assert {row["purpose"] for row in read} == {purpose}

    def mean(control, task):
        right = [row["correct"] for row in read if (row["control"], row["task"]) == (control, task)]
        return sum(right) / len(right)

    tasks = {row["task"] for row in read}
    again = sum(mean("set", task) - mean("none", task) for task in tasks) / len(tasks)
    [verdict] = [verdict for verdict in verdicts if verdict.key == claim]
    assert again == pytest.approx(verdict.estimates[number].value)


def test_transfer_can_be_worked_out_of_its_rows_again(study):
    folder, claims, verdicts = study
    per_task: dict[str, dict[str, list[float]]] = {}
    for rows in sources(claims, verdicts)["transfer"]["gain"]:
        for row in rows.table.read(folder / rows.path.parent):
            if all(row[column] in values for column, values in rows.where.items()):
                per_task.setdefault(row["task"], {}).setdefault(rows.of, []).append(row["correct"])
    runs = claims.evidence.runs("grpo")

    def gain(task):
        share = {model: sum(right) / len(right) for model, right in per_task[task].items()}
        return sum(share[run] for run in runs) / len(runs) - share["base"]

    assert sum(map(gain, per_task)) / len(per_task) == pytest.approx(verdicts[0].estimates["gain"].value)


def test_from_a_claim_to_runs_and_from_an_artifact_to_claims(study, tmp_path, monkeypatch, capsys):
    folder, claims, verdicts = study
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert trace.main([]) == 2
    assert "report/claims.json: not found; make pull STAGE=report" in capsys.readouterr().err
    (tmp_path / "report").mkdir()
    found = traced(claims, verdicts, {}, lambda rows: rows.count(folder))
    (tmp_path / "report/claims.json").write_text(json.dumps(found))
    record = tmp_path / ".featdiff/runs/one"
    record.mkdir(parents=True)
    info = {"out": "analysis/intervene/remove", "status": "FINISHED", "ended": 1.0, "commit": "c" * 40, "id": "the-run"}
    (record / "run.json").write_text(json.dumps(info))
    assert trace.main(["necessary", "analysis/intervene/remove"]) == 0
    said = capsys.readouterr().out
    assert "rows of analysis/intervene/remove/samples.parquet (purpose zero_tuned;" in said
    assert "run the-run at commit cccccccccccc" in said
    readers = {line.strip() for line in said.partition("read by")[2].splitlines()}
    assert {"necessary: found_on", "necessary: heldout", "dictionary: taken away"} <= readers
    assert not any(line.startswith("sufficient") for line in readers)
    assert trace.main(["analysis/intervene/amplify"]) == 0
    others = {line.strip() for line in capsys.readouterr().out.partition("read by")[2].splitlines()}
    assert {"sufficient: heldout", "dictionary: amplified"} <= others
    assert not any(line.startswith(("transfer", "forgetting", "features")) for line in readers)
    assert trace.main(["neccessary"]) == 2
    assert "did you mean necessary" in capsys.readouterr().err
