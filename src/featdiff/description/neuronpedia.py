"""The features of the set for Neuronpedia, in the folder layout that its bulk import reads:

``python -m featdiff.description.neuronpedia <folder> --model <its id there> [--part tuned | original]``

    <folder>/<model>/<source>/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
                             features/batch-0.jsonl.gz      a line per feature
                             activations/batch-0.jsonl.gz   a line per context
``<source>`` is ``<layer>-<name of the set>``, layer as there: the number of the block whose output is read, from 0. Everything
is what ``describe`` found under the swap readout in one model; a feature's vector is its decoder row in raw units, with which
it can be steered. The tables of the layout are those of SAEDashboard, ``sae_dashboard/neuronpedia/neuronpedia_export.py``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from featdiff.artifacts.artifact import ContractError, exported, read_json, verify
from featdiff.artifacts.tables import CONTEXTS
from featdiff.config.params import load_study
from featdiff.config.reading import ConfigError
from featdiff.crosscoder.model import Crosscoder
from featdiff.crosscoder.readout import Reader
from featdiff.processes.launch import EXIT_BAD_INPUT
from featdiff.processes.signals import say

DESCRIBED = Path("analysis/describe")
CREATOR = "clkht01d40000jv08hvalcvly"
"""The account that their own importer falls back to."""
TOP = -1.0
"""Their mark for a context that is one of the strongest, in place of the bounds of a bin."""
Row = dict[str, Any]


def _empty(names: str) -> Row:
    return {name: [] for name in names.split()}


FEATURE = _empty(
    "topkCosSimIndices topkCosSimValues neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 "
    "correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices "
    "correlated_features_pearson correlated_features_l1 logits_hist_data_bar_heights logits_hist_data_bar_values "
    "decoder_weights_dist"
)
ACTIVATION = _empty("dfaValues lossValues")
SET = dict.fromkeys(("showDfa", "showCorrelated", "showHeadAttribution", "showUmap"), False)
SOURCE = {"inferenceEnabled": False, "hasUmap": False, "hasUmapLogSparsity": False, "hasUmapClusters": False}
"""What their tables have and this project has not: a column must be there, and may be empty."""


@dataclass(frozen=True)
class Names:
    """What things are called at Neuronpedia."""

    model: str
    set: str
    """Of the features."""
    title: str
    creator: str
    creator_id: str


def feature_rows(described: Mapping[str, Any], part: str, vectors: Mapping[int, list[float]], facts: Row) -> Iterator[Row]:
    """A line per feature of ``describe``'s ``described``, as ``part`` has it. ``vectors``: decoder rows; ``facts``: what all
    lines say alike."""
    for feature in described["features"]:
        k, spread = feature["feature_id"], feature["histogram"]
        bars = len(spread[part])
        yield (
            FEATURE
            | facts
            | {
                "index": str(k),
                "maxActApprox": feature["largest"],
                "hasVector": True,
                "vector": vectors[k],
                "vectorDefaultSteerStrength": feature["largest"],
                "pos_str": [each["token"] for each in feature["promoted"]],
                "pos_values": [each["logit"] for each in feature["promoted"]],
                "neg_str": [each["token"] for each in feature["suppressed"]],
                "neg_values": [each["logit"] for each in feature["suppressed"]],
                "frac_nonzero": feature["corpus_rate"][part],
                "freq_hist_data_bar_heights": spread[part],
                "freq_hist_data_bar_values": [spread["upper"] * (bar + 0.5) / bars for bar in range(bars)],
            }
        )


def activation_rows(contexts: Sequence[Row], part: str, facts: Row) -> Iterator[Row]:
    """A line per context. Contexts that stand for a quantile of a feature's values have it as both bounds of their bin."""
    for context in contexts:
        values, quantile = context[part], context["quantile"]
        key = f"{facts['modelId']} {facts['layer']} {context['feature_id']} {context['source']} {context['rank']}"
        bound = TOP if quantile is None else max(values)
        yield (
            ACTIVATION
            | facts
            | {
                "id": "c" + sha256(key.encode()).hexdigest()[:24],
                "index": str(context["feature_id"]),
                "tokens": context["tokens"],
                "values": values,
                "maxValue": max(values),
                "maxValueTokenIndex": values.index(max(values)),
                "minValue": min(values),
                "binMin": bound,
                "binMax": max(values),
                "binContains": TOP if quantile is None else quantile,
                "dataSource": context["source"],
                "dataIndex": context["text"],
            }
        )


