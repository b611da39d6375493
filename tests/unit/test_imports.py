"""The rows of docs/architecture.md: nobody imports upwards, and packages of a row stay apart.

Imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "torchrft"

# Lowest first; a module may import its own package and those of lower rows.
ROWS = [
    {"types", "tools"},
    {"config"},
    {"parallel", "algorithms"},
    {"models"},
    {"data", "rewards", "rollout", "optim", "checkpoint", "metrics", "environments"},
    {"learn"},
    {"build"},
    {"collector"},
    {"run_state"},
    {"trainer", "deepspeed"},
    {"sources"},
    {"train", "rewards/server.py"},
    {"launch"},
]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def top_level(path: Path) -> str:
    """The row's name of a file; an entry point has one of its own, wherever it lies."""
    whole = str(path.relative_to(ROOT))
    if whole in ROW_OF:
        return whole
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path, source: str) -> set[str]:
    """The top-level packages of torchrft that a file imports."""
    package = ["torchrft", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for parts in (name.split(".") for name in names):
            if parts[0] == "torchrft" and len(parts) > 1:
                found.add(parts[1])
    return found


def breaches(path: Path, source: str) -> list[str]:
    own = top_level(path)
    return [
        f"{path.relative_to(ROOT)} imports torchrft.{other}"
        for other in sorted(imported(path, source))
        if (other != own and other in ROW_OF and ROW_OF[other] >= ROW_OF[own] > 0)
        or (ROW_OF[own] == 0 and other in ROW_OF and ROW_OF[other] > 0)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    assert top_level(path) in ROW_OF, f"give {top_level(path)} its row in this test"
    assert not breaches(path, path.read_text())


def test_the_test_sees_breaches():
    data, tools = ROOT / "data" / "x.py", ROOT / "tools" / "x.py"
    assert breaches(data, "def f():\n    from torchrft.rollout import engine")
    assert breaches(data, "import torchrft.trainer")
    assert breaches(data, "from torchrft import rewards")
    assert breaches(data, "from ..optim import optimizer")
    assert breaches(tools, "from torchrft.config import JobConfig")
    assert not breaches(data, "from torchrft.models import attention\nfrom . import packing")
    assert not breaches(tools, "from torchrft.types import Prompt")


def test_package_root_imports_nothing():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]


def test_config_needs_no_heavy_imports():
    """--help and faults must not wait for torch."""
    code = (
        "import sys, torchrft.config.manager\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_jobs_without_programs_do_without_their_room():
    code = (
        "import sys, torchrft.rewards.rule_source, torchrft.rewards.workers\n"
        "room = [name for name in sys.modules if '.code_' in name or '.sandbox' in name]\n"
        "assert not room, room"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_default_job_imports_little(tmp_path):
    """What two steps of it load of torchrft: nothing optional, and no more than these lines."""
    code = (
        "import sys, torchrft.launch, torchrft.train\n"
        "assert torchrft.train.main(sys.argv[1:]) == 0\n"
        "prefixes = ('torchrft', 'httpx.', 'vllm.', 'sglang.')\n"
        "print(*(name for name in sys.modules if name.startswith(prefixes)))"
    )
    flags = (
        "--config_file train_configs/debug_model.toml --max_steps 2 --eval_data none --save_path"
    )
    command = [sys.executable, "-c", code, *flags.split(), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    names = done.stdout.splitlines()[-1].split()
    rooms = ("tools.http", "deepspeed", "environments", "models.vision", "parallel.tensor_parallel")
    rooms += tuple(f"rewards.{name}" for name in ("remote", "judge", "server", "code_", "workers"))
    rooms += tuple(f"rollout.{name}" for name in ("remote", "vllm", "sglang"))
    optional = ("httpx.", "vllm.", "sglang.", *(f"torchrft.{room}" for room in rooms))
    assert not [name for name in names if name.startswith(optional)]
    files = [ROOT.parent.joinpath(*name.split(".")) for name in names]
    sources = [f.with_suffix(".py") if not f.is_dir() else f / "__init__.py" for f in files]
    assert len(sources) <= MODULES
    assert sum(code_lines(source.read_text()) for source in sources) <= MODULE_LINES


def code_lines(source: str) -> int:
    """Lines of code: no blank lines, comments or docstrings."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


# Code lines that a room may have; docs/design.md: why not 10,200 in sum.
LINES = {"rollout": 2533, "rewards": 2390, "models": 1700, "config": 1414, "tools": 1028}
LINES |= {"the loop": 985, "checkpoint": 775, "data": 621, "parallel": 617, "algorithms": 590}
LINES |= {"learn": 581, "build": 595, "metrics": 473, "optim": 126}
# Rooms that no other job imports.
APART = {"deepspeed": 1750, "code rewards": 840, "reward server": 445, "environments": 1689}
APART |= {"agents": 414, "serving": 320, "model families": 215}


MODULES, MODULE_LINES = 138, 10_915  # of the default job; docs/design.md: why not 75 and 6,800


def room_of(path: Path) -> str:
    names = path.relative_to(ROOT).parts
    if len(names) == 1:
        return "the loop"
    if names[0] == "environments" and names[1] in ("agent.py", "recording.py", "serve.py"):
        return "agents"
    if names[-1].startswith("environment"):
        return "environments"
    if names[-1] in ("mixers.py", "scores.py", "logit_form.py", "states.py"):
        return "model families"
    if names[-1].endswith("serving.py") or names[-1] == "sessions.py":
        return "serving"
    if names[0] == "rewards" and names[1].startswith(("code_", "sandbox")):
        return "code rewards"
    if names[0] == "rewards" and names[1].startswith("server"):
        return "reward server"
    return names[0]


def test_rooms_stay_small():
    assert code_lines('"""A\nb"""\n# c\n\nx = 1\ny = (\n  2)\n') == 3
    sources = {path: path.read_text() for path in ROOT.rglob("*.py")}
    lines = dict.fromkeys(LINES | APART, 0)
    for path, source in sources.items():
        lines[room_of(path)] += code_lines(source)
    assert not {room: n for room, n in lines.items() if n > (LINES | APART)[room]}
    assert sum(LINES.values()) < 14_430
    assert max(source.count("\n") for source in sources.values()) <= 400


def test_the_way_of_a_prompt_is_short():
    """From run_train.sh to the weight sync, as docs/architecture.md lists it."""
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    listed = dict(re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", text, re.M))
    lines = {name: (ROOT / name).read_text().count("\n") for name in listed}
    assert lines == {name: int(count) for name, count in listed.items()}
    assert len(lines) == 7
    script = (ROOT.parent / "run_train.sh").read_text().count("\n")
    assert sum(lines.values()) + script <= 1500


# Each with its reason.
LARGE = {
    # DeepSpeed's own interfaces.
    *("DeepSpeedEngine", "initialize", "init_distributed", "FusedAdam", "DeepSpeedCPUAdam", "Init"),
    "attention",  # transformers' interface of attention functions
    *("RemoteVllmEngine", "VllmEngine"),  # engines: requests, servers and weights in one state
    "Trainer",  # what a run is made of
}
RECORDS = {"dataclass", "Section", "NamedTuple", "Protocol", "BaseModel"}


def too_large(source: str) -> list[str]:
    """Functions of more than 60 lines or 8 parameters, classes of more than 14 attributes.

    Records may have more attributes, and so many parameters.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            words = {*map(ast.unparse, node.bases), *map(ast.unparse, node.decorator_list)}
            if RECORDS & {word.partition("(")[0].rpartition(".")[2] for word in words}:
                continue
            stored = (n for n in ast.walk(node) if isinstance(n, ast.Attribute))
            stored = (n for n in stored if isinstance(n.ctx, ast.Store))
            if len({n.attr for n in stored if ast.unparse(n.value) == "self"}) > 14:
                names.append(node.name)
            init = [n for n in node.body if getattr(n, "name", "") == "__init__"]
            names += [node.name for n in init if len(n.args.args + n.args.kwonlyargs) > 9]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = len(node.args.args + node.args.kwonlyargs) - (node.name == "__init__")
            is_long = (node.end_lineno or 0) - node.lineno >= 60
            if is_long or (count > 8 and node.name != "__init__"):
                names.append(node.name)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_classes_stay_small(path):
    assert set(too_large(path.read_text())) <= LARGE


def test_the_test_sees_what_is_too_large():
    arguments = ", ".join(f"a{i}" for i in range(9))
    stored = "\n".join(f"        self.a{i} = 0" for i in range(15))
    assert too_large(f"def f({arguments}): ...") == ["f"]
    assert too_large(f"class A:\n    def g(self):\n{stored}") == ["A"]
    assert too_large(f"class A:\n    def __init__(self, {arguments}): ...") == ["A"]
    assert too_large("def f():\n" + "    x = 1\n" * 60) == ["f"]
    assert too_large("def f():\n" + "    x = 1\n" * 59) == []
