"""The house rules that a reader relies on, checked on the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import healpass

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("healpass/**/*.py"), *ROOT.glob("lowering/**/*.py")])

#: What `healpass.__all__` offers: all that the study may use, as anybody else's code may.
PUBLIC = {
    *("Debug", "HealConfig", "HealError", "HealReport", "Status"),
    *("explain", "inductor_options", "status"),
}

#: layer -> what its modules may import of healpass. The way of one compile, from bottom to top.
BELOW = {
    "errors": set(),
    "strict_json": set(),
    "arithmetic": {"errors"},
    "tensorcore": {"errors", "arithmetic"},
    "ops": {"errors", "arithmetic", "tensorcore"},
    "config": {"errors"},
    "report_view": set(),
    "report": {"arithmetic", "report_view", "strict_json"},
    "cache_key": {"config"},
    "numerics_version": set(),
    "environment": {"errors", "config", "arithmetic", "numerics_version"},
    "fingerprint": {"errors", "config", "numerics_version"},
    "graph": {"errors", "arithmetic", "ops", "config", "report"},
    "lowering": {"errors", "arithmetic", "ops", "cache_key"},
    "uncompiled": {"errors", "config"},
    "watch": {"errors", "config", "uncompiled"},
    "status": {"config", "report_view", "uncompiled", "watch"},
    # Kernels that an engine without graphs has to ask for itself.
    "integrations": {"errors", "arithmetic", "ops", "config", "watch", "lowering"},
    # Beyond the public names: the simulated adders for its baselines, the digits of exact weights
    # (to keep them), HEAL for transformers, and the stamp of the environment. Nothing below
    # depends on it.
    "study": {
        *("errors", "strict_json", "environment", "integrations"),
        *("arithmetic", "ops", "tensorcore"),
    }
    | PUBLIC,
    # Beyond the public names: the formulas of errors, for its gate.
    "bench": {"errors", "environment", "integrations", "arithmetic", "ops"} | PUBLIC,
    "backend": {"errors", "config", "cache_key", "graph", "lowering", "report", "watch"},
    "registered": {"backend", "watch"},
    "api": {"errors", "config", "cache_key", "graph", "lowering", "report", "backend", "watch"},
}
#: folder -> wing -> the wings beside it that it may import. What lies in the folder itself, beside
#: its wings, is the wing "". Where a wing stands alone its modules import each other only.
WINGS = {
    "healpass/ops": {
        "": set(),
        "reproducible": {""},
        "products": {"", "reproducible"},
        "attention": {"", "reproducible", "products"},
    },
    "healpass/graph": {"": set(), "passes": {""}},
    "healpass/study": {
        "": {"plan", "run", "judge", "report"},
        "plan": set(),
        "run": {"plan"},
        "judge": {"plan", "run"},
        "report": {"plan", "run", "judge"},
    },
    "lowering": {"": set(), "cpu": {""}, "cuda": {""}},
}
#: Modules that bring their folder's wings together: the registry of each, and of the passes.
GATHERS = {"healpass/ops/__init__.py", "lowering/__init__.py", "healpass/graph/pipeline.py"}
#: Those on top may import anything.
TOP = {"__init__", "cli"}
#: What takes seconds to import, so that `import healpass` must not.
HEAVY = ("transformers", "torch._inductor", "triton", "torch._dynamo")


def layer(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "lowering" if parts[0] == "lowering" else parts[1]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(module: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def breaks_of_the_arrows(name: str, module: ast.AST) -> set[str]:
    """What a module of layer `name` imports of healpass and should not."""
    if name in TOP:
        return set()
    inside = {i.split(".")[1] for i in imports(module) if i.startswith("healpass.")}
    return inside - BELOW[name] - {name}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path):
    assert layer(path) in BELOW | dict.fromkeys(TOP), "a new layer: give it its place in BELOW"
    assert not breaks_of_the_arrows(layer(path), tree(path))


def wing_of(folder: str, parts: tuple[str, ...]) -> str:
    return parts[0] if parts and parts[0] in WINGS[folder] else ""


def breaks_between_wings(folder: str, wing: str, module: ast.AST) -> set[str]:
    """The wings of a folder that a module of one of them imports and should not."""
    prefix = f"healpass.{folder.removeprefix('healpass/')}.".replace("/", ".")
    inside = {i.removeprefix(prefix) for i in imports(module) if i.startswith(prefix)}
    named = {wing_of(folder, tuple(i.split("."))) for i in inside}
    return named - WINGS[folder][wing] - {wing}


IN_WINGS = [
    (folder, path)
    for folder in WINGS
    for path in SOURCES
    if path.is_relative_to(ROOT / folder) and str(path.relative_to(ROOT)) not in GATHERS
]


@pytest.mark.parametrize(
    ("folder", "path"), IN_WINGS, ids=lambda p: str(p.relative_to(ROOT)) if p in SOURCES else ""
)
def test_a_wing_imports_only_what_lies_below_it(folder, path):
    wing = wing_of(folder, path.relative_to(ROOT / folder).parts)
    assert not breaks_between_wings(folder, wing, tree(path))


def test_every_folder_is_a_wing():
    for folder, wings in WINGS.items():
        found = {p.parent.name for p in (ROOT / folder).glob("*/__init__.py")}
        assert found == set(wings) - {""}


def test_a_wrong_arrow_between_wings_is_found():
    upward = ast.parse("from healpass.ops.attention import sdpa")
    assert breaks_between_wings("healpass/ops", "products", upward) == {"attention"}
    across = ast.parse("from healpass.lowering.cuda.tiles import Tile")
    assert breaks_between_wings("lowering", "cpu", across) == {"cuda"}
    into_passes = ast.parse("from healpass.graph.passes.exact import make_exact")
    assert breaks_between_wings("healpass/graph", "", into_passes) == {"passes"}
    to_judge = ast.parse("from healpass.study.judge import metrics")
    assert breaks_between_wings("healpass/study", "run", to_judge) == {"judge"}


def test_a_wrong_arrow_is_found():
    upward = ast.parse("from healpass.graph.pipeline import rewrite")
    assert breaks_of_the_arrows("ops", upward) == {"graph"}
    assert breaks_of_the_arrows("study", upward) == {"graph"}
    assert breaks_of_the_arrows("errors", ast.parse("import healpass.config")) == {"config"}


def test_the_study_may_use_what_everybody_may():
    assert set(healpass.__all__) == PUBLIC


def functions(module: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(module) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_fit_their_size(path):
    assert len(path.read_text().splitlines()) <= 400
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions(tree(path))}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def forbidden(module: ast.AST) -> list[str]:
    """Star imports, global statements, edits of the environment, bare or too broad `except`."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"line {node.lineno}: import *")
        if isinstance(node, ast.Global):
            found.append(f"line {node.lineno}: global")
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type):
            found.append(f"line {node.lineno}: broad except")
        if _edits_environment(node):
            found.append(f"line {node.lineno}: edits the environment")
    return found


