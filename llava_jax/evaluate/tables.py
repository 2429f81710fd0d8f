"""Tables of text."""

from collections.abc import Sequence

from llava_jax.cli import columns


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The rows in columns, of which the first `left` are aligned to the left and the others to the right. Columns that
    do not fit the terminal follow below, beside the first ones again."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    room = (columns() or sum(widths) + 2 * len(widths)) - sum(widths[:left]) - 2 * left + 2
    fitting = [fit for fit in range(left + 1, len(widths) + 1) if sum(widths[left:fit]) + 2 * (fit - left) <= room]
    if fitting and fitting[-1] < len(widths):
        parts = [row[: fitting[-1]] for row in rows], [[*row[:left], *row[fitting[-1] :]] for row in rows]
        return "\n\n".join(aligned(part, left) for part in parts)
    return "\n".join(
        "  ".join(cell.ljust(width) if column < left else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )  # fmt: skip
