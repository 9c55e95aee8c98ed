"""What `integrations.vllm` takes for granted of vLLM, read off its sources, version by version.

The engines of these tests are vLLM 0.32 on CPU. Of another version, and of what only an
accelerator takes, the sources say whether names are there, whether overridden methods are called
as ours are written, whether what a base class demands is there, and whether settings that are read
exist.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = sorted((ROOT / "healpass/integrations/vllm").glob("*.py"))
#: Unpacked by `make test-vllm`.
VERSIONS = ["0.32.0", "0.33.0"]
#: A setting of an engine -> the class that declares it.
SETTINGS = {
    "model_config": "ModelConfig", "cache_config": "CacheConfig", "lora_config": "LoRAConfig",
    "compilation_config": "CompilationConfig", "parallel_config": "ParallelConfig",
    "attention_config": "AttentionConfig", "speculative_config": "SpeculativeConfig",
}  # fmt: skip


class Sources:
    """The modules of one version.

    Attributes:
        root: The folder above `vllm`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @cache  # noqa: B019  one object per version, as long as the tests
    def module(self, name: str) -> ast.Module:
        """Its text as a tree."""
        path = self.root.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return ast.parse(path.read_text(encoding="utf-8"))

    def names(self, module: str) -> set[str]:
        """What a module defines or imports, at its top or under a condition there."""
        found: set[str] = set()
        for node in ast.walk(self.module(module)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                found |= self.names(f"{module}.{node.module}" if node.level else str(node.module))
            elif isinstance(node, ast.ImportFrom | ast.Import):
                found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)  # the names of modules that are loaded late
        return found

    def classes(self, module: str, name: str) -> list[ast.ClassDef]:
        """A class and those it inherits from, within vLLM."""
        tree = self.module(module)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                return [node, *(up for base in bases for up in self.classes(module, base))]
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                inside = node.module.split(".")[0] == "vllm"
                if inside and name in {alias.asname or alias.name for alias in node.names}:
                    return self.classes(node.module, name)
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                is_package = self.root.joinpath(*module.split(".")).is_dir()
                beside = module if is_package else module.rpartition(".")[0]
                if name in {alias.asname or alias.name for alias in node.names}:
                    return self.classes(f"{beside}.{node.module}", name)
        return []

    def methods(self, module: str, name: str) -> dict[str, ast.FunctionDef]:
        """Those of a class, its own before those it inherits."""
        found: dict[str, ast.FunctionDef] = {}
        for owner in self.classes(module, name):
            for node in owner.body:
                if isinstance(node, ast.FunctionDef):
                    found.setdefault(node.name, node)
        return found


@pytest.fixture(scope="module", params=VERSIONS)
def vllm(request) -> Sources:
    root = ROOT / f"build/vllm-{request.param}"
    assert root.is_dir(), f"{root} is not there: make test-vllm unpacks it"
    return Sources(root)


def imports(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Name here -> module of vLLM and name there."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }


def overridden() -> list[tuple[str, str, tuple[str, str], ast.FunctionDef]]:
    """File, class, the class of vLLM below it and the method, for each method of ours."""
    found = []
    for path in OURS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = imports(tree)
        for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            bases = [base.id for base in owner.bases if isinstance(base, ast.Name)]
            for base in (base for base in bases if base in names):
                for node in owner.body:
                    if isinstance(node, ast.FunctionDef):
                        found.append((path.name, owner.name, names[base], node))
    return found


def parameters(function: ast.FunctionDef) -> tuple[list[str], bool, bool]:
    """Names of parameters beside the object, and whether any others are taken."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    bound = "staticmethod" not in {ast.unparse(node) for node in function.decorator_list}
    return names[bound:], given.vararg is not None, given.kwarg is not None


def test_every_name_is_there(vllm):
    missing = []
    for path in OURS:
        for name, (module, there) in imports(ast.parse(path.read_text(encoding="utf-8"))).items():
            is_module = (vllm.root.joinpath(*module.split("."), f"{there}.py")).exists()
            if not is_module and there not in vllm.names(module):
                missing.append(f"{path.name}: {name} of {module}")
    assert not missing


def test_overridden_methods_take_what_theirs_take(vllm):
    checked, wrong = 0, []
    for file, owner, (module, base), ours in overridden():
        theirs = vllm.methods(module, base).get(ours.name)
        if theirs is None or ours.name == "__init__":
            continue
        checked += 1
        (mine, places, keywords), (wanted, _, _) = parameters(ours), parameters(theirs)
        same = wanted[: len(mine)] == mine[: len(wanted)]
        enough = len(mine) >= len(wanted) or places or keywords
        if not same or not enough:
            wrong.append(f"{file}: {owner}.{ours.name}{mine} against {base}'s {wanted}")
    assert checked >= 15
    assert not wrong


def test_nothing_that_a_base_class_demands_is_missing(vllm):
    missing, checked = [], 0
    for path in OURS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = imports(tree)
        for owner in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            have = {node.name for node in owner.body if isinstance(node, ast.FunctionDef)}
            for base in (base.id for base in owner.bases if isinstance(base, ast.Name)):
                if base not in names:
                    continue
                for name, method in vllm.methods(*names[base]).items():
                    decorators = {ast.unparse(node) for node in method.decorator_list}
                    if "abstractmethod" in decorators or "abc.abstractmethod" in decorators:
                        checked += 1
                        missing += [] if name in have else [f"{path.name}: {owner.name}.{name}"]
    assert checked >= 10
    assert not missing


def test_every_setting_that_is_read_exists(vllm):
    read = set()
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
                read.add((node.value.attr, node.attr))
    asked = {(config, field) for config, field in read if config in SETTINGS}
    assert len(asked) >= 6
    for config, field in sorted(asked):
        (declared,) = vllm.classes("vllm.config", SETTINGS[config])[:1]
        fields = {
            node.target.id
            for node in ast.walk(declared)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        fields |= {node.name for node in declared.body if isinstance(node, ast.FunctionDef)}
        assert field in fields, (config, field)


def test_a_name_that_is_gone_shows(vllm, monkeypatch):
    """The inverse: another vLLM would be noticed."""
    names = Sources.names
    monkeypatch.setattr(Sources, "names", lambda self, module: names(self, module) - {"RMSNorm"})
    with pytest.raises(AssertionError, match="RMSNorm"):
        test_every_name_is_there(vllm)


def test_a_parameter_more_shows(vllm, monkeypatch):
    methods = Sources.methods

    def changed(self: Sources, module: str, name: str):
        found = methods(self, module, name)
        if name == "AttentionMetadataBuilder":
            new = ast.parse("def build(self, common_prefix_len, more, metadata): pass").body[0]
            found = {**found, "build": new}
        return found

    monkeypatch.setattr(Sources, "methods", changed)
    with pytest.raises(AssertionError, match="build"):
        test_overridden_methods_take_what_theirs_take(vllm)
