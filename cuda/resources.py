"""What the kernels take of a GPU, as ptxas reported it when they were compiled, and the limits.

`python3 cuda/resources.py` compiles what has changed and prints a table. Its exit status is 1 where
a kernel is over a limit.
"""

import re
import subprocess
from collections import defaultdict
from typing import NamedTuple

import nvcc

# At the most, of any kernel on any GPU. With 128 registers four blocks of 128 threads are resident.
LIMITS = {
    "registers": 128,
    "spill_stores": 0,
    "spill_loads": 0,
    "stack": 0,
    "shared": 48 * 1024 - 1,
}
# Doubles are for checking.
LIMITS_OF_DOUBLES = {**LIMITS, "registers": 168}
WITH_DOUBLES = re.compile("(Kernel|Source)Id")
# CUDA's own sines keep a few words in memory for very large numbers. Only a model with such an
# activation, and such numbers, touches them.
LIMITS_OF_ACTIVATIONS = {**LIMITS, "stack": 64}
WITH_ACTIVATIONS = re.compile("ActivateEach|RecurrentKernel")
# Its phases are functions, which save the registers of their caller. What the kernel needs after a
# phase, it keeps on its stack. One block of 256 threads is resident.
LIMITS_OF_PERSISTENT = {
    **LIMITS, "registers": 255, "spill_stores": 128, "spill_loads": 160, "stack": 256,
}  # fmt: skip
PERSISTENT = re.compile("PersistentKernel")

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>sm_\w+)'"
    r"(?:\n.*){1,6}?\n.*Used (?P<registers>\d+) registers(?:.*?, (?P<shared>\d+) bytes smem)?"
)
# ptxas reports this for the kernel, and for each function that the kernel calls.
FUNCTION = re.compile(
    r"Function properties for .*\n *(?P<stack>\d+) bytes stack frame, "
    r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads"
)


class Resources(NamedTuple):
    """What one kernel takes on one architecture: the registers of a thread, and else bytes.

    Spills and stack are of the function that has most: of the kernel, or of one that it calls.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


def excesses(kernel, resources):
    """What a kernel takes more of than it may."""
    limits = LIMITS_OF_DOUBLES if WITH_DOUBLES.search(kernel) else LIMITS
    if WITH_ACTIVATIONS.search(kernel):
        limits = LIMITS_OF_ACTIVATIONS
    if PERSISTENT.search(kernel):
        limits = LIMITS_OF_PERSISTENT
    return [name for name, limit in limits.items() if getattr(resources, name) > limit]


def parse(log):
    """{(kernel, architecture): Resources} of what nvcc said under -Xptxas=-v."""
    found = {}
    _, *reports = re.split("(?=Compiling entry function)", log)
    for report in reports:
        kernel, functions = KERNEL.match(report), list(FUNCTION.finditer(report))
        if kernel is None or not functions:
            raise ValueError(f"Expected ptxas' report of a kernel, but got\n{report}")
        of_functions = {
            name: max(int(function[name]) for function in functions)
            for name in ("spill_stores", "spill_loads", "stack")
        }
        found[kernel["name"], kernel["architecture"]] = Resources(
            registers=int(kernel["registers"]), shared=int(kernel["shared"] or 0), **of_functions
        )
    return found


def measure(toolkit):
    """parse() of every kernel there is, compiled anew where it has changed."""
    parts = ("CUDA", "CUDA_C_API", "CUDA_SESSION")
    sources = [name for part in parts for name in nvcc.LISTS[f"{part}_SOURCES"]]
    objects = toolkit.compile_all(sources, nvcc.OBJECTS)
    return parse("".join(path.with_suffix(".log").read_text() for path in objects))


def readable(names):
    """The names as C++ has them, without namespaces and arguments."""
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    for name in said.stdout.splitlines():
        name = re.sub(r"\w+::|\(anonymous namespace\)::|^void ", "", name)
        yield re.sub(r"\(.*", "", name).replace("> >", ">>")


def main():
    try:
        found = measure(nvcc.find())
    except nvcc.Unusable as why:
        raise SystemExit(str(why)) from why
    alike = defaultdict(list)
    for (name, architecture), resources in found.items():
        alike[name, resources].append(architecture.removeprefix("sm_"))
    mangled = sorted({name for name, _ in found})
    names = dict(zip(mangled, readable(mangled), strict=True))
    table = [("kernel", "sm", "registers", "spills", "stack", "shared", "")]
    for (name, resources), architectures in alike.items():
        registers, stores, loads, stack, shared = map(str, resources)
        over = excesses(name, resources)
        table.append(
            (
                names[name],
                " ".join(sorted(architectures)),
                *(registers, f"{stores}/{loads}", stack, shared),
                f"over: {', '.join(over)}" if over else "",
            )
        )
    table[1:] = sorted(table[1:])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        aligned = [str.ljust] * 2 + [str.rjust] * 4 + [str.ljust]
        cells = [align(*cell) for align, *cell in zip(aligned, row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    over = sum(bool(excesses(name, resources)) for (name, _), resources in found.items())
    if over:
        raise SystemExit(f"{over} of {len(found)} are over their limits, {LIMITS}")


if __name__ == "__main__":
    main()
