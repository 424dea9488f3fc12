"""The figures as a table to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

HEAD = ("work", "rule", "as", "inner", "peer", "fomal ms", "peer ms", "peer / fomal", "GFLOP/s", "of peak", "tasks/s")
PARTS: dict[str, tuple[str, ...]] = {
    "precision": ("work", "rule", "as", "apart", "bf16 ms", "32-bit ms", "32-bit / bf16", "loop / bf16"),
    "trainer": ("work", "as", "fit ms", "bare ms", "Trainer's share"),
    "replicas": ("work", "as", "replicas", "joint ms", "one ms", "joint / one", "one by one / joint"),
    "memory": ("work", "rule", "as", "5 steps MiB", "50 steps MiB"),
}
"""What has no peer, and its columns; ms are of a meta-iteration or, of evaluation and fit, of the whole."""


def table(result: dict[str, Any]) -> str:
    """Rows that were timed, then what was not and why."""
    machine = result["machine"]
    products, copied = machine["matrix_product_flops"] / 1e9, machine["copy_bytes_per_second"] / 1e9
    lines = [
        f"{machine['device']}, {machine['threads']} threads: matrix products {products:.1f} GFLOP/s, "
        f"copy {copied:.1f} GB/s; {result['rounds']} rounds, median (range)",
        "; ".join(f"{name} {version}" for name, version in result["versions"].items()),
    ]
    for part, head in {"rows": HEAD, **PARTS}.items():
        timed = [row for row in result[part] if row["status"] == "timed"]
        if timed:
            lines += ["", *aligned([head, *(CELLS[part](row) for row in timed)])]
    lines += ["", *(f"absent: {name}: {reason}" for name, reason in result["absent"].items())]
    for row in (row for part in ("rows", *PARTS) for row in result[part]):
        if row["status"] not in ("timed", "absent"):
            apart = ", ".join(f"{value:.1e} in {dtype}" for dtype, value in row.get("difference", {}).items())
            names = (str(row[name]) for name in NAMES if name in row)
            lines.append(
                f"{row['status']}: {', '.join(names)}: {row['reason']}" + (f" ({apart} apart)" if apart else "")
            )
    return "\n".join(lines).rstrip()


def named(row: dict[str, Any]) -> str:
    """What a row is of."""
    return ", ".join(str(row[name]) for name in NAMES if name in row)


NAMES = ("work", "rule", "as", "precision", "peer", "replicas", "outer_rule")


def of_pair(row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    return (
        *(row[name] for name in ("work", "rule", "as", "optimizer", "peer")),
        ranged(row["fomal_seconds"], 1e3),
        ranged(row["peer_seconds"], 1e3),
        ranged(row["peer_over_fomal"], 1),
        f"{row['fomal_flops'] / 1e9:.1f}",
        f"{row['fomal_share_of_peak']:.0%}",
        f"{row['fomal_tasks_per_second']:.0f}",
    )


def of_precision(row: dict[str, Any]) -> tuple[str, ...]:
    """Likewise."""
    return (
        *(row[name] for name in ("work", "rule", "as")),
        f"{row['difference']['bfloat16']:.1e}",
        *(ranged(row[name], 1e3) for name in ("bf16_seconds", "wide_seconds")),
        *(ranged(row[name], 1) for name in ("wide_over_bf16", "loop_over_bf16")),
    )


def of_trainer(row: dict[str, Any]) -> tuple[str, ...]:
    """Likewise; the share is of the bare loop's time."""
    share = [f"{100 * row['share'][name]:.1f} %" for name in ("median", "low", "high")]
    return (
        *(row[name] for name in ("work", "as")),
        *(ranged(row[name], 1e3) for name in ("fit_seconds", "bare_seconds")),
        f"{share[0]} ({share[1]} to {share[2]})",
    )


def of_replicas(row: dict[str, Any]) -> tuple[str, ...]:
    """Likewise."""
    return (
        *(row[name] for name in ("work", "as")),
        str(row["replicas"]),
        *(ranged(row[name], 1e3) for name in ("joint_seconds", "one_seconds")),
        *(ranged(row[name], 1) for name in ("joint_over_one", "all_over_joint")),
    )


def of_memory(row: dict[str, Any]) -> tuple[str, ...]:
    """Likewise."""
    return (
        *(row[name] for name in ("work", "outer_rule", "as")),
        *(digits(n / 2**20) for n in row["peak_bytes"].values()),
    )


CELLS: dict[str, Callable[[dict[str, Any]], tuple[str, ...]]] = {
    "rows": of_pair,
    "precision": of_precision,
    "trainer": of_trainer,
    "replicas": of_replicas,
    "memory": of_memory,
}


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
