"""The arrows of the design, read from the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports(file: Path) -> set[str]:
    """Modules a file imports at run time (what stands under `if TYPE_CHECKING` does not count)."""
    found = set()
    todo = list(ast.parse(file.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"indiclip.{a.name}" for a in node.names} if node.module == "indiclip" else {node.module}
        todo += list(ast.iter_child_nodes(node))
    return found


def of(file: Path, package: str) -> set[str]:
    return {name for name in imports(file) if name == package or name.startswith(f"{package}.")}


def test_indiclip_never_imports_heads():
    assert {file.name: of(file, "heads") for file in (ROOT / "indiclip").rglob("*.py") if of(file, "heads")} == {}


@pytest.mark.parametrize("head", sorted((ROOT / "heads").glob("*.py")), ids=lambda path: path.stem)
def test_heads_import_the_contract_only_and_never_each_other(head):
    assert of(head, "heads") == set()
    assert of(head, "indiclip") <= {"indiclip.head", "indiclip.types", "indiclip.losses"}


@pytest.mark.parametrize(
    ("file", "allowed"),
    [
        ("types.py", set()),
        ("names.py", set()),
        ("patches.py", {"types", "data.images"}),
        ("backbone.py", {"types", "names"}),
        ("text.py", {"names"}),
        ("losses.py", {"types"}),
        ("head.py", {"types"}),
        ("optim.py", set()),
        ("encoder.py", {"types", "backbone", "text", "patches"}),
        ("checkpoint.py", {"backbone", "encoder", "names", "text"}),
        ("module.py", {"encoder", "head", "types", "optim"}),
        ("run_folder.py", {"names", "survival", "survival.manifest"}),
        ("survival/manifest.py", set()),
    ],
)
def test_arrows_point_one_way(file, allowed):
    assert of(ROOT / "indiclip" / file, "indiclip") <= {f"indiclip.{name}" for name in allowed}


def test_commands_know_data_and_no_model():
    ours = {"indiclip.names", "indiclip.patches"}
    also = {"tokenizer_report.py": {"indiclip.text"}}  # tokenizers lie beside the text towers
    for name in ("bench.py", "bench_run.py", "bench_compare.py"):  # the words of what `evals` does
        also[name] = {"indiclip.__version__", *of(ROOT / "indiclip" / "commands" / name, "indiclip.evals")}
    also["bench_run.py"].add("indiclip.run_folder")  # whose lock keeps two runs out of one folder
    for file in (ROOT / "indiclip" / "commands").glob("*.py"):
        allowed = ours | also.get(file.name, set()) | of(file, "indiclip.data") | of(file, "indiclip.commands")
        assert of(file, "indiclip") <= allowed, file.name


def test_data_knows_no_model():
    outside = {"indiclip.types", "indiclip.names", "indiclip.patches"}
    for file in (ROOT / "indiclip" / "data").glob("*.py"):
        assert of(file, "indiclip") <= outside | of(file, "indiclip.data"), file.name


def test_evals_know_the_encoder_and_data():
    ours = ("encoder", "types", "patches", "names", "checkpoint", "text", "backbone", "__version__", "json_lines")
    allowed = {f"indiclip.{name}" for name in ours}
    for file in (ROOT / "indiclip" / "evals").rglob("*.py"):
        if file.name not in ("callback.py", "monitors.py"):  # which a run has
            found = of(file, "indiclip") | of(file, "lightning") | of(file, "heads")
            assert found <= allowed | of(file, "indiclip.data") | of(file, "indiclip.evals"), file


@pytest.mark.parametrize(
    ("package", "others"),
    [
        ("cards", set()),
        ("images", {"cards"}),
        ("models", set()),
        ("protocols", set()),
        ("pages", {"results", "comparison", "images", "protocols"}),
    ],
)
def test_parts_of_the_benchmark_are_joined_above_them(package, others):
    """`bench`, `sheet` and `score` know them all; none of them knows these."""
    for file in (ROOT / "indiclip" / "evals" / package).glob("*.py"):
        parts = {name.removeprefix("indiclip.evals.").split(".")[0] for name in of(file, "indiclip.evals")}
        assert parts <= {package, *others}, file.name


def test_protocols_are_functions_of_numbers():
    for file in (ROOT / "indiclip" / "evals" / "protocols").glob("*.py"):
        assert of(file, "indiclip") <= {"indiclip.data.tables"} | of(file, "indiclip.evals.protocols"), file.name


def test_survival_knows_of_data_the_workers_only():
    allowed = {f"indiclip.{name}" for name in ("module", "json_lines", "types", "names", "data.workers")}
    for file in (ROOT / "indiclip" / "survival").glob("*.py"):
        assert of(file, "indiclip") <= allowed | of(file, "indiclip.survival"), file.name
