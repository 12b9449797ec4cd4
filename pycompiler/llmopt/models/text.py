"""The text that accuracy is measured on: Python's own documentation topics, and sentences of it.

It comes with the standard library, so every installation of one Python version measures on the same text.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A text and a name that changes when it does."""

    name: str
    content: str


def documentation() -> Text:
    """The topics of Python's help() in alphabetic order: about 110,000 tokens."""
    import platform
    from pydoc_data.topics import topics

    content = "\n\n".join(topics[name] for name in sorted(topics))
    digest = hashlib.blake2b(content.encode(), digest_size=4).hexdigest()
    return Text(f"pydoc_data.topics of Python {platform.python_version()} ({digest})", content)


def paragraphs(text: Text, smallest: int = 80) -> list[str]:
    """The prose paragraphs of at least `smallest` characters, each on one line, in order, none twice."""
    parts = (re.sub(r"\s+", " ", part).strip() for part in text.content.split("\n\n"))
    return list(dict.fromkeys(p for p in parts if len(p) >= smallest and p.endswith(".")))
