"""The results of session_benchmark.py as a table. It needs nothing but Python."""

COLUMNS = ("bound", "device_arrays", "no_overlap", "numpy_arrays", "cpu", "torch_graph")


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


def table(found):
    """Return the table's lines."""
    return [*heading(found), *map(line, found["entries"])]
