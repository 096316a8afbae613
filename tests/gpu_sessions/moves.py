"""A check of streams that move between sessions on a GPU and on the CPU."""

from streamed import Streamed, check


def moved_to_the_cpu_and_back(session, on_cpu, ids, step, bound):
    """Check that copies of streams continue on the CPU, and from there on the GPU again.

    Args:
        session, on_cpu: Sessions of the same model.
        ids: Streams of `session`.
        step: Arrays (M, ...), a step of these streams.
        bound: The largest allowed error, relative to the largest output.
    """
    there = on_cpu.open(len(ids))
    on_cpu.set_state(session.get_state(ids), there)
    here, there_too = Streamed(session), Streamed(on_cpu)
    check(there_too.step(step, streams=there), here.step(step, streams=ids), bound)
    back = session.open(len(ids))
    session.set_state(on_cpu.get_state(there), back)
    check(here.step(step, streams=back), there_too.step(step, streams=there), bound)