def _is_broad(kind: ast.expr | None) -> bool:
    return kind is None or ast.unparse(kind) in ("Exception", "BaseException")


def _edits_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        return called in ("os.putenv", "os.unsetenv", "os.environ.update", "os.environ.setdefault",
                          "os.environ.pop", "os.environ.clear")  # fmt: skip
    written = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else []
    return any(ast.unparse(target).startswith("os.environ") for target in written)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_state_is_hidden_and_no_error_swallowed(path):
    assert forbidden(tree(path)) == []


@pytest.mark.parametrize(
    "code",
    [
        "from torch import *",
        "def f():\n    global x\n    x = 1",
        "os.environ['A'] = '1'",
        "os.environ.setdefault('A', '1')",
        "del os.environ['A']",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_what_is_forbidden_is_found(code):
    assert forbidden(ast.parse(code))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_and_public_function_says_what_it_is(path):
    module = tree(path)
    assert ast.get_docstring(module)
    public = [
        f for f in module.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")
    ]
    assert [f.name for f in public if not ast.get_docstring(f)] == []


#: Decorators of functions whose parameters are documented elsewhere: as the help of a command's
#: options, or by the schema of an operator and the reference of its Triton kernel.
DOCUMENTED_ELSEWHERE = (
    *("app.command", "torch.library.custom_op", "torch.library.impl", "triton.jit"),
)
#: Methods that somebody else calls, by the signature that their base class documents.
OVERRIDES = {
    *("Propagated.placeholder", "Propagated.get_attr"),  # torch.fx.Interpreter
    *("HealCache.update", "HealIntegerLayer.update"),  # transformers' Cache, CacheLayerMixin
    *("HealCallback.on_init_end", "HealCallback.on_train_begin"),  # transformers' TrainerCallback
    "HealCallback.on_evaluate",
    "CallBorder.before",  # our own Border
    *("FloatAttention.weighted_sum", "IntegerAttention.weighted_sum"),  # our own Attention
}


def public_functions(module: ast.Module) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of a module, and as `Class.method` those of its classes, without an underscore."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = {node.name: node for node in module.body if isinstance(node, kinds)}
    for owner in module.body:
        # (The static methods of an autograd function have the signatures that torch documents.)
        if isinstance(owner, ast.ClassDef) and "torch.autograd.Function" not in map(
            ast.unparse, owner.bases
        ):
            methods = [node for node in owner.body if isinstance(node, kinds)]
            found |= {f"{owner.name}.{method.name}": method for method in methods}
    return {k: f for k, f in found.items() if not any(n.startswith("_") for n in k.split("."))}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of all parameters but `self` and `cls`."""
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [a.arg for a in every if a is not None and a.arg not in ("self", "cls")]


def without_args(module: ast.Module) -> list[str]:
    """Public functions of three or more parameters whose docstring has no section `Args:`."""
    found = []
    for name, function in public_functions(module).items():
        decorators = [ast.unparse(d).split("(")[0] for d in function.decorator_list]
        exempt = name in OVERRIDES or any(d in DOCUMENTED_ELSEWHERE for d in decorators)
        lines = (ast.get_docstring(function) or "").splitlines()
        if len(parameters(function)) >= 3 and not exempt and "Args:" not in lines:
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_functions_of_three_parameters_have_args(path):
    assert without_args(tree(path)) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("def f(a, b, c):\n    'Do.'", ["f"]),
        ("def f(a, *b, c=0):\n    pass", ["f"]),
        ("def f(a, b, **c):\n    'Do, with Args: in a sentence.'", ["f"]),
        ("class C:\n    def f(self, a, b, c):\n        'Do.'", ["C.f"]),
        ("class C:\n    @classmethod\n    def f(cls, a, b, c):\n        'Do.'", ["C.f"]),
        ("@functools.cache\ndef f(a, b, c):\n    'Do.'", ["f"]),
        ("class Border:\n    def before(self, a, b, c):\n        'Do.'", ["Border.before"]),
        ("def f(a, b, c):\n    'Do.\\n\\n    Args:\\n        a: A number.'", []),
        ("def f(a, b):\n    'Do.'", []),
        ("class C:\n    def f(self, a, b):\n        'Do.'", []),
        ("def _f(a, b, c):\n    'Do.'", []),
        ("def f(a):\n    def g(a, b, c):\n        pass", []),
        ("class _C:\n    def f(self, a, b, c):\n        'Do.'", []),
        ("class CallBorder:\n    def before(self, a, b, c):\n        'Do.'", []),
        ("@torch.library.impl(library, 'f')\ndef f(a, b, c):\n    'Do.'", []),
        ("@triton.jit\ndef f(a, b, c):\n    'Do.'", []),
    ],
)
def test_a_function_without_args_is_found(code, found):
    assert without_args(ast.parse(code)) == found


def test_every_override_that_needs_no_args_is_there():
    assert set().union(*(public_functions(tree(path)) for path in SOURCES)) >= OVERRIDES


#: Functions of more than seven parameters, by file: none is ours to choose. A lowering and a
#: reference implementation have the operator's schema, a rule has ATen's arguments.
MIRRORS = {
    "healpass/arithmetic/compound_rules.py": {"sdpa"},  # ATen's SDPA
    "healpass/bench/products.py": {"tile_product"},  # a Triton kernel: pointers, sizes and tiles
    "healpass/cli.py": {"bench", "check", "explain"},  # typer commands
    "healpass/graph/passes/exact_rules.py": {"_embedding", "rule"},  # ATen's embedding and losses
    "healpass/graph/passes/expand.py": {"_encoder_layer"},  # aten._transformer_encoder_layer_fwd
    "healpass/integrations/attention.py": {"attention_forward"},  # transformers' interface
    "healpass/integrations/vllm/attention.py": {"__init__", "forward"},  # vLLM's AttentionImpl
    "healpass/ops/attention/scoring.py": {"read"},  # `SCORING`, a part of schemas
    "healpass/ops/attention/sdpa.py": {"sdpa", "forward"},  # heal::sdpa; what autograd sees of it
    "healpass/ops/products/digits.py": {"_digit_grouped_mm"},  # its schema
    "healpass/study/run/baselines.py": {"attention"},  # ATen's SDPA
    "lowering/cuda/exact_matmul.py": {"lower_groups"},  # the schema of heal::digit_grouped_mm
}


def test_no_function_of_ours_takes_more_than_seven_parameters():
    long = {
        str(path.relative_to(ROOT)): names
        for path in SOURCES
        if (names := {f.name for f in functions(tree(path)) if len(parameters(f)) > 7})
    }
    assert long == MIRRORS


LOOK = """
import sys
import torch
before = set(sys.modules)
import healpass
new = set(sys.modules) - before
print([name for name in new if name.startswith({heavy!r})])
print(sorted(set(healpass.__all__) - set(dir(healpass))))
"""


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_healpass_is_light_and_gives_every_public_name():
    assert in_a_fresh_process(LOOK.format(heavy=HEAVY)).split("\n")[:2] == ["[]", "[]"]


def test_torch_finds_the_backend_with_no_import_of_healpass():
    code = (
        "import sys, torch\n"
        "assert 'heal' in torch.compiler.list_backends()\n"
        "assert 'healpass' not in sys.modules\n"
        "f = torch.compile(lambda x: x + 1, backend='heal', options={'precizion': 'heal'})\n"
        "try:\n    f(torch.ones(1))\n"
        "except Exception as error:\n    print(str(error))\n"
        "torch._dynamo.reset()  # must work after a compile that never reached Inductor\n"
    )
    assert "Did you mean 'precision'" in in_a_fresh_process(code)
