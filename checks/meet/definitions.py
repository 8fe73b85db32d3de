"""Which statements of a file define something, and which do work: train, read data, parse arguments.

A file that does work when it is imported is not run as a whole, only its definitions are. Imports that fail bind
placeholders (stubs.py), unless the file itself handles the error.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


STUB = "__checks_stub__"  # the name by which a module's own imports call for placeholders

# Calls that are work, by the last part of their name: they train, read data, need arguments or a network.
WORK = _words(
    "open backward step zero_grad train fit parse_args parse_known_args load read_csv read_text load_dataset "
    "from_pretrained download urlopen urlretrieve get_encoding init_process_group generate main run evaluate cuda "
    "set_device sample input system mkdir makedirs to exec eval wait show savefig SentencePieceProcessor"
)
PURE_BUILTINS = _words(
    "len sorted set list dict tuple range int float str bool min max sum zip enumerate map filter abs round frozenset "
    "isinstance getattr hasattr type callable repr ord chr any all reversed namedtuple TypeVar NewType partial Path "
    "dataclass field defaultdict OrderedDict SimpleNamespace device"
)
PURE_ROOTS = _words("torch math np numpy typing functools collections logging os F nn enum dataclasses re")
PURE_METHODS = _words("items keys values copy join split strip format get lower upper index count")
IMPURE_METHODS = WORK | _words(
    "compile popen remove unlink listdir walk rename set_default_tensor_type set_default_dtype "
    "set_num_threads memmap fromfile loadtxt genfromtxt rand randn randint Generator empty_cache"
)
IMPURE_PARTS = _words("hub distributed dist multiprocessing")


def is_script(tree: ast.Module) -> bool:
    """Whether importing the file does work: trains, reads data, parses arguments, opens connections."""
    left = {id(node) for node in definitions(tree).body}
    works = _working_functions(tree)
    return any(
        _last(call.func) in WORK or (isinstance(call.func, ast.Name) and call.func.id in works)
        for statement in tree.body
        if id(statement) not in left and not is_main_guard(statement)
        for call in _calls(statement)
    )


def definitions(tree: ast.Module, wanted: Iterable[str] = ()) -> ast.Module:
    """Imports, classes, functions and assignments that do no work, and what the `wanted` names need."""
    keep = _Keep(tree)
    names = _slice(tree, set(wanted))
    body = [kept for statement in tree.body if (kept := keep.of(statement, names)) is not None]
    return ast.Module(body, tree.type_ignores)


def dropped(tree: ast.Module, kept: ast.Module) -> list[int]:
    """Lines of the statements that were not kept."""
    left = {id(node) for node in kept.body}
    said = (s for s in tree.body if not isinstance(s, ast.If | ast.Pass) and not is_main_guard(s))
    return [statement.lineno for statement in said if id(statement) not in left]


class _Keep:
    """Decides for each statement whether it defines something (kept) or does work (dropped)."""

    def __init__(self, tree: ast.Module) -> None:
        self.idle = {node.name for node in _functions(tree)} - _working_functions(tree)
        self.plain_classes = {
            node.name for node in tree.body
            if isinstance(node, ast.ClassDef) and not any("Module" in ast.unparse(base) for base in node.bases)
        }  # fmt: skip

    def of(self, node: ast.stmt, names: set[str]) -> ast.stmt | None:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return node
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            mine = names.intersection(_targets(node))
            return node if mine or node.value is None or self.pure(node.value) else None
        if isinstance(node, ast.Expr):
            return node if isinstance(node.value, ast.Constant) or self.configures(node.value) else None
        if isinstance(node, ast.If) and not is_main_guard(node) and self.pure(node.test):
            body, other = self.all(node.body, names), self.all(node.orelse, names)
            return ast.copy_location(ast.If(node.test, body or [_pass(node)], other), node) if body or other else None
        if isinstance(node, ast.Try):
            return self.attempt(node, names)
        return None

    def all(self, body: list[ast.stmt], names: set[str]) -> list[ast.stmt]:
        return [kept for statement in body if (kept := self.of(statement, names)) is not None]

    def attempt(self, node: ast.Try, names: set[str]) -> ast.stmt | None:
        body = self.all(node.body, names)
        if not body:
            return None
        handlers = [
            ast.copy_location(ast.ExceptHandler(h.type, h.name, self.all(h.body, names) or [_pass(h)]), h)
            for h in node.handlers
        ]
        if not handlers:
            return ast.copy_location(ast.If(ast.copy_location(ast.Constant(True), node), body, []), node)
        return ast.copy_location(ast.Try(body, handlers, self.all(node.orelse, names), []), node)

    def pure(self, value: ast.expr) -> bool:
        return all(self.harmless(call) for call in _calls(value))

    def harmless(self, call: ast.Call) -> bool:
        name, root = _last(call.func), _root(call.func)
        if isinstance(call.func, ast.Name):
            return name in PURE_BUILTINS or name in self.plain_classes or name in self.idle
        chain = set(ast.unparse(call.func).split(".")) if isinstance(call.func, ast.Attribute) else set()
        if root in PURE_ROOTS:
            return name not in IMPURE_METHODS and not chain & IMPURE_PARTS
        return name in PURE_METHODS or root in self.plain_classes

    def configures(self, value: ast.expr) -> bool:
        """`sys.path.append(…)`, `CONFIG.update(…)`."""
        if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
            return False
        if ast.unparse(value.func) in ("sys.path.append", "sys.path.insert"):
            return True
        arguments = [*value.args, *(k.value for k in value.keywords)]
        named = isinstance(value.func.value, ast.Name)
        return named and value.func.attr == "update" and all(self.pure(argument) for argument in arguments)


def pure(value: ast.expr) -> bool:
    """Whether evaluating the expression has no effect but its value."""
    return _Keep(ast.Module([], [])).pure(value)


def _slice(tree: ast.Module, wanted: set[str]) -> set[str]:
    """The wanted names, and the names that their values are computed from."""
    found: set[str] = set()
    while wanted - found:
        found |= wanted
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and found.intersection(_targets(node)) and node.value:
                wanted |= {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
    return found


def _targets(node: ast.stmt) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # type: ignore[attr-defined]
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def _working_functions(tree: ast.Module) -> set[str]:
    """Functions of the file that do work, themselves or through other functions of the file."""
    called = {
        node.name: {_last(call.func) for statement in node.body for call in _calls(statement)}
        for node in _functions(tree)
    }  # fmt: skip
    works = {name for name, inside in called.items() if inside & WORK}
    while more := {name for name, inside in called.items() if inside & works} - works:
        works |= more
    return works


def _functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    """Calls made when the node itself runs: not those inside functions and lambdas."""
    if isinstance(node, ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _calls(child)


def _last(func: ast.expr) -> str:
    return func.id if isinstance(func, ast.Name) else func.attr if isinstance(func, ast.Attribute) else ""


def _root(func: ast.expr) -> str:
    while isinstance(func, ast.Attribute):
        func = func.value
    return func.id if isinstance(func, ast.Name) else ""


def _pass(node: ast.stmt | ast.ExceptHandler) -> ast.stmt:
    return ast.copy_location(ast.Pass(), node)


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}


class SoftImports(ast.NodeTransformer):
    """Makes every import that the file does not guard itself bind a placeholder if it fails."""

    def visit_Import(self, node: ast.Import) -> ast.stmt:
        asked = [(a.name, "", a.asname or a.name.partition(".")[0]) for a in node.names]
        return self._soft(node, asked)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        if node.module == "__future__" or node.names[0].name == "*":
            return node
        module = "." * node.level + (node.module or "")
        return self._soft(node, [(module, a.name, a.asname or a.name) for a in node.names])

    def visit_Try(self, node: ast.Try) -> ast.stmt:
        if not any(_catches_imports(handler) for handler in node.handlers):
            return self.generic_visit(node)  # type: ignore[return-value]
        for part in (*node.handlers, *node.orelse, *node.finalbody):
            self.visit(part)
        return node

    def _soft(self, node: ast.Import | ast.ImportFrom, asked: list[tuple[str, str, str]]) -> ast.stmt:
        bound: list[ast.expr] = [ast.Name(name, ast.Store()) for *_, name in asked]
        call = ast.Call(
            ast.Name(STUB, ast.Load()),
            [ast.Constant(tuple(asked)),  # type: ignore[arg-type]
             ast.Name("_checks_error_", ast.Load())], [],
        )  # fmt: skip
        stand_in = ast.Assign([ast.Tuple(bound, ast.Store())], call)
        handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), "_checks_error_", [stand_in])
        soft = ast.Try([node], [handler], [], [])
        for part in ast.walk(soft):
            if part is not node and not hasattr(part, "lineno"):
                ast.copy_location(part, node)
        return soft


def _catches_imports(handler: ast.ExceptHandler) -> bool:
    named = ast.unparse(handler.type) if handler.type else "Exception"
    return any(name in named for name in ("ImportError", "ModuleNotFoundError", "Exception"))
