"""Reads assertions as questions about a program, and conditions on its answers.

The program sees what its functions are called with, and nothing else of a test: not the values
that are expected, and no test that is still to come.
"""

import ast
import builtins
import math
from collections.abc import Callable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import CodeType
from typing import Any, TypeGuard

_KINDS = (str, bytes, list, tuple, dict, set, frozenset, int, float, complex)
_METHODS = {name for kind in _KINDS for name in dir(kind) if name[0] != "_"} - {
    *("format", "format_map"),  # which reach attributes
}
_FUNCTIONS = "abs all any bool bytes complex dict divmod enumerate filter float frozenset int "
_FUNCTIONS += "isinstance iter len list map max min next ord chr pow range repr reversed round "
_FUNCTIONS += "set sorted str sum tuple type zip"
_NAMES: dict[str, Any] = {name: getattr(builtins, name) for name in _FUNCTIONS.split()}
_NAMES |= {f"math.{name}": value for name, value in vars(math).items() if name[0] != "_"}
_NODES = (
    *(ast.Constant, ast.Name, ast.expr_context, ast.List, ast.Tuple, ast.Set, ast.Dict),
    *(ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.BoolOp, ast.boolop, ast.Compare),
    *(ast.cmpop, ast.IfExp, ast.Call, ast.keyword, ast.Subscript, ast.Slice, ast.Starred),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension),
    *(ast.Lambda, ast.arguments, ast.arg, ast.JoinedStr, ast.FormattedValue),
)
_UNDER_TEST = ("solution", "typing")  # modules whose names the program has, or that do nothing
_LONGEST = 1_000  # turns of a loop


class Unreadable(ValueError):
    """A test that needs the program's objects, or else cannot be read; the text is its source."""


@dataclass(frozen=True, slots=True)
class Check:
    """Questions for the sandbox, and the function that judges all answers to them.

    A question is {"stdin": text}, {"call": expression, "setup": [statement, ...], "name": function}
    or, of a test that a program may forge, {"run": source}.
    """

    questions: Sequence[Mapping[str, Any]]
    judge: Callable[[Sequence[Any]], bool]


def _holds(condition: CodeType, answers: Sequence[Any]) -> bool:
    names = {f"answer.{place}": answer for place, answer in enumerate(answers)}
    return bool(eval(condition, {"__builtins__": {}, **_NAMES, **names}))


