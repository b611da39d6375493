"""Reads assertions as questions about a program, and conditions on its answers.

The program sees what its functions are called with, as values, one call after the other. It sees
nothing else of a test: no value that is expected, no function of the tests, no test to come.
"""

import ast
import builtins
import math
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import CodeType
from typing import Any, TypeGuard

_KINDS = (str, bytes, list, tuple, dict, set, frozenset, int, float, complex)
_METHODS = {name for kind in _KINDS for name in dir(kind) if name[0] != "_"}
_METHODS -= {"format", "format_map"}  # which reach attributes
_FUNCTIONS = "abs all any bool bytes complex dict divmod enumerate filter float frozenset int "
_FUNCTIONS += "isinstance iter len list map max min next ord chr pow range repr reversed round "
_FUNCTIONS += "set sorted str sum tuple type zip"
_NAMES: dict[str, Any] = {name: getattr(builtins, name) for name in _FUNCTIONS.split()}
_NAMES |= {f"math.{name}": value for name, value in vars(math).items() if name[0] != "_"}
_SCOPE = {"__builtins__": {}, **_NAMES}
_LIBRARIES = sys.stdlib_module_names | {"np", "numpy", "pd", "pandas", "pytest", "scipy", "torch"}
# What a program may answer without a thought.
_PROBES: tuple[Any, ...] = (True, False, None, "", (), [], {})
_LONGEST = 1_000  # turns of a loop


class Unreadable(ValueError):
    """A test that needs the program's objects, or else cannot be read; the text is its source."""


@dataclass(frozen=True, slots=True)
class Check:
    """Questions for the sandbox, and the function that judges all answers to them.

    A question is {"stdin": text}, {"setup": statement}, {"call": expression, "name": function that
    the program must define, or None} or, of a test that a program may forge, {"run": source}.
    """

    questions: Sequence[Mapping[str, Any]]
    judge: Callable[[Sequence[Any]], bool]


def _holds(condition: CodeType, count: int, answers: Sequence[Any]) -> bool:
    """Whether a condition holds for the last `count` answers; those before are of statements."""
    names = {f"answer.{place}": answer for place, answer in enumerate(answers[-count:])}
    with suppress(Exception):  # an answer is of another kind than the test can look at
        return bool(eval(condition, _SCOPE | names))
    return False


