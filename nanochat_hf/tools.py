"""The tool that the chat model may call: a calculator.

`calculate` evaluates what the model writes between <|python_start|> and <|python_end|>: arithmetic on numbers and
`'word'.count('l')`, nothing else. It walks the syntax tree with a list of allowed nodes, without `eval`, name lookup
or attribute access.

    calculate("12*(3+4)")            -> "84"
    calculate("'castle'.count('t')") -> "1"
"""

import ast
import operator
import re
from decimal import Context, Decimal, Inexact, InvalidOperation
from fractions import Fraction

MAX_CHARS = 200  # of an expression; bounds nesting and work
MAX_EXPONENT = 100
MAX_VALUE = 10**MAX_EXPONENT  # of intermediate values; larger ints are slow to print and useless in a chat
MAX_DIGITS = 100  # printed of a result that terminates; further ones are rounded

_ALLOWED = "only numbers, + - * / // % ( ) and 'text'.count('part') are allowed"
_CHARACTERS = re.compile(r"""('[^'\\]*'|"[^"\\]*"|\.count\b|[0-9 .+*/%(),eE_-])*""")
_THOUSANDS = re.compile(r"(?<![\w.])\d{1,3}(,\d{3})+(?![\w,])")

_OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def calculate(expression: str) -> str:
    """Value of an arithmetic expression or of `'text'.count('part')`, as text.

    Takes + - * / // % and parentheses on decimal numbers (commas between thousands are dropped), and the one string
    method `count`. The arithmetic is exact, in fractions. Results print as integers or terminating decimals in full;
    others, such as 1/3, are rounded to 10 digits, but never to fewer than 2 decimals.

    Raises:
        ValueError: one line that says what is wrong (too long, not allowed, division by zero, too large).
    """
    if not isinstance(expression, str):
        raise ValueError("the expression must be text")
    text = expression.strip()
    if len(text) > MAX_CHARS:
        raise ValueError(f"expression longer than {MAX_CHARS} characters")
    if "'" not in text and '"' not in text:
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    if not (text.isprintable() and _CHARACTERS.fullmatch(text)):  # the parser would print warnings
        raise ValueError(_ALLOWED)
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # the last two: deep nesting
        raise ValueError("not an expression") from error
    try:
        return _format(_number(tree.body, text.encode()))
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error


def python(expression: str) -> str:
    """Calculates an arithmetic expression, or how often a letter occurs in a word.

    Args:
        expression: arithmetic such as 12*(3+4), or 'castle'.count('t').

    Returns:
        The result as text.
    """
    return calculate(expression)


def _number(node: ast.expr, source: bytes) -> Fraction:
    """The exact value of a node of the expression; `source` holds the digits, which a Python float would round."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):  # type(): True is an int, too
        value = _literal(source[node.col_offset : node.end_col_offset].decode())
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_number(node.left, source), _number(node.right, source))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _number(node.operand, source) * (1 if isinstance(node.op, ast.UAdd) else -1)
    elif isinstance(node, ast.Call):
        value = _count(node)
    else:
        raise ValueError(_ALLOWED)
    if not -MAX_VALUE <= value <= MAX_VALUE:
        raise ValueError("number too large")
    return Fraction(value)  # // gives an int


def _literal(digits: str) -> Fraction:
    try:
        value = Decimal(digits)
    except InvalidOperation:  # an exponent beyond 10**18
        raise ValueError("number too large") from None
    # Bounded before it becomes a fraction: 1e-999999999 would have a denominator of a billion digits.
    if value and not -MAX_EXPONENT <= value.adjusted() <= MAX_EXPONENT:
        raise ValueError(f"number too {'large' if value.adjusted() > 0 else 'small'}")
    return Fraction(value) if value else Fraction(0)


def _format(value: Fraction) -> str:
    """In full if the decimal fraction terminates, else rounded; below 0.0001 in Python's exponent notation."""
    if value.denominator == 1:
        return str(value.numerator)
    whole = len(str(abs(int(value)))) if abs(value) >= 1 else 0
    for digits in (MAX_DIGITS, max(10, whole + 2)):
        context = Context(prec=digits)
        result = context.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize(context)
        if not context.flags[Inexact]:
            break
    if result.adjusted() >= -4:
        return f"{result:f}"
    mantissa, exponent = f"{result:e}".split("e")
    return f"{mantissa}e-{-int(exponent):02d}"


def _count(node: ast.Call) -> int:
    match node:
        case ast.Call(ast.Attribute(ast.Constant(str(text)), "count"), [ast.Constant(str(part))], []):
            return text.count(part)
    raise ValueError("the only call allowed is 'text'.count('part')")
