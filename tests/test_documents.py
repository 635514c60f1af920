"""Documents against the code: every function, param, file, column and link that they name exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

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
def names_written(path: Path) -> tuple[frozenset[str], tuple[re.Pattern[str], ...]]:
    """Names that a module can give to a column: its short strings, fields and keywords, and patterns of its f-strings."""
    names: set[str] = set()
    patterns = []
    for node in ast.walk(ast.parse(text(path))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.keyword) and node.arg:
            names.add(node.arg)
        elif isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else None for part in node.values]
            if sum(len(part) for part in parts if part) > 2:
                patterns.append(re.compile("".join("[a-z_]+" if part is None else re.escape(part) for part in parts)))
    return frozenset(names), tuple(patterns)


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
ROW = re.compile(r"^\| (`[^|]*`) \|")


def tables() -> dict[str, tuple[list[str], list[Path]]]:
    """By file of docs/artifacts.md: its columns or keys, and the modules that write it."""
    found: dict[str, tuple[list[str], list[Path]]] = {}
    columns: list[str] | None = None
    for line in text(ROOT / "docs/artifacts.md").splitlines():
        if heading := SECTION.match(line):
            columns, modules = [], []
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", heading[1]), (columns, modules))
        elif line.startswith("#"):
            columns = None
        elif columns is not None:
            modules += [PACKAGE / module for module, _ in CITED.findall(line)] + [
                ROOT / stage for stage in re.findall(r"`(stages/\w+\.py)`", line)
            ]
            columns += re.findall(r"`(\w+)`", row[1]) if (row := ROW.match(line)) else []
    return found


def imported(path: Path) -> set[Path]:
    """Modules of the package that ``path`` imports: their rows it may pass on."""
    names = {node.module for node in ast.walk(ast.parse(text(path))) if isinstance(node, ast.ImportFrom) and node.module}
    modules = {ROOT / "src" / Path(*name.split(".")).with_suffix(".py") for name in names}
    return {module for module in modules if module.is_file()}


@pytest.mark.parametrize("file", tables())
def test_columns_are_written_by_the_code(file: str) -> None:
    columns, modules = tables()[file]
    assert columns
    known = [names_written(writer) for writer in set(modules).union(*map(imported, modules))]
    for column in columns:
        assert any(column in names or any(each.fullmatch(column) for each in patterns) for names, patterns in known), column


def test_columns_that_the_report_reads_are_documented() -> None:
    source = text(PACKAGE / "report/evidence.py")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    reads = []
    for call in calls:
        if isinstance(call.func, ast.Name) and call.func.id in ("_rows", "_joined"):
            path, columns = call.args[:2] if call.func.id == "_rows" else call.args[1:3]
            reads.append((path.right if isinstance(path, ast.BinOp) else path, columns))
    effects = re.findall(r"effects = \((.*?)\)", source, re.DOTALL)[0]
    documented: dict[str, set[str]] = {}
    for file, (described, _) in tables().items():
        documented.setdefault(file.rpartition("/")[2], set()).update(described)
    seen = 0
    for path, columns in reads:
        if isinstance(path, ast.Constant):
            file = str(path.value)
            wanted = str(columns.value) if isinstance(columns, ast.Constant) else effects if "effects" in file else ""
            assert set(re.findall(r"\w+", wanted)) <= documented[file], file
            seen += bool(wanted)
    assert seen > 10


def test_every_output_of_the_graph_is_described() -> None:
    stages = yaml.safe_load(text(ROOT / "dvc.yaml"))["stages"]
    outs = [
        out if isinstance(out, str) else next(iter(out)) for entry in stages.values() for out in entry.get("do", entry)["outs"]
    ]
    page = text(ROOT / "docs/artifacts.md")
    assert [out for out in outs if out not in page and not any(f"{parent}/<" in page for parent in Path(out).parents)] == []
