"""Failures these tests catch: an import against the direction that docs/architecture.md draws, triton or
transformers imported where a user without it would fail, a stream or a tensor in the pure schedule.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up; a room may import from its own line and from lines above it.
FLOORS = [
    {"grass_kernels"},
    {"grass.errors", "grass.choices"},
    {"grass.hub"},
    {"grass.sampling", "grass.offload"},
    {"grass.config"},
    {"grass.schedule", "grass.importance", "grass.layer_stacks"},
    {"grass.layer_discovery"},
    {"grass.layer_scheduler", "grass.layers"},
    {"grass.optim", "grass.activation_checkpointing"},
    {"grass.integrations"},
    {"grass.finetune"},
    {"grass.reproduce"},
    {"grass.plan"},
    {"grass.cli"},
    {"grass.__main__"},
]
TORCH_ONLY = (
    "grass_kernels",
    "grass.offload",
    "grass.optim",
    "grass.layers",
    "grass.layer_stacks",
    "grass.layer_discovery",
    "grass.layer_scheduler",
)


def modules() -> dict[str, Path]:
    found = {}
    for package in ("grass", "grass_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Absolute names of the modules a file imports when it runs; `from a import b` counts as both a and a.b."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level_only else [node for node in ast.walk(tree) if id(node) not in for_types]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def floor_of(name: str) -> int | None:
    for height, rooms in enumerate(FLOORS):
        if any(name == room or name.startswith(room + ".") for room in rooms):
            return height
    return None


@pytest.mark.parametrize("name", sorted(set(modules()) - {"grass"}))
def test_imports_run_downward_only(name):
    height = floor_of(name)
    assert height is not None, f"{name} stands on no floor: add it here and to docs/architecture.md"
    for imported in imports(modules()[name]):
        target = floor_of(imported)
        assert target is None or target <= height, f"{name} imports {imported}, which lies above it"


def test_rooms_of_one_floor_do_not_know_each_other():
    for name in ("schedule", "sampling", "importance"):
        others = {"schedule", "sampling", "importance"} - {name}
        found = imports(modules()[f"grass.{name}"])
        assert not any(f"grass.{other}" in found for other in others)


def test_only_the_gateway_imports_triton():
    users = {
        name for name, path in modules().items() if any(i.split(".")[0] == "triton" for i in imports(path))
    }
    assert users == {"grass_kernels._triton"}


def test_the_schedule_knows_no_tensors():
    assert imports(modules()["grass.schedule"]) <= {
        "dataclasses",
        "dataclasses.dataclass",
        "typing",
        "typing.NamedTuple",
    }


@pytest.mark.parametrize("name", [n for n in sorted(modules()) if n.startswith(TORCH_ONLY)])
def test_core_does_not_need_transformers(name):
    assert not {
        i for i in imports(modules()[name]) if i.split(".")[0] in ("transformers", "peft", "accelerate")
    }


@pytest.mark.parametrize("blocked", ["transformers", "triton", "matplotlib"])
@pytest.mark.slow
def test_library_imports_without_optional_packages(blocked):
    script = f"import sys; sys.modules['{blocked}'] = None; import grass, grass_kernels, grass.cli"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.slow
def test_plans_benchmarks_and_trainers_do_not_need_the_packages_of_finetune():
    """A machine with a GPU has torch, triton and transformers."""
    script = """if True:
        import sys
        sys.modules |= dict.fromkeys(("trl", "datasets", "peft", "lightning"))
        import grass.cli, grass.integrations.transformers, grass.plan.prediction, grass.plan.losses
        import bench.gpu.training, bench.gpu.stages, grass.finetune.loss
        """
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_trainer_factory_is_there_after_importing_grass():
    script = (
        "import grass; grass.integrations.transformers.trainer_optimizer(lr=1e-5, config=grass.GrassConfig())"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_grass_imports_torch_when_it_is_used():
    script = """if True:
        import sys, grass
        assert 'torch' not in sys.modules
        assert set(grass.__all__) <= set(dir(grass))
        assert grass.optim.GrassAdamW is grass.GrassAdamW
        assert not hasattr(grass, 'none')
        from grass import *
        assert LayerMap is grass.layers.LayerMap
        """
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_picture_names_every_room():
    picture = (ROOT / "docs" / "architecture.md").read_text()
    missing = [
        path.name
        for name, path in modules().items()
        if path.name not in ("__init__.py", "__main__.py") and path.name not in picture
    ]
    assert missing == []