def write(folder: Path, described: Path, crosscoder: Path, part: str, model: str, names: Names) -> Path:
    """Write the layout for the model that the crosscoder calls ``model``, whose values are those of ``part`` in the artifact
    ``described``, into ``folder``; returns the folder of the source. Raises ContractError where no features were found."""
    found = read_json(described / "features.json")
    if found["status"] != "found":
        raise ContractError(described, "status", "features to write", found["status"], "nothing was found in this study")
    config, reader = read_json(crosscoder / "config.json"), Reader(Crosscoder.load(crosscoder), model)
    block = config["layer"] - 1
    source = f"{block}-{names.set}"
    made = {"creatorId": names.creator_id, "createdAt": datetime.now(UTC).isoformat(timespec="milliseconds")}
    facts = made | {"modelId": names.model, "layer": source}
    vectors = {feature["feature_id"]: reader.directions_FD[feature["feature_id"]].tolist() for feature in found["features"]}
    out = folder / names.model / source
    public = made | {"visibility": "PUBLIC"}
    title = {"description": names.title, "creatorName": names.creator}
    tables: dict[str, Row] = {
        "release": public
        | title
        | {"name": names.set, "descriptionShort": names.title, "urls": [], "defaultUmapSourceIds": []},
        "model": public
        | {"layers": config["layer"], "neuronsPerLayer": 0, "inferenceEnabled": False}
        | {"id": names.model, "displayName": names.model, "displayNameShort": names.model, "instruct": False}
        | {"dimension": config["d_model"], "updatedAt": made["createdAt"], "owner": names.creator},
        "sourceset": public
        | title
        | SET
        | {"type": "", "defaultRange": 1, "defaultShowBreaks": True, "hasDashboards": True}
        | {"modelId": names.model, "name": names.set, "releaseName": names.set, "urls": []},
        "source": public
        | SOURCE
        | {"inferenceHosts": []}
        | {"id": source, "modelId": names.model, "setName": names.set, "hasDashboards": True}
        | {"num_prompts": found["corpus_texts"], "notes": f"{found['corpus_tokens']} tokens; readout {found['readout']}"},
    }
    for name in ("features", "activations"):
        (out / name).mkdir(parents=True)
    for name, row in tables.items():
        (out / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    hook = {"hookName": f"blocks.{block}.hook_resid_post", "sourceSetName": names.set}
    _lines(out / "features" / "batch-0.jsonl.gz", feature_rows(found, part, vectors, facts | hook))
    _lines(out / "activations" / "batch-0.jsonl.gz", activation_rows(CONTEXTS.read(described), part, facts))
    return out


def _lines(path: Path, rows: Iterator[Row]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(words: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="featdiff.description.neuronpedia", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write; must not exist, or be empty")
    parser.add_argument("--model", required=True, help="the model's id at Neuronpedia, a folder name")
    parser.add_argument("--part", choices=["tuned", "original"], default="tuned", help="whose values (default: tuned)")
    parser.add_argument("--set", default="featdiff", help="name of the set of features there (default: featdiff)")
    parser.add_argument("--creator", default="", help="who made it, for display")
    parser.add_argument("--creator-id", default=CREATOR, help="account there (default: that of their own importer)")
    given = parser.parse_args(words)
    try:
        for name in ("model", "set"):
            if not getattr(given, name).replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ContractError("command", f"--{name}", "letters, digits, -, _ and .", getattr(given, name), "name another")
        study = load_study()
        verify(DESCRIBED)
        fit = Path("crosscoders") / read_json(DESCRIBED / "features.json")["fit"]
        verify(fit)
        names = Names(given.model, given.set, study.report.title, given.creator, given.creator_id)
        with exported(given.folder) as folder:
            out = write(folder, DESCRIBED, fit, given.part, getattr(study.roles, given.part), names).relative_to(folder)
    except (ConfigError, ContractError) as error:
        say(str(error))
        return EXIT_BAD_INPUT
    print(f"{given.folder / out}: for Neuronpedia's bulk import")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
