"""The words of a kernel's command line, as the kernel splits them: a word may have spaces in double quotes.

Whoever splits one at every space takes a part of somebody's value for a word: a `root=` in it, or an `initrd=`.
Source: Linux, lib/cmdline.c (`next_arg`).
"""

from __future__ import annotations

import re

__all__ = ["one_word", "words_of"]


def words_of(line: str) -> list[str]:
    """With their quotes. A quote that is not closed ends with the line."""
    return re.findall(r'(?:[^\s"]|"[^"]*"?)+', line)


def one_word(text: str) -> str:
    """A text as one word; quotes that are in it are left out, since nothing could keep them apart from those around."""
    bare = text.replace('"', "")
    return f'"{bare}"' if re.search(r"\s", bare) else bare
