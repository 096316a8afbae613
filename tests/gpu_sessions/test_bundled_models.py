"""Every model of the bundle (tools/gpu/bundle.py) on a GPU, against the CPU's session.

The CPU's session computes on the same machine. It is compared with a float64 reference wherever
Keras is (test_session.py), so the bundle needs no outputs.
"""

import numpy as np
import pytest

import bundle
from continual_transformers_tf.session import Session
from moves import moved_to_the_cpu_and_back
from session_benchmark import launches
from streamed import Streamed, by_streams, check

CASES = bundle.read_cases()
# One case of each kind of attention: compute-sanitizer is slow.
SMALL = ("co_si_gate", "co_re_gate", "demo", "tokens", "two_inputs")
LARGE = {
    "three_layers": (1, 16, 17, 64, 256, 4096),
    "co_oad_tr_b1": (1, 17),
    "long_window": (1, 17),
    "retroactive_64": (1, 17),
    "retroactive_512": (1,),
}
pytestmark = pytest.mark.skipif(not CASES, reason=str(bundle.why_unusable()))


def marked(name):
    return pytest.param(name, marks=pytest.mark.sanitizer) if name in SMALL else name


MARKED = [marked(name) for name in CASES]


@pytest.mark.parametrize("name", MARKED)
def test_every_bundled_model(random, device, name):
    check_model(random, device, name)


@pytest.mark.sampled(4, rest="slow")
@pytest.mark.parametrize("name", MARKED)
def test_bundled_models_in_persistent_kernels(random, device, name):
    with launches(persist=True):
        check_model(random, device, name)


def check_model(random, device, name):
    case = CASES[name]
    session = Session.load(bundle.model_file(name), device=device)
    on_cpu = Session.load(bundle.model_file(name))
    inputs = case.inputs(session.inputs, random, (3, 2 * case.window + 8))
    ids, there = session.open(5)[[3, 0, 4]], on_cpu.open(5)[[3, 0, 4]]
    expected = by_streams(Streamed(on_cpu), inputs, there)
    bound = 2 * case.bound  # Each of the two is allowed its own error.
    check(by_streams(Streamed(session), inputs, ids), expected, bound)
    moved_to_the_cpu_and_back(session, on_cpu, ids, [x[:, 0] for x in inputs], bound)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "streams"), [(n, m) for n in LARGE for m in LARGE[n]])
@pytest.mark.usefixtures("persist")
def test_large_models(random, device, request, tmp_path, name, streams):
    """The benchmark's models, at its numbers of streams, with random weights."""
    if "emulated" in request.node.name and (name != "three_layers" or streams > 64):
        pytest.skip("it takes the emulator minutes")
    path = bundle.fill(bundle.plan_file(name), tmp_path / "model.safetensors")
    session, on_cpu = Session.load(path, device=device), Session.load(path, threads=8)
    ids, there = session.open(streams), on_cpu.open(streams)
    (spec,) = session.inputs
    for _ in range(3):
        x = random.standard_normal((streams, *spec.shape)).astype(spec.dtype)
        y, expected = session.step(x, streams=ids), on_cpu.step(x, streams=there)
        assert np.isfinite(y).all()
        check([y], [expected], 1e-4)
