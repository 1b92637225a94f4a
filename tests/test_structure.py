"""The arrows of the design, read from the imports."""

import ast
from graphlib import TopologicalSorter
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
    ranks = "indiclip.evals.protocols.cosines"  # a function of numbers, so that training and benchmark rank alike
    parts = {f"indiclip.{name}" for name in ("losses", "chunked_cross_entropy", "teacher", "moving_average", "ratios")}
    parts |= {"indiclip.distributed", "indiclip.names"}
    parts |= {"indiclip.export.torchvision_backbone"}  # which imports nothing of ours
    assert of(head, "indiclip") - of(head, "indiclip.tasks") <= {"indiclip.head", "indiclip.types", *parts, ranks}


# Room or file -> the rooms and files that it may import, beside itself. Arrows point one way, so there is no circle.
ARROWS = {
    "__main__.py": "cli",
    "types.py": "",
    "names.py": "",
    "steps.py": "",
    "moving_average.py": "pooling",
    "strict_yaml.py": "",
    "masking.py": "",
    "json_lines.py": "masking",
    "old_names.py": "",
    "config_files.py": "names old_names",
    "optim.py": "names steps parameter_groups",
    "parameter_groups.py": "names",
    "freezing.py": "names",
    "lora.py": "names",
    "images.py": "",
    "quiet.py": "",
    "patches.py": "types",
    "preprocessing.py": "types names images patches",
    "timm_errors.py": "names",
    "flex.py": "types",
    "grouped_attention.py": "types",
    "packing.py": "types flex grouped_attention",
    "text_packing.py": "packing",
    "position_table.py": "types",
    "backbone.py": "types names preprocessing timm_errors packing position_table naflex_models",
    "naflex_models.py": "names timm_errors",
    "canvas_backbone.py": "types names backbone",
    "timm_backbone.py": "types names preprocessing timm_errors backbone canvas_backbone",
    "tokenizers.py": "names text_cleaning tokenizer_sources",
    "tokenizer_sources.py": "names",
    "text.py": "names quiet tokenizers packing text_packing",
    "text_cleaning.py": "names",
    "transformers_backbone.py": "types names preprocessing canvas_backbone text",
    "pooling.py": "names distributed",
    "distributed.py": "",
    "sharding.py": "types packing",
    "float8.py": "names sharding",
    "ratios.py": "distributed",
    "autograd.py": "",
    "micro_batches.py": "types head pooling ratios autograd",
    "losses.py": "logit_chunks softmax_sums autograd",
    "softmax_sums.py": "distributed logit_chunks",
    "logit_chunks.py": "distributed",
    "teacher.py": "types moving_average",
    "head.py": "types names distributed ratios steps presentation",
    "presentation.py": "types",
    "tasks": (  # what heads of one task are made of
        "types names distributed autograd ratios backbone text pretrained encoder checkpoint head presentation losses"
        " logit_chunks chunked_cross_entropy moving_average teacher"
    ),
    "chunked_cross_entropy.py": "types autograd",
    "pretrained": (
        "names quiet lora old_names backbone timm_errors timm_backbone transformers_backbone tokenizers text pooling"
        " preprocessing tokenizer_sources datasets.tables"
    ),
    "encoder.py": "lora types names backbone text preprocessing pooling pretrained",
    "checkpoint.py": "encoder pretrained",
    "lightning_internals.py": "",
    "task_weights.py": "names types distributed autograd sharding",
    "module.py": "encoder head types names optim freezing lightning_internals distributed sharding float8 task_weights"
    " micro_batches ratios head_schedule held_out_scores module_checks parameter_groups temperature",
    "held_out_scores.py": "head types distributed",
    "head_schedule.py": "head pooling steps task_weights",
    "temperature.py": "head losses",
    "module_checks.py": "encoder head task_weights",
    "datasets": "types names images",
    "webdataset": "types names masking images datasets",
    "generated": "types names images datasets",
    "planning": (
        "chunked_cross_entropy task_weights types names images head head_schedule losses parameter_groups loading"
        " ratios distributed"
    ),
    "loading": "types names quiet steps images patches preprocessing datasets lightning_internals",
    "evals": (
        "types names quiet strict_yaml masking images patches preprocessing json_lines text backbone encoder checkpoint"
        " pretrained tokenizer_sources datasets webdataset generated loading"
    ),
    "training": (
        "types names quiet strict_yaml old_names masking config_files json_lines patches checkpoint pretrained"
        " distributed sharding moving_average teacher float8 pooling lightning_internals backbone encoder head"
        " presentation module head_schedule optim task_weights losses datasets loading evals planning"
    ),
    "export": (
        "types names masking datasets.tables patches preprocessing backbone canvas_backbone timm_backbone tokenizers"
        " text pooling encoder checkpoint pretrained"
    ),
    "commands": (
        "types names quiet masking config_files distributed json_lines images preprocessing tokenizers text datasets"
        " webdataset loading evals training pretrained export planning"
    ),
}