class AssertReader:
    """Reads the tests of one label, whose definitions count for those behind them."""

    def __init__(self) -> None:
        self.names: dict[str, ast.expr] = {}  # what the tests call a constant, or the program's
        self.functions: dict[str, ast.FunctionDef] = {}
        self.modules: dict[str, str] = {}  # imports, by the name that they bind
        self.variables: dict[str, bool] = {}  # that live beside the program; true is an object
        self.mixed: set[str] = set()  # variables that the program makes of answers of its own
        self.setup: list[Mapping[str, Any]] = []  # statements that the next call needs
        self.unread: dict[ast.AST, None] = {}  # assertions and functions
        self.checks: list[Check] = []

    def read(self, source: str) -> list[Check]:
        """The checks of a test; Unreadable, SyntaxError or RecursionError if it cannot be read."""
        self.checks = []
        tree = ast.parse(source)
        kinds = ast.Assert | ast.FunctionDef
        self.unread |= dict.fromkeys(each for each in ast.walk(tree) if isinstance(each, kinds))
        self._read(*tree.body)
        for node in tree.body:  # as pytest does
            match node:
                case ast.FunctionDef(name, ast.arguments(args=[])) if name[:5] == "test_":
                    self._call(node, [])
        return self.checks

    def end(self) -> list[Check]:
        """The check of statements behind all others; Unreadable for a test that nobody reads."""
        for node in self.unread:
            raise Unreadable(ast.unparse(node))
        return [Check(self.setup, lambda answers: True)] if self.setup else []

    def _read(self, *nodes: ast.stmt) -> None:
        for node in nodes:
            match node:
                case ast.Pass() | ast.ImportFrom("solution" | "main" | "typing"):
                    pass  # the program has what is imported
                case ast.Expr(value) if {*self.free(value)} <= {"print"}:
                    pass
                case ast.Import(names) | ast.ImportFrom(names=names) if names[0].name != "*":
                    module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                    for each in names:
                        self.modules[each.asname or each.name.split(".")[0]] = module + each.name
                case ast.FunctionDef(name, decorator_list=[]):
                    self.functions[name] = node
                case ast.Assign([target], value) | ast.AnnAssign(target, value=ast.expr() as value):
                    self._bind(target, self._inlined(value), node)
                case ast.Assert(test):
                    self.unread.pop(node, None)
                    self._check(test)
                case ast.For(target, values, body, orelse=[]):
                    for value in self._turns(values):
                        self._bind(target, value, node)
                        self._read(*body)
                case ast.Expr(ast.Call(ast.Name(name), args, [])) if name in self.functions:
                    self._call(self.functions[name], args)
                case ast.Expr(ast.Call() as call) if self.is_asked(self._inlined(call)):
                    self._change(call)
                case ast.If(ast.Compare(ast.Name("__name__"), [ast.Eq()]), body, []):
                    self._read(*body)
                case _:
                    raise Unreadable(ast.unparse(node))

    def _change(self, call: ast.Call) -> None:
        """Has a call change the program's objects, but neither a constant nor the verdict."""
        objects = self.variables.keys() & {*_names(call.func)}
        is_nested = self.is_nested(call)
        if self.names.keys() & {*_names(call)} or (is_nested and not objects):
            raise Unreadable(ast.unparse(call))
        self.mixed |= objects if is_nested else set()
        self.setup.append({"setup": self.sent(self._inlined(call))})

    def _call(self, function: ast.FunctionDef, args: list[ast.expr]) -> None:
        """Reads the body of a function of the tests, such as HumanEval's `check`."""
        self.unread.pop(function, None)
        parameters = [each.arg for each in function.args.args]
        plain = ast.arguments([], function.args.args, None, [], [], None, [])
        if ast.dump(function.args) != ast.dump(plain) or len(parameters) != len(args):
            raise Unreadable(ast.unparse(function))
        outside = self.names, self.variables
        self.names = self.names | dict(zip(parameters, map(self._inlined, args), strict=True))
        self.variables = dict(self.variables)
        self._read(*function.body)
        self.names, self.variables = outside

    def _bind(self, target: ast.expr, value: ast.expr, node: ast.stmt) -> None:
        match target, value:
            case ast.Name() | ast.Tuple(), _ if self.is_asked(value):
                for name in _bound(target):
                    self.names.pop(name, None)
                    self.variables[name] = self.is_object(value)
                self.mixed |= _bound(target) if self.is_nested(value) else set()
                source = f"{ast.unparse(target)} = {self.sent(value)}"
                self.setup.append({"setup": source})
            case ast.Name(name), _:
                if self.asks(value) and self.variables.keys() & {*_names(value)}:
                    raise Unreadable(ast.unparse(node))  # its state may change until it counts
                self.variables.pop(name, None)
                self.names[name] = value
            case ast.Tuple(targets), ast.Tuple(values) | ast.List(values):
                for each, part in zip(targets, values, strict=True):
                    self._bind(each, part, node)
            case _:
                raise Unreadable(ast.unparse(node))

    def _turns(self, node: ast.expr) -> list[ast.expr]:
        with suppress(Exception):
            values = [*islice(eval(self._code(self._inlined(node), 0), _SCOPE), _LONGEST + 1)]
            if 0 < len(values) <= _LONGEST:
                return [*map(_literal, values)]
        raise Unreadable(ast.unparse(node))

    def _check(self, test: ast.expr) -> None:
        names = {*_names(test)}
        match test.left if isinstance(test, ast.Compare) else test:
            case ast.Call(ast.Name(name)) as call if name in _FUNCTIONS.split():
                if not self.asks(self._inlined(test)) and not names & self.names.keys():
                    call.func = ast.parse(f"__program__.{name}", mode="eval").body  # its own
        split = _Split(self, self._inlined(test))
        count = len(split.calls)
        judge = partial(_holds, self._code(split.condition, count), count)
        if not count:
            if names & self.names.keys() or not judge([]):
                raise Unreadable(ast.unparse(test))  # whether it holds is up to the program
            return
        # With the expected value as an argument, the program would judge itself.
        if split.is_nested and any(judge([probe] * count) for probe in _PROBES):
            raise Unreadable(ast.unparse(test))
        self.checks.append(Check([*self.setup, *split.calls], judge))
        self.setup = []

    def sent(self, node: ast.expr) -> str:
        """What the process gets of an expression that is up to the program: values in its calls."""
        lambdas = [each for each in ast.walk(node) if isinstance(each, ast.Lambda)]
        within = {each for function in lambdas for each in ast.walk(function.body)}
        for each in ast.walk(node):
            is_value, is_sent = not self.free(each), each in within
            match each:
                case ast.Name(name):
                    is_sent = name not in self.functions and name not in self.modules
                case ast.Attribute(base, name):
                    is_sent = name[:2] != "__" and not self._is_library(base)
                case ast.Lambda():
                    is_sent = is_value
                case ast.Call(ast.Name("range" | "frozenset" | "set" | "float")) | ast.Starred():
                    is_sent = True
                case ast.Constant() | ast.UnaryOp() | ast.BinOp() | ast.Slice():
                    is_sent = True
                case ast.List() | ast.Tuple() | ast.Set() | ast.Dict():
                    is_sent = not (each in within and is_value)
                case ast.Call() | ast.Subscript():
                    is_sent |= not is_value
            if isinstance(each, ast.expr) and not is_sent:
                raise Unreadable(ast.unparse(each))
        return ast.unparse(node)

    def _is_library(self, node: ast.AST) -> bool:
        """Whether a name is that of a module, also of one that the tests do not import."""
        return _is_name(node) and node.id in _LIBRARIES and node.id not in self.variables

    def _inlined(self, node: ast.expr) -> ast.expr:
        """A copy with values in place of names and of all that can be computed here."""
        return _Inline(self, _bound(node)).visit(deepcopy(node))  # type: ignore[no-any-return]

    def value(self, node: ast.expr) -> ast.expr:
        """The value of an expression as Python writes it, or the expression if it is no data."""
        if not self.free(node):
            with suppress(Exception):
                return _literal(eval(self._code(node, 0), _SCOPE))
        return node

    def free(self, node: ast.AST) -> list[str]:
        """The names in an expression that are none of Python's, as often as they are there."""
        bound = _bound(node)
        return [name for name in _names(node) if name not in _NAMES and name not in bound]

    def is_nested(self, node: ast.expr) -> bool:
        """Whether a call gets something of the program's as an argument."""
        names = self.free(node)
        return len(names) > 1 or not self.mixed.isdisjoint(names)

    def is_asked(self, node: ast.AST, bound: Set[str] = frozenset()) -> bool:
        """Whether an expression is up to the program: what it begins with is its name."""
        while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
            if isinstance(node, ast.Attribute) and self._is_library(node.value):
                return False
            node = node.func if isinstance(node, ast.Call) else node.value
        if not _is_name(node) or node.id in bound:
            return False
        known = (_NAMES, self.functions, self.modules, ("eval", "exec"))
        return node.id in self.variables or not any(node.id in names for names in known)

    def asks(self, node: ast.expr, bound: Set[str] = frozenset()) -> bool:
        bound = bound | _bound(node)
        return any(self.is_asked(each, bound) for each in ast.walk(node))

    def is_object(self, node: ast.expr) -> bool:
        """Whether an answer is an object rather than data: a function, or what a class makes."""
        if _is_name(node):  # which is data if it is written like a constant
            return self.variables.get(node.id, not node.id.isupper())
        function = getattr(node, "func", None)
        return str(getattr(function, "attr", getattr(function, "id", "")))[:1].isupper()

    def _code(self, node: ast.expr, answers: int) -> CodeType:
        """Compiles a condition that reads nothing but answers and plain data."""
        known = _bound(node) | _NAMES.keys() | {f"answer.{place}" for place in range(answers)}
        called = {id(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)}
        for each in ast.walk(node):
            is_method = id(each) in called and getattr(each, "attr", "") in _METHODS
            if (_is_name(each) and each.id not in known) or (
                isinstance(each, ast.Attribute) and not is_method
            ):
                raise Unreadable(ast.unparse(each))
        return compile(ast.fix_missing_locations(ast.Expression(node)), "test", "eval")


