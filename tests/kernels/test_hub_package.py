"""The kernels-hub package: its layout, what it may import, and that its tree runs with torch and triton alone."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HUB = ROOT / "hub"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("assemble", HUB / "assemble.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.assemble(tmp_path_factory.mktemp("hub") / "tree", local=True)


def test_the_manifest_says_what_the_builder_asks_for():
    manifest = tomllib.loads((HUB / "build.toml").read_text(encoding="utf-8"))
    general = manifest["general"]
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", general["name"])
    assert isinstance(general["version"], int)
    assert general["license"] == "Apache-2.0"
    assert set(general["backends"]) <= {"cuda", "rocm", "xpu"}
    assert general["hub"]["repo-id"].count("/") == 1
    assert "torch-noarch" in manifest
    assert "torch" not in manifest
    assert "kernel" not in manifest  # nothing to compile
    assert (HUB / "torch-ext" / general["name"].replace("-", "_") / "__init__.py").is_file()
    assert "genKernelFlakeOutputs" in (HUB / "flake.nix").read_text(encoding="utf-8")
    assert (HUB / "CARD.md").read_text(encoding="utf-8").startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    for path in ("tests/test_head.py", "benchmarks/benchmark.py"):
        assert (HUB / path).is_file()


def test_kernels_are_copied_not_kept_twice(package):
    own = {path.name for path in (HUB / "torch-ext" / package.name).glob("*.py")}
    assert own == {"__init__.py", "layers.py"}
    for path in package.glob("*.py"):
        if path.name not in {*own, "_ops.py"}:
            assert path.read_bytes() == (ROOT / "kernels" / path.name).read_bytes()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_imports_are_relative_or_of_the_standard_library_torch_and_triton(package):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                names = [node.module] if node.module else [alias.name for alias in node.names]
                if node.module or path.name != "layers.py":  # layers takes ``score`` from its package
                    assert all((package / f"{name}.py").is_file() for name in names), (path.name, names)
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).split(".")[0] in allowed, path.name
            elif isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path.name


def test_operators_live_in_the_builders_namespace(package):
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    registrations = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("custom_op")
    ]
    assert registrations
    for call in registrations:
        assert ast.unparse(call.args[0]).startswith("add_op_namespace_prefix(")


def test_layers_are_stateless_modules(package):
    tree = ast.parse((package / "layers.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert classes
    for layer in classes:
        assert [ast.unparse(base) for base in layer.bases] == ["nn.Module"]
        assert {node.name for node in layer.body if isinstance(node, ast.FunctionDef)} == {"forward"}
        assert any(ast.unparse(node) == "has_backward = False" for node in layer.body)


def test_the_tree_runs_with_torch_and_triton_alone(package):
    pytest.importorskip("triton")
    blocked = "rmcore safetensors transformers httpx pydantic typer rich"
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked.split()!r}:
            raise ImportError(name + " is not part of torch or triton")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {str(package.parent)!r})
import rmcore_head, torch
head = rmcore_head.layers.ScoreHead()
head.projection, head.phase, head.beta = torch.randn(130, 64) / 8, torch.rand(130), torch.randn(130)
factor = torch.randn(130, 130).tril()
head.tiles, head.factor_scale = rmcore_head.pack_factor(factor, torch.float32)
head.beta0, head.amplitude = 0.5, 0.4
x = torch.randn(3, 64)
got = head(x)
c = torch.cos(2 * torch.pi * (x @ head.projection.mT + head.phase))
g, v = c @ head.beta + 0.5, (c @ factor.mT).square().sum(-1)
u = (1 + 0.4 * v).sqrt()
torch.testing.assert_close(got, torch.stack([g, v, u, g / u]), rtol=1e-3, atol=1e-3)
weight = torch.randn(20, 30)
sigma, _ = rmcore_head.power_iteration(weight, torch.ones(30), 100)
torch.testing.assert_close(sigma, torch.linalg.matrix_norm(weight, 2), rtol=1e-2, atol=0)
torch.library.opcheck(torch.ops._rmcore_head_local.power_iteration.default, (weight, torch.ones(30), 1))
assert not [name for name in sys.modules if name.split(".")[0] == "rmcore"]
print("ran")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=package.parent, timeout=240,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "ran"
