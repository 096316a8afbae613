"""The report of the GPU benchmark: goals, tables, a picture."""

from collections import defaultdict

from gpu_sizes import GOAL_SIZES, AttentionSize, LayerSize, RetroactiveSize

# The goals: the share of a copy's bandwidth, for rings of at least BANDWIDTH_FROM times L2; the
# microseconds of a step of one stream, for windows of up to LATENCY_TO, and of GOAL_SIZES; how many
# times as fast as SDPA, for all sizes and for one stream.
BANDWIDTH_GOAL, BANDWIDTH_FROM = 0.9, 10
LATENCY_GOAL, LATENCY_TO = 5.0, 512
SDPA_GOAL, SDPA_GOAL_OF_ONE = 1.0, 2.0


def attention_rows(found):
    """Return the measured sizes: (AttentionSize, entry)."""
    return [
        (AttentionSize(**entry["size"]), entry)
        for entry in found["attention"]
        if "skipped" not in entry
    ]


def layer_rows(found):
    return [
        (LayerSize(**entry["size"]), entry) for entry in found["layer"] if "skipped" not in entry
    ]


def bytes_per_second(size, entry):
    return size.bytes / (entry["ours"]["out_of_l2"]["median"] * 1e-6)


def share_of_copy(found, size, entry):
    return bytes_per_second(size, entry) / found["copy"]["bytes_per_second"]


def times_sdpa(entry):
    """Return how many times as fast as SDPA the kernel is, on rings out of L2.

    The rival is the faster of SDPA with and without a graph.
    """
    rival = min(figures["median"] for figures in entry["sdpa"].values())
    return rival / entry["ours"]["out_of_l2"]["median"]


def goals(found):
    """Return each goal, with the worst and the median of the measurements.

    Returns:
        A list of dicts: goal, bound, worst, middle, where (the size of the worst), of (how many
        sizes), reached (None if no size was measured).
    """
    rows = [(size, entry) for size, entry in attention_rows(found) if size.dtype != "float64"]
    far = BANDWIDTH_FROM * found["machine"]["l2_bytes"]
    of_one = [row for row in rows if row[0].streams == 1]

    def latency(row):
        return row[1]["ours"]["out_of_l2"]["median"]

    def ratio(row):
        return times_sdpa(row[1])

    return [
        _goal(
            f"share of the copy's bandwidth, rings of ≥ {BANDWIDTH_FROM} × L2",
            [row for row in rows if row[0].ring_bytes >= far],
            lambda row: share_of_copy(found, *row), BANDWIDTH_GOAL, at_least=True,
        ),
        _goal(
            f"µs a step, N ≤ {LATENCY_TO}, one stream",
            [row for row in of_one if row[0].window <= LATENCY_TO],
            latency, LATENCY_GOAL, at_least=False,
        ),
        _goal(
            f"µs a step, {' and '.join(map(str, GOAL_SIZES))}",
            [row for row in rows if row[0] in GOAL_SIZES],
            latency, LATENCY_GOAL, at_least=False,
        ),
        _goal(
            "times as fast as SDPA, anywhere", rows, ratio, SDPA_GOAL, at_least=True
        ),
        _goal(
            "times as fast as SDPA, one stream", of_one, ratio, SDPA_GOAL_OF_ONE, at_least=True
        ),
    ]  # fmt: skip


