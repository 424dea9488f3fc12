"""The figures as a table to read."""

from __future__ import annotations

from typing import Any

HEAD = ("work", "rule", "inner", "peer", "fomal ms", "peer ms", "peer / fomal", "GFLOP/s", "of peak", "tasks/s")


def table(result: dict[str, Any]) -> str:
    """Rows that were timed, then what was not and why."""
    machine = result["machine"]
    products, copied = machine["matrix_product_flops"] / 1e9, machine["copy_bytes_per_second"] / 1e9
    lines = [
        f"{machine['device']}, {machine['threads']} threads: matrix products {products:.1f} GFLOP/s, "
        f"copy {copied:.1f} GB/s; {result['rounds']} rounds, median (range)",
        "; ".join(f"{name} {version}" for name, version in result["versions"].items()),
        *aligned([HEAD, *(cells(row) for row in result["rows"] if row["status"] == "timed")]),
    ]
    lines += [f"absent: {name}: {reason}" for name, reason in result["absent"].items()]
    for row in result["rows"]:
        if row["status"] not in ("timed", "absent"):
            apart = ", ".join(f"{value:.1e} in {dtype}" for dtype, value in row.get("difference", {}).items())
            lines.append(
                f"{row['status']}: {row['work']}, {row['rule']}, {row['peer']}: {row['reason']}"
                + (f" ({apart} apart)" if apart else "")
            )
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    return (
        *(row[name] for name in ("work", "rule", "optimizer", "peer")),
        ranged(row["fomal_seconds"], 1e3),
        ranged(row["peer_seconds"], 1e3),
        ranged(row["peer_over_fomal"], 1),
        f"{row['fomal_flops'] / 1e9:.1f}",
        f"{row['fomal_share_of_peak']:.0%}",
        f"{row['fomal_tasks_per_second']:.0f}",
    )


def ranged(values: dict[str, float], scale: float) -> str:
    """Median and range, to three digits."""
    median, low, high = (digits(values[name] * scale) for name in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def digits(value: float) -> str:
    """Three digits, or as many as there are before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
