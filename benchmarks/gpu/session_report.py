"""The results of session_benchmark.py as a table. It needs nothing but Python."""

COLUMNS = ("bound", "device_arrays", "no_overlap", "numpy_arrays", "cpu", "torch_graph")
# The most microseconds of a step of one stream, with device arrays.
GOALS = {"co_oad_tr_b1": 12.0, "three_layers": 15.0}
# How many times as long PyTorch's recomputing step takes for one retroactive layer.
RETROACTIVE_GOAL = 5.0


def heading(found):
    """Return the lines above the table."""
    gpu, rate = found["machine"]["gpu"], found["copy_bytes_per_second"]
    columns = " ".join(f"{name:>14}" for name in COLUMNS)
    return [
        f"{gpu}: a copy moves {rate / 1e12:.3f} TB/s",
        f"{'µs a step':24} {columns} {'x bound':>9}",
    ]


def line(entry):
    """Return an entry as a line of the table. A dash: not measured."""
    name = f"{entry['size']['name']:16} M={entry['streams']:<5}"
    if "bound" not in entry:
        return f"{name} {entry.get('skipped', 'not measured')}"
    cells = [f"{entry['bound']:>14,.2f}"]
    for column in COLUMNS[1:]:
        cells.append(f"{entry[column]['median']:>14,.2f}" if column in entry else " " * 13 + "-")
    if "device_arrays" in entry:
        cells.append(f"{entry['device_arrays']['median'] / entry['bound']:>9.1f}")
    return " ".join([name, *cells, *filter(None, [entry.get("skipped")])])


def persistent_line(entry):
    """Return an entry of persistent kernels as a line."""
    persistent, graph = (entry[name]["median"] for name in ("persistent", "device_arrays"))
    return (
        f"{entry['size']['name']} M=1: {persistent:,.2f} µs in persistent kernels, {graph:,.2f} as "
        f"a graph of launches, {graph / persistent:.2f} ×, bound {entry['bound']:,.2f}"
    )


def has_goal(entry):
    """Return whether it was measured and there is a goal for it."""
    size = entry["size"]
    named = size["name"] in GOALS or size["kind"] == "retroactive"
    return named and entry["streams"] == 1 and "torch_graph" in entry


def last_lines(found):
    """Return the lines below the table: the steps that torch.compile made, and the goals."""
    lines = []
    for entry in found["entries"]:
        name = f"{entry['size']['name']} M={entry['streams']}"
        if "torch_compiled" in entry:
            us = entry["torch_compiled"]["median"]
            lines.append(f"{name}: {us:,.2f} µs by torch.compile, in a CUDA graph")
        if "torch_compiled_failed" in entry:
            lines.append(f"{name}: torch.compile failed: {entry['torch_compiled_failed']}")
    return lines + [_goal(entry) for entry in found["entries"] if has_goal(entry)]


def _goal(entry):
    name, us = entry["size"]["name"], entry["device_arrays"]["median"]
    if name in GOALS:
        reached = us <= GOALS[name]
        text = f"{us:.2f} µs, goal ≤ {GOALS[name]:g}"
    else:
        times = entry["torch_graph"]["median"] / us
        reached = times >= RETROACTIVE_GOAL
        text = f"{times:.2f} × as fast as PyTorch, goal ≥ {RETROACTIVE_GOAL:g}"
    return f"{name}: {text}: {'reached' if reached else 'NOT REACHED'}"


def table(found):
    """Return all lines."""
    return [*heading(found), *map(line, found["entries"]), *last_lines(found)]
