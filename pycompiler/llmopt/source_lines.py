"""Where in the user's code a node comes from, in words for reports."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import fx


def source_line(node: fx.Node) -> str:
    """The user's source line that made this node, as `file:line: code`, "" when unknown.

    A member of an nn.Sequential has no line of its own: its path and class, as `0.2 (GELU)`, stand before the line that called the
    container. Paths are short: from the working directory, or from the package's name on.
    """
    return "  ".join(part for part in (_member(node), _nearest_line(node)) if part)


def _nearest_line(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not frames:
        return ""
    last = frames[-1]
    file, _, rest = lines[last].removeprefix('File "').partition('", line ')
    number = rest.partition(",")[0] or "?"
    code = lines[last + 1] if last + 1 < len(lines) else ""
    return f"{_short_path(file)}:{number}: {code}"


def _member(node: fx.Node) -> str:
    """`path (Class)` below the outermost container, when the innermost module is called by an nn.Sequential."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if any(not isinstance(cls, type) for _, cls in stack):  # torch.export keeps names
        return ""
    if len(stack) < 2 or not issubclass(stack[-2][1], torch.nn.Sequential):
        return ""
    paths = [path for path, _ in stack]
    first = next(i for i, (_, cls) in enumerate(stack) if issubclass(cls, torch.nn.Sequential))
    return f"{paths[-1].removeprefix(paths[first] + '.')} ({stack[-1][1].__name__})"


def _short_path(file: str) -> str:
    path = Path(file)
    longest = sorted(sys.path, key=len, reverse=True)
    # Installed packages first: their environment may lie in the working directory.
    installed = [p for p in longest if Path(p).name in ("site-packages", "dist-packages")]
    for root in (*installed, str(Path.cwd()), *longest):
        if root and path.is_relative_to(root):
            return str(path.relative_to(root))
    return file
