"""The history: which instants there are, any of them as a disk, and in what two of them differ.

    view        read any byte of a disk as of an instant; `chunkcache` and `pending` are its parts
    diff        the chunks, and the blocks inside them, in which two instants differ
    catalogue   which points there are, fast; a cache
    when        from what a person types to a point
    retention   which points to keep

`view` and `diff` feed everything that restores. Modules are imported by name.
"""

__all__: list[str] = []
