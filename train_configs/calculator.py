"""A calculator as the tool of a policy, for recipes on GSM8K."""

import ast
import operator
import re
from typing import Any

_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_BINARY |= {ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


class Calculator:
    """Problems with an answer behind "####", which count if the reply's last number is that."""

    def reset(self, label: str, **row: Any) -> None:
        self.label = label

    def calculate(self, expression: str) -> float:
        """Computes an arithmetic expression.

        Args:
            expression: Numbers, parentheses and + - * / // %, as in (12 + 3) * 4.
        """
        if len(expression) > 200:
            raise ValueError("the expression has more than 200 characters")
        return value(ast.parse(expression.replace(",", ""), mode="eval").body)

    def get_reward(self, messages: list[dict[str, Any]]) -> float:
        """1 for the right number, 0 for another or none."""
        said = _NUMBER.findall(messages[-1]["content"])
        right = self.label.rpartition("####")[2]
        return float(bool(said) and _plain(said[-1]) == _plain(right))


def value(node: ast.expr) -> float:
    """The value of an expression of numbers. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](value(node.left), value(node.right))
    raise ValueError(f"{ast.unparse(node)} is no arithmetic; use numbers and + - * / // %")


def _plain(number: str) -> float | None:
    try:
        return float(number.replace(",", "").strip())
    except ValueError:
        return None
