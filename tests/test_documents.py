"""Documents against the code: every function, param, file, column and link that they name exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from featdiff.artifacts import tables
from featdiff.artifacts.tables import Table, in_words
from featdiff.config.params import Study
from featdiff.config.reading import flatten

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/featdiff"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CITED = re.compile(r"`([a-z0-9_/]+\.py): ([A-Za-z0-9_.]+)`")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(pages: list[Path], pattern: re.Pattern[str]) -> list[tuple[str, ...]]:
    """What ``pattern`` finds in ``pages``, after the page's name."""
    return sorted({(page.name, *match.groups()) for page in pages for match in pattern.finditer(text(page))})


@cache
def definitions(module: str) -> set[str]:
    """Functions, classes, constants and methods (``Class.method``) of a module of the package."""
    found: set[str] = set()
    for node in ast.parse(text(PACKAGE / module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@cache
def names_written(path: Path) -> frozenset[str]:
    """Names that a module can give to a key: its strings, fields and keywords."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text(path))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.keyword) and node.arg:
            names.add(node.arg)
    return frozenset(names)


@pytest.mark.parametrize(("page", "module", "name"), named(PAGES, CITED))
def test_cited_code_exists(page: str, module: str, name: str) -> None:
    assert (PACKAGE / module).is_file(), page
    assert name in definitions(module), page


@pytest.mark.parametrize(
    ("page", "path"), named(PAGES, re.compile(r"`((?:src|stages|tests|docs|conf|metrics)/[\w./-]+\.\w+)`"))
)
def test_named_files_exist(page: str, path: str) -> None:
    assert (ROOT / path).is_file(), page


def params() -> set[str]:
    """Every key of params.yaml, sections of sections too."""
    keys = flatten(yaml.safe_load(text(ROOT / "params.yaml")))
    return {".".join(key.split(".")[:depth]) for key in keys for depth in range(1, 1 + key.count(".") + 1)}


SECTIONS = "|".join(Study.model_fields)


def test_named_params_exist() -> None:
    pages = [ROOT / "docs" / f"{name}.md" for name in ("method", "glossary", "artifacts", "log")]
    found = named(pages, re.compile(rf"`((?:{SECTIONS})\.(?!py\b|safetensors\b|parquet\b|json)[a-z0-9_.]+)`"))
    known = params()
    assert len(found) > 50
    assert [(page, key) for page, key in found if key not in known] == []


def anchors(page: Path) -> set[str]:
    """Anchors that headings get on the web."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text(page))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text(page), flags=re.DOTALL)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


SECTION = re.compile(r"^### (`.*)$")
ROW = re.compile(r"^\| (`[^|]*`) \|([^|]*)\|")
TABLES = {table.name: table for table in vars(tables).values() if isinstance(table, Table)}


class Described(NamedTuple):
    """What docs/artifacts.md says of a file."""

    rows: list[tuple[list[str], str]]
    """Columns or keys, and what stands under ``type``."""
    modules: list[Path]
    """Those that write it."""


def described() -> dict[str, Described]:
    found: dict[str, Described] = {}
    file: Described | None = None
    for line in text(ROOT / "docs/artifacts.md").splitlines():
        if heading := SECTION.match(line):
            file = Described([], [])
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", heading[1]), file)
        elif line.startswith("#"):
            file = None
        elif file is not None:
            file.modules.extend(PACKAGE / module for module, _ in CITED.findall(line))
            file.modules.extend(ROOT / stage for stage in re.findall(r"`(stages/\w+\.py)`", line))
            if row := ROW.match(line):
                file.rows.append((re.findall(r"`(\w+)`", row[1]), row[2].strip()))
    return found


def imported(path: Path) -> set[Path]:
    """Modules of the package that ``path`` imports: their rows it may pass on."""
    names = {node.module for node in ast.walk(ast.parse(text(path))) if isinstance(node, ast.ImportFrom) and node.module}
    modules = {ROOT / "src" / Path(*name.split(".")).with_suffix(".py") for name in names}
    return {module for module in modules if module.is_file()}


@pytest.mark.parametrize("file", [file for file in described() if file not in TABLES])
def test_keys_are_written_by_the_code(file: str) -> None:
    rows, modules = described()[file]
    assert rows
    known = frozenset[str]().union(*map(names_written, set(modules).union(*map(imported, modules))))
    assert {key for keys, _ in rows for key in keys} <= known


@pytest.mark.parametrize("file", TABLES)
def test_columns_are_described_as_their_schema_has_them(file: str) -> None:
    found = []
    for columns, said in described()[file].rows:
        null, types = said.endswith(", null"), said.removesuffix(", null").split(", ")
        for column, of in zip(columns, types * (len(columns) if len(types) == 1 else 1), strict=True):
            found.append((column, f"{of}, null" if null else of))
    assert sorted(found) == sorted((field.name, in_words(field)) for field in TABLES[file].schema)


def test_only_tables_with_a_schema_are_described() -> None:
    assert {file for file in described() if file.endswith(".parquet")} == TABLES.keys()


def test_every_output_of_the_graph_is_described() -> None:
    stages = yaml.safe_load(text(ROOT / "dvc.yaml"))["stages"]
    outs = [
        out if isinstance(out, str) else next(iter(out)) for entry in stages.values() for out in entry.get("do", entry)["outs"]
    ]
    page = text(ROOT / "docs/artifacts.md")
    assert [out for out in outs if out not in page and not any(f"{parent}/<" in page for parent in Path(out).parents)] == []