class AssertReader:
    """Reads the tests of one label, whose definitions count for those behind them."""

    def __init__(self) -> None:
        self.names: dict[str, ast.expr] = {}  # what the tests call a constant, or the program's
        self.modules: dict[str, str] = {}  # imports, by the name that they bind
        self.sources: dict[str, ast.stmt] = {}  # definitions, and imports as well
        self.variables: dict[str, bool] = {}  # that live beside the program; true is an object
        self.setup: list[str] = []  # statements that the next call needs
        self.sent: set[str] = set()
        self.checks: list[Check] = []

    def read(self, source: str) -> list[Check]:
        """The checks of a test; Unreadable, SyntaxError or RecursionError if it cannot be read."""
        self.checks = []
        statements = ast.parse(source).body
        called = {each.id for node in statements for each in ast.walk(node) if _is_name(each)}
        for statement in statements:
            self._read(statement)
        for node in statements:  # as pytest does
            match node:
                case ast.FunctionDef(name, ast.arguments(args=[])) if name[:5] == "test_":
                    if name not in called:
                        self._call(node, [])
        return self.checks

    def _read(self, node: ast.stmt) -> None:
        match node:
            case ast.Pass() | ast.Expr(ast.Constant()) | ast.Expr(ast.Call(ast.Name("print"))):
                pass
            case ast.Import(names) | ast.ImportFrom(names=names):
                self._import(node, names)
            case ast.FunctionDef(name) | ast.ClassDef(name):
                self.sources[name] = node
            case ast.Assign([target], value) | ast.AnnAssign(target, value=ast.expr() as value):
                self._bind(target, self._inlined(value), node)
            case ast.Assert(test):
                self._check(test)
            case ast.For(target, values, body, orelse=[]):
                for value in self._constant(values, node):
                    self._bind(target, ast.parse(repr(value), mode="eval").body, node)
                    for statement in body:
                        self._read(statement)
            case ast.Expr(ast.Call(ast.Name(name), args, [])) if name in self.sources:
                self._call(self.sources[name], args)
            case ast.Expr(ast.Call() as call) if self.is_asked(self._inlined(call)):
                if {each.id for each in ast.walk(call) if _is_name(each)} & self.names.keys():
                    raise Unreadable(ast.unparse(node))  # it may change a constant
                self._send(self._inlined(call))
            case ast.If(ast.Compare(ast.Name("__name__")), body):
                for statement in body:
                    self._read(statement)
            case _:
                raise Unreadable(ast.unparse(node))

    def _import(self, node: ast.Import | ast.ImportFrom, names: list[ast.alias]) -> None:
        module = node.module if isinstance(node, ast.ImportFrom) else None
        for each in names:
            if module in _UNDER_TEST:
                continue
            if each.name == "*":
                raise Unreadable(ast.unparse(node))
            name = each.asname or each.name.split(".")[0]
            self.modules[name] = f"{module}.{each.name}" if module else each.name
            self.sources[name] = node

    def _call(self, function: ast.stmt, args: list[ast.expr]) -> None:
        """Reads the body of a function of the tests, such as HumanEval's `check`."""
        if not isinstance(function, ast.FunctionDef) or len(function.args.args) != len(args):
            raise Unreadable(ast.unparse(function))
        for parameter, arg in zip(function.args.args, args, strict=True):
            self.names[parameter.arg] = self._inlined(arg)
        for statement in function.body:
            self._read(statement)

    def _bind(self, target: ast.expr, value: ast.expr, node: ast.stmt) -> None:
        match target, value:
            case ast.Name() | ast.Tuple(), _ if self.is_asked(value):
                for name in _bound(target):
                    self.names.pop(name, None)
                    self.variables[name] = _makes_object(value)
                self._send(ast.Assign([target], value, lineno=0))
            case ast.Name(name), _:
                split = _Split(self, deepcopy(value))
                self._code(split.condition, len(split.calls))
                used = {each.id for each in ast.walk(value) if _is_name(each)}
                if split.calls and used & self.variables.keys():
                    raise Unreadable(ast.unparse(node))  # its state may change until it counts
                self.variables.pop(name, None)
                self.names[name] = value
            case (ast.Tuple(targets), ast.Tuple(values) | ast.List(values)) if len(targets) == len(
                values
            ):
                for each, part in zip(targets, values, strict=True):
                    self._bind(each, part, node)
            case _:
                raise Unreadable(ast.unparse(node))

    def _constant(self, node: ast.expr, statement: ast.stmt) -> list[Any]:
        values = _evaluated(self._code(self._inlined(node), 0))
        turns = list(islice(values, _LONGEST + 1)) if hasattr(values, "__iter__") else []
        if not 0 < len(turns) <= _LONGEST:
            raise Unreadable(ast.unparse(statement))
        return turns

    def _check(self, test: ast.expr) -> None:
        split = _Split(self, self._inlined(test))
        names = {each.id for each in ast.walk(test) if _is_name(each)}
        if not split.calls and not names & self.names.keys():
            first = test.left if isinstance(test, ast.Compare) else test
            if isinstance(first, ast.Call):  # of a program that defines a `sum` of its own
                split = _Split(self, self._inlined(test), ast.dump(self._inlined(first)))
        code = self._code(split.condition, len(split.calls))
        if split.calls:
            self.checks.append(Check(split.questions(self.setup), partial(_holds, code)))
            self.setup = []
        elif names & self.names.keys() or not _evaluated(code):
            raise Unreadable(ast.unparse(test))  # whether it holds is up to the program's objects

    def _send(self, node: ast.expr | ast.stmt) -> None:
        """Has the statement run beside the program, before what is asked next."""
        self._need(node)
        self.setup.append(ast.unparse(node))

    def _need(self, node: ast.AST) -> None:
        """Sends what `node` uses of the tests' imports and definitions."""
        for name in [each.id for each in ast.walk(node) if _is_name(each)]:
            if name in self.sources and name not in self.sent:
                self.sent.add(name)
                self._need(self.sources[name])
                self.setup.append(ast.unparse(self.sources[name]))

    def _inlined(self, node: ast.expr) -> ast.expr:
        """A copy with constants in place of their names, and with functions of `math` by theirs."""
        return _Inline(self, _bound(node)).visit(deepcopy(node))

    def is_asked(self, node: ast.expr, bound: Set[str] = frozenset()) -> bool:
        """Whether an expression is up to the program: what it begins with is its name."""
        while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
            node = node.func if isinstance(node, ast.Call) else node.value
        if not _is_name(node) or node.id in bound:
            return False
        return node.id in self.variables or node.id not in _NAMES.keys() | self.sources.keys()

    def _code(self, node: ast.expr, answers: int) -> CodeType:
        """Compiles a condition that reads nothing but answers and plain data."""
        known = _bound(node) | _NAMES.keys() | {f"answer.{place}" for place in range(answers)}
        called = {id(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)}
        for each in ast.walk(node):
            if isinstance(each, ast.Attribute):
                is_known = id(each) in called and each.attr in _METHODS
            else:
                is_known = isinstance(each, _NODES) and (not _is_name(each) or each.id in known)
            if not is_known:
                raise Unreadable(ast.unparse(each))
        return compile(ast.fix_missing_locations(ast.Expression(node)), "test", "eval")