def _literal(value: Any) -> ast.expr:
    """Plain data as Python writes it; ValueError or SyntaxError for other data."""
    ast.literal_eval(repr(value))
    return ast.parse(repr(value), mode="eval").body


def _is_name(node: ast.AST, context: type[ast.expr_context] = ast.Load) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, context)


class _Inline(ast.NodeTransformer):
    def __init__(self, reader: AssertReader, bound: Set[str]) -> None:
        self.reader, self.bound = reader, bound

    def visit(self, node: ast.AST) -> Any:
        name = ""
        match node:
            case ast.Name(base) if base not in self.bound:
                name = self.reader.modules.get(base, "")
                node = deepcopy(self.reader.names.get(base, node))
            case ast.Attribute(ast.Name(base), method) if base not in self.reader.variables:
                name = f"{self.reader.modules.get(base, base)}.{method}"
            case ast.Constant():
                return node
        if name in _NAMES:
            return ast.Name(name, ast.Load())
        if isinstance(node, ast.Name):
            return node
        node = self.generic_visit(node)
        return self.reader.value(node) if isinstance(node, ast.expr) else node


class _Split(ast.NodeTransformer):
    """Takes what is up to the program out of a condition."""

    def __init__(self, reader: AssertReader, test: ast.expr) -> None:
        self.reader, self.bound, self.is_nested = reader, _bound(test), False
        self.is_asked = partial(reader.is_asked, bound=self.bound)
        self.calls: list[Mapping[str, Any]] = []
        self.condition = self.visit(test)

    def visit(self, node: ast.AST) -> Any:
        if not isinstance(node, ast.expr) or not self.is_asked(node):
            self._refuse(node)
            return self.generic_visit(node)
        match node:
            # A method of data is called on the answer: the program could lend it one of its own.
            case ast.Call(ast.Attribute(base, method) as function, args, keywords) if (
                self.is_asked(base)
                and not self.reader.is_object(base)
                and (method in _METHODS or args or keywords)
            ):
                function.value = self.visit(base)
                node.args = [self.visit(each) for each in node.args]
                return node
        names = {*_names(node)} - _bound(node)
        owner = str(getattr(getattr(node, "value", None), "id", ""))
        is_object = self.reader.is_object(node) and not getattr(node, "args", None)
        if is_object or (owner[:1].isupper() and not owner.isupper()) or names & self.bound:
            raise Unreadable(ast.unparse(node))
        self.is_nested |= self.reader.is_nested(node)
        self.calls.append({"call": self.reader.sent(node)})
        return ast.Name(f"answer.{len(self.calls) - 1}", ast.Load())

    def _refuse(self, node: ast.AST) -> None:
        """Refuses what only the program's own objects tell, of which there are copies."""
        asks = partial(self.reader.asks, bound=self.bound)
        match node:
            case ast.Compare(left, comparators=sides):
                # Two objects are not compared as data.
                is_refused = sum(map(asks, [left, *sides])) > 1
            case ast.BoolOp(_, sides) | ast.Dict(_, sides) | ast.List(sides) | ast.Tuple(sides):
                # An argument that was to be changed is none.
                is_refused = 0 < sum(map(asks, sides)) < len(sides)
            case ast.Call(ast.Name("next" | "iter"), [ast.Name(name), *_]):
                is_refused = name in self.reader.variables
            case _:
                return
        if is_refused:
            raise Unreadable(ast.unparse(node))


def _names(node: ast.AST) -> list[str]:
    return [each.id for each in ast.walk(node) if _is_name(each)]


def _bound(node: ast.AST) -> set[str]:
    """The names that an expression binds itself."""
    names = {each.id for each in ast.walk(node) if _is_name(each, ast.Store)}
    return names | {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