def _goal(name, rows, figure, bound, at_least):
    made = dict(goal=name, bound=bound, at_least=at_least, of=len(rows), reached=None)
    if rows:
        ordered = sorted(rows, key=figure, reverse=not at_least)
        worst = figure(ordered[0])
        made.update(
            worst=worst,
            middle=figure(ordered[len(ordered) // 2]),
            where=str(ordered[0][0]),
            reached=worst >= bound if at_least else worst <= bound,
        )
    return made


def goal_lines(found):
    """Return a sentence for each goal."""
    lines = []
    for goal in goals(found):
        sign = "≥" if goal["at_least"] else "≤"
        text = f"{goal['goal']}: goal {sign} {goal['bound']:g}, "
        if goal["reached"] is None:
            text += "not measured"
        else:
            text += (
                f"worst {goal['worst']:.3g} ({goal['where']}), middle {goal['middle']:.3g} "
                f"of {goal['of']}: {'reached' if goal['reached'] else 'NOT REACHED'}"
            )
        lines.append(text)
    return lines


ATTENTION_HEAD = (
    "size", "µs", "in L2", "overlap", "bytes / copy", "of copy",
    "SDPA graph", "SDPA", "× SDPA", "FlashInfer", "parts",
)  # fmt: skip
LAYER_HEAD = ("size", "µs", "in L2", "apart", "bytes / copy", "torch graph", "torch", "× torch")
PARTS_HEAD = ("size", "parts", "µs", "planned")
RETROACTIVE_HEAD = ("size", "update", "recompute", "bytes / copy", "SDPA graph", "× SDPA")


def table_cells(found):
    """Return the tables: (title, head, rows of text)."""
    copy = found["copy"]["bytes_per_second"]
    attention = []
    for entry in found["attention"]:
        size = AttentionSize(**entry["size"])
        if "skipped" in entry:
            attention.append([str(size), entry["skipped"]])
            continue
        ours, sdpa = entry["ours"], entry["sdpa"]
        attention.append([
            str(size), _us(ours["out_of_l2"]), _us(ours["in_l2"]), _us(ours["overlapping"]),
            f"{size.bytes / copy * 1e6:.2f}", f"{share_of_copy(found, size, entry):.0%}",
            _us(sdpa["graph"]), _us(sdpa["eager"]), f"{times_sdpa(entry):.2f}",
            _flashinfer(entry),
            str(entry["window_parts"]),
        ])  # fmt: skip
    layer = []
    for entry in found["layer"]:
        size = LayerSize(**entry["size"])
        if "skipped" in entry:
            layer.append([str(size), entry["skipped"]])
            continue
        ours, torch = entry["ours"], entry["torch"]
        rival = min(figures["median"] for figures in torch.values())
        layer.append([
            str(size), _us(ours["out_of_l2"]), _us(ours["in_l2"]), _us(ours["apart"]),
            f"{size.bytes / copy * 1e6:.2f}", _us(torch["graph"]), _us(torch["eager"]),
            f"{rival / ours['out_of_l2']['median']:.2f}",
        ])  # fmt: skip
    parts = []
    for entry in found["window_parts"]:
        size = str(AttentionSize(**entry["size"]))
        if "skipped" in entry:
            parts.append([size, entry["skipped"]])
        for one in entry.get("tried", []):
            planned = "yes" if one["parts"] == entry["planned"] else ""
            parts.append([size, str(one["parts"]), _us(one["out_of_l2"]), planned])
    retroactive = []
    for entry in found["retroactive"]:
        size = RetroactiveSize(**entry["size"])
        if "skipped" in entry:
            retroactive.append([str(size), entry["skipped"]])
            continue
        fastest = min(entry[name]["median"] for name in ("update", "recompute"))
        retroactive.append([
            str(size), _us(entry["update"]), _us(entry["recompute"]),
            f"{size.bytes / copy * 1e6:.2f}", _us(entry["sdpa"]),
            f"{entry['sdpa']['median'] / fastest:.2f}",
        ])  # fmt: skip
    return [
        ("One step of attention, µs", ATTENTION_HEAD, attention),
        ("The same with other numbers of window parts, µs", PARTS_HEAD, parts),
        ("One step of retroactive attention, µs", RETROACTIVE_HEAD, retroactive),
        ("One step of the whole layer, and with F of a whole encoder block, µs", LAYER_HEAD, layer),
    ]


def _flashinfer(entry):
    if "flashinfer_failed" in entry:
        return "failed"
    return _us(entry["flashinfer"]) if "flashinfer" in entry else ""


def _us(figures):
    median = figures["median"]
    return f"{median:.2f}" if median < 100 else f"{median:,.0f}"


def heading(found):
    machine = found["machine"]
    return [
        f"{machine['gpu']}, compute capability {machine['capability']}, "
        f"{machine['multiprocessors']} multiprocessors, "
        f"{machine['l2_bytes'] / 2**20:.0f} MiB of L2, "
        f"driver {machine['driver']}, CUDA {machine['cuda']}, torch {machine['torch']}",
        f"a large copy: {found['copy']['bytes_per_second'] / 1e12:.3f} TB/s, read and written; "
        f"an empty kernel: {found['empty_kernel']['median']:.2f} µs in a graph",
    ]


# Bytes per second of device memory, from NVIDIA's datasheets: H100 (SXM), H200.
DATASHEET = (3.35e12, 4.8e12)
PREDICTED = (
    *(AttentionSize(1, 8, window, 64, "bfloat16") for window in (64, 512, 4096, 65536)),
    *(AttentionSize(1, 8, window, 64, "float32") for window in (64, 512, 65536)),
    *(AttentionSize(64, 8, window, 64, "bfloat16") for window in (64, 4096)),
    *(AttentionSize(2048, 8, window, 64, "bfloat16") for window in (64, 1024, 16384)),
    *(LayerSize(streams, 1024, 8, 64, "float32") for streams in (1, 32)),
    *(LayerSize(streams, 1024, 8, 64, "bfloat16") for streams in (1, 32)),
    *(LayerSize(1, 1024, 8, 64, dtype, 1024) for dtype in ("float32", "bfloat16")),
)


def predictions():
    """Return rows of docs/gpu.md: a size's operations, bytes, and predicted microseconds.

    The prediction is the time that the bytes take at each bandwidth of DATASHEET.
    """
    return [
        "| "
        + " | ".join(
            [
                str(size),
                f"{size.operations / 1e6:,.2f}",
                f"{size.bytes / 1e6:,.2f}",
                *(f"{size.bytes / rate * 1e6:,.2f}" for rate in DATASHEET),
            ]
        )
        + " |"
        for size in PREDICTED
    ]


def print_tables(found):
    """Print the tables, with rich if it is installed."""
    try:
        import rich.console
        import rich.table
    except ImportError:
        print(plain(found))
        return
    console = rich.console.Console(width=150)
    for line in heading(found):
        console.print(line)
    for title, head, rows in table_cells(found):
        made = rich.table.Table(title=title)
        for i, name in enumerate(head):
            made.add_column(name, justify="right" if i else "left")
        for row in rows:
            made.add_row(*row)
        console.print(made)
    for line in goal_lines(found):
        console.print(line)


def plain(found):
    """Return the report as plain text."""
    lines = heading(found)
    for title, head, rows in table_cells(found):
        lines += ["", title]
        whole = [row for row in rows if len(row) == len(head)]
        widths = [max(map(len, column)) for column in zip(head, *whole, strict=True)]
        for row in [head, *rows]:
            cells = zip(row, widths[: len(row)], strict=True)
            lines.append("  ".join(cell.ljust(width) for cell, width in cells).rstrip())
    return "\n".join([*lines, "", *goal_lines(found)])


def draw(path, found):
    """Draw microseconds and share of copy bandwidth against the window, by streams."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(18, 6))
    curves = defaultdict(lambda: defaultdict(list))
    for size, entry in attention_rows(found):
        if size.dim == 64 and size.dtype == "bfloat16":
            curve = curves[size.streams]
            curve["window"].append(size.window)
            curve["ours"].append(entry["ours"]["out_of_l2"]["median"])
            curve["in_l2"].append(entry["ours"]["in_l2"]["median"])
            curve["sdpa"].append(entry["sdpa"]["graph"]["median"])
            curve["share"].append(share_of_copy(found, size, entry))
            curve["ratio"].append(times_sdpa(entry))
    colours = plt.get_cmap("viridis")
    for i, (streams, curve) in enumerate(sorted(curves.items())):
        style = dict(color=colours(i / max(1, len(curves) - 1)))
        axes[0].plot(curve["window"], curve["ours"], "o-", label=f"{streams} streams", **style)
        axes[0].plot(curve["window"], curve["in_l2"], ":", **style)
        axes[0].plot(curve["window"], curve["sdpa"], "x--", alpha=0.6, **style)
        axes[1].plot(curve["window"], curve["share"], "o-", **style)
        axes[2].plot(curve["window"], curve["ratio"], "o-", **style)
    axes[0].axhline(found["empty_kernel"]["median"], color="black", lw=0.8)
    axes[0].set(yscale="log", ylabel="µs a step", title="— out of L2  ··· in L2  -x- SDPA, graph")
    axes[1].axhline(BANDWIDTH_GOAL, color="black", lw=0.8)
    axes[1].set(ylabel="share of the copy's bandwidth", title="bytes a step must touch / time")
    axes[2].axhline(SDPA_GOAL, color="black", lw=0.8)
    axes[2].set(yscale="log", ylabel="times as fast as SDPA", title="against SDPA")
    for axis in axes:
        axis.set(xscale="log", xlabel="N, steps in the window (8 heads of 64, bfloat16)")
        axis.grid(alpha=0.3, which="both")
    if curves:
        axes[0].legend(frameon=False)
    figure.suptitle(heading(found)[0])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