def room(module: str) -> str:
    """`indiclip.loading.plan` -> `loading`, `indiclip.types` -> `types`."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("place", ARROWS)
def test_arrows_point_one_way(place):
    root = ROOT / "indiclip" / place
    files = [root] if root.suffix else sorted(root.rglob("*.py"))
    allowed = set(ARROWS[place].split()) | {place.removesuffix(".py")}
    for file in files:
        found = of(file, "indiclip") - {"indiclip", "indiclip.__version__"}
        wrong = {m for m in found if room(m) not in allowed and m.removeprefix("indiclip.") not in allowed}
        assert wrong == set(), file


def test_every_file_has_its_arrows_named():
    skipped = ("__init__.py", "__pycache__", "old_names.yaml")
    there = {entry.name for entry in (ROOT / "indiclip").iterdir() if entry.name not in skipped}
    assert there - {"cli.py"} == set(ARROWS)


@pytest.mark.parametrize("folder", ["indiclip/tasks", "tools"])
def test_no_import_between_the_files_of_a_folder_goes_round(folder):
    """Those for types alone, which stand under `if TYPE_CHECKING`, do not either."""
    package = "indiclip.tasks." if folder == "indiclip/tasks" else ""
    arrows: dict[str, set[str]] = {f"{package}{file.stem}": set() for file in (ROOT / folder).glob("*.py")}
    assert len(arrows) > 10
    for name, others in arrows.items():
        file = ROOT / folder / f"{name.removeprefix(package)}.py"
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                others |= {alias.name for alias in node.names} & arrows.keys()
            elif isinstance(node, ast.ImportFrom):
                others |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)} & arrows.keys()
    TopologicalSorter(arrows).prepare()  # raises CycleError


# Room or file of the benchmark -> what it may import of the benchmark beside itself, in the order of the arrows.
EVALS_ARROWS = {
    "suites": set(),
    "results": {"suites"},
    "result_files": {"results"},
    "protocols": {"results"},
    "cards": {"suites", "protocols"},
    "images": {"cards"},
    "models": set(),
    "samples": {"results", "images"},
    "formatting": {"results"},
    "comparison": {"results", "protocols", "formatting"},
    "reports": {"suites", "results", "comparison", "formatting", "images", "samples"},
}


@pytest.mark.parametrize("place", EVALS_ARROWS)
def test_parts_of_the_benchmark_are_joined_above_them(place):
    """`bench` and `card_scorer` know them; none of them knows these."""
    folder = ROOT / "indiclip" / "evals" / place
    for file in folder.glob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]:
        names = of(file, "indiclip.evals") - {"indiclip.evals"}
        parts = {name.removeprefix("indiclip.evals.").split(".")[0] for name in names}
        assert parts <= {place, *EVALS_ARROWS[place]}, file.name


def test_no_file_names_the_protocols_but_the_table_of_tasks():
    """They are found by their class paths: another one is one file."""
    room = ROOT / "indiclip" / "evals" / "protocols"
    # The contract, and functions that others use.
    known = {"protocol", "answers", "languages", "cosines", "metrics", "zero_shot", "retrieval"}
    for file in (ROOT / "indiclip").rglob("*.py"):
        named = {name.rpartition(".")[2] for name in of(file, "indiclip.evals.protocols")}
        beside = file.parent == room or file.stem == "overlap"
        assert beside or named <= known | {"protocols"}, file


def test_fault_tolerance_knows_of_data_the_workers_only():
    names = ("module", "pooling", "json_lines", "masking", "types", "names", "old_names", "distributed")
    names += ("lightning_internals",)
    allowed = {f"indiclip.{name}" for name in (*names, "pretrained.weights", "pretrained.sharded", "loading.workers")}
    here = "indiclip.training.fault_tolerance"
    for file in (ROOT / "indiclip" / "training" / "fault_tolerance").glob("*.py"):
        assert of(file, "indiclip") <= allowed | of(file, here), file.name


def test_transformers_is_nowhere_let_to_ask_whether_to_run_code():
    """Without the argument it asks, and runs what comes with a model where the answer is y."""
    for part in ("indiclip", "heads", "tools"):
        for file in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                if node.func.attr in ("from_pretrained", "from_config"):
                    options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                    assert options.get("trust_remote_code") == "False", f"{file}:{node.lineno}"
