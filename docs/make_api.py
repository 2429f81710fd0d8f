"""Writes docs/api.md, the reference of the public API, from docstrings: `python docs/make_api.py`."""

import ast
import importlib.util
import re
from pathlib import Path

FILE = Path(__file__).with_name("api.md")
HEAD = """# Python API

<!-- Written by docs/make_api.py from the docstrings: change those, and run it again. -->

`import llava_jax` has no side effects and takes milliseconds; JAX is imported when the first function is used. Every
mistake that a caller can mend raises `llava_jax.UserError`, whose message is one line that says what, where and what to
do. Names that are not on this page may change. `llava_jax.__version__` is the version.
"""
PAGES = {  # module: its public names, in order
    "llava_jax.api": ["load", "Model", "Prompt", "Turn", "ImageInput", "SamplingOptions"],
    "llava_jax.recipes": ["get_config"],
    "llava_jax.training.run": ["train"],
    "llava_jax.preflight": ["preflight"],
    "llava_jax.preflight.report": ["Report"],
    "llava_jax.cli": ["UserError"],
}
SECTION = re.compile(r"(Args|Attributes|Returns|Raises):")


def text() -> str:
    """What docs/api.md says."""
    parts = [HEAD]
    for module, names in PAGES.items():
        source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        for name in names:
            parts += _entry(name, source)
    return "\n".join(parts)


def _entry(name: str, source: str) -> list[str]:
    """The heading, signature and docstring of a function, a class with its methods, or a type that is explained."""
    body = ast.parse(source).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return [f"## llava_jax.{name}\n", _signature(node), _markdown(ast.get_docstring(node))]
        if isinstance(node, ast.ClassDef) and node.name == name:
            parts = [f"## {_place(name)}\n", _markdown(ast.get_docstring(node))]
            return parts + _fields(node, source) + _methods(name, node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return [f"## {name}\n", f"```python\n{ast.unparse(node)}\n```\n", _markdown(ast.literal_eval(after.value))]
    raise LookupError(name)


def _place(name: str) -> str:
    return f"llava_jax.{name}" if name in ("Model", "UserError") else name


def _fields(node: ast.ClassDef, source: str) -> list[str]:
    """The fields of a dataclass as they are written, with their comments."""
    lines = [field.lineno for field in node.body if isinstance(field, ast.AnnAssign)]
    if not node.decorator_list or not lines:
        return []
    written = (line.strip() for line in source.splitlines()[lines[0] - 1 : lines[-1]])
    return ["```python\n" + "\n".join(written) + "\n```\n"]


def _methods(owner: str, node: ast.ClassDef) -> list[str]:
    parts = []
    for method in node.body:
        documented = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
        if documented and ast.get_docstring(method):  # overloads have none
            parts += [f"### {owner}.{method.name}\n", _signature(method), _markdown(ast.get_docstring(method))]
    return parts


def _signature(node: ast.FunctionDef) -> str:
    arguments, returns = _arguments(node.args), ast.unparse(node.returns).strip("'")
    line = f"{node.name}({', '.join(arguments)}) -> {returns}"
    if len(line) > 100:
        line = f"{node.name}(\n" + "".join(f"    {each},\n" for each in arguments) + f") -> {returns}"
    return f"```python\n{line}\n```\n"


def _arguments(tree: ast.arguments) -> list[str]:
    """The arguments of a function, as they are written."""

    def written(argument: ast.arg, default: ast.expr | None) -> str:
        annotation = ast.unparse(argument.annotation).strip("'") if argument.annotation else ""
        typed = f"{argument.arg}: {annotation}" if annotation else argument.arg
        return typed + (f" = {ast.unparse(default)}" if default else "")

    defaults = [None] * (len(tree.args) - len(tree.defaults)) + tree.defaults
    found = [written(*pair) for pair in zip(tree.args, defaults, strict=True) if pair[0].arg != "self"]
    found += ["*"] if tree.kwonlyargs else []
    found += [written(*pair) for pair in zip(tree.kwonlyargs, tree.kw_defaults, strict=True)]
    return found + ([f"**{ast.unparse(tree.kwarg)}"] if tree.kwarg else [])


def _markdown(docstring: str) -> str:
    """A docstring, with its sections as lists."""
    lines, section = [], None
    for line in docstring.splitlines():
        if found := SECTION.fullmatch(line):
            section = found[1]
            lines.append(f"**{section}**\n")
        elif section and (item := re.fullmatch(r"  ([*\w]+): (.*)", line)) and section != "Returns":
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif section and line.startswith("  "):
            lines.append(line if section != "Returns" else line.strip())
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