def _evaluated(code: CodeType) -> Any:
    try:
        return eval(code, {"__builtins__": {}, **_NAMES})
    except Exception as error:
        raise Unreadable(f"a constant that cannot be computed: {error}") from error


def _is_name(node: ast.AST, context: type[ast.expr_context] = ast.Load) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, context)


def _makes_object(node: ast.expr) -> bool:
    """Whether an expression is a class that is called, going by its capital letter."""
    function = node.func if isinstance(node, ast.Call) else None
    name = getattr(function, "attr", getattr(function, "id", ""))
    return name[:1].isupper()


class _Inline(ast.NodeTransformer):
    def __init__(self, reader: AssertReader, bound: Set[str]) -> None:
        self.reader, self.bound = reader, bound

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.bound:
            return node
        name = self.reader.modules.get(node.id, "")
        if name in _NAMES:
            return ast.Name(name, ast.Load())
        return deepcopy(self.reader.names.get(node.id, node))

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        base = node.value
        name = f"{self.reader.modules.get(base.id)}.{node.attr}" if _is_name(base) else ""
        if name in _NAMES:
            return ast.Name(name, ast.Load())
        self.generic_visit(node)
        return node


class _Split(ast.NodeTransformer):
    """Takes what is up to the program out of a condition, and what is written like `asked`."""

    def __init__(self, reader: AssertReader, test: ast.expr, asked: str = "") -> None:
        self.reader, self.asked, self.calls = reader, asked, list[str]()
        self.bound = _bound(test)
        self.condition = self.visit(test)

    def questions(self, setup: list[str]) -> list[Mapping[str, Any]]:
        """`setup` runs before the first of them."""
        setups = [setup, *([] for _ in self.calls[1:])]
        pairs = zip(self.calls, setups, strict=True)
        return [{"call": each, "setup": before, "name": None} for each, before in pairs]

    def visit(self, node: ast.AST) -> Any:
        is_asked = isinstance(node, ast.expr) and self._is_asked(node)
        if not is_asked:
            if isinstance(node, ast.Compare):
                self._refuse_objects([node.left, *node.comparators])
            return self.generic_visit(node)
        match node:
            # A method of data is called on the answer: the program could lend it one of its own.
            case ast.Call(ast.Attribute(base, method) as function, args, keywords) if (
                self._is_asked(base)
                and self._is_data(base)
                and (method in _METHODS or args or keywords)
            ):
                if method not in _METHODS:
                    raise Unreadable(ast.unparse(node))
                function.value = self.visit(base)
                node.args = [self.visit(each) for each in node.args]
                return node
        names = [each.id for each in ast.walk(node) if _is_name(each)]
        of_program = {*names} - _NAMES.keys() - self.reader.sources.keys() - _bound(node)
        # What Python has built in, a program can replace; it is the program's own if it gets data.
        is_builtin = len(of_program) > 1 and any(hasattr(builtins, name) for name in of_program)
        if is_builtin or of_program & self.bound:
            raise Unreadable(ast.unparse(node))
        attributes = [each for each in ast.walk(node) if isinstance(each, ast.Attribute)]
        is_member = isinstance(node, ast.Attribute) and _is_class(node.value)
        # A name by itself is a function or a class, unless it is written like a constant.
        is_object = (
            _is_name(node) and node.id not in self.reader.variables and not node.id.isupper()
        )
        if is_object or is_member or any(each.attr[:2] == "__" for each in attributes):
            raise Unreadable(ast.unparse(node))
        self.reader._need(node)
        source = ast.unparse(node)
        if source not in self.calls:
            self.calls.append(source)
        return ast.Name(f"answer.{self.calls.index(source)}", ast.Load())

    def _is_asked(self, node: ast.expr) -> bool:
        return self.reader.is_asked(node, self.bound) or ast.dump(node) == self.asked

    def _is_data(self, node: ast.expr) -> bool:
        """Whether an answer is to be data, rather than an object of the program's."""
        if _is_name(node):
            return self.reader.variables.get(node.id) is False
        return not _makes_object(node)

    def _refuse_objects(self, sides: list[ast.expr]) -> None:
        """Two answers are compared as data, which a new object is none of."""
        if sum(map(self._is_asked, sides)) > 1 and any(map(_makes_object, sides)):
            raise Unreadable(ast.unparse(sides[-1]))


def _bound(node: ast.AST) -> set[str]:
    """The names that an expression binds itself."""
    names = {each.id for each in ast.walk(node) if _is_name(each, ast.Store)}
    return names | {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}


def _is_class(node: ast.AST) -> bool:
    return _is_name(node) and node.id[:1].isupper() and not node.id.isupper()
