from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from manyeyes.engines.base import threads_per_worker
from manyeyes.errors import BundleError, MissingExtraError
from manyeyes.recognition import selection
from manyeyes.recognition.backends import create_backend
from manyeyes.recognition.bundle import MODEL_NAME, Bundle
from manyeyes.recognition.predictor import Predictor
from manyeyes.recognition.selection import Timing, choose, cpu_name, measure_backends, to_dicts


@pytest.fixture(autouse=True)
def nothing_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_chosen", {})


def _timings(milliseconds: dict[tuple[str, int], float], precision: str = "float32", cpu: str = "") -> list[Timing]:
    return [
        Timing(backend, precision, threads, batch_size, 1e-3 * batch_size * each, cpu or cpu_name())
        for (backend, threads), each in milliseconds.items()
        for batch_size in selection.BATCH_SIZES
    ]


def test_the_faster_backend_is_chosen_and_the_reason_names_both() -> None:
    choice = choose(_timings({("openvino", 2): 9, ("onnxruntime", 2): 12, ("openvino", 1): 15}))
    assert (choice.backend, choice.num_threads) == ("openvino", 2)
    assert "9 ms an image on 2 threads" in choice.why
    assert "onnxruntime on 2 12" in choice.why


def test_a_model_that_is_fast_on_one_thread_gets_one_and_a_slow_one_all() -> None:
    for scale, threads in ((0.1, 1), (10, 4)):
        assert choose(_timings({("openvino", 1): scale, ("openvino", 4): scale / 3})).num_threads == threads


def test_a_backend_that_lacks_the_precision_of_the_bundle_is_not_chosen_though_it_be_faster() -> None:
    timings = _timings({("openvino", 2): 9}, "bfloat16") + _timings({("onnxruntime", 2): 5}, "float32")
    assert choose(timings).backend == "openvino"


def test_both_the_lone_image_and_the_batch_count() -> None:
    def of(name: str, alone: float, batch: float) -> list[Timing]:
        return [Timing(name, "float32", 1, 1, alone, "x"), Timing(name, "float32", 1, 8, 8 * batch, "x")]

    assert choose(of("openvino", 0.010, 0.010) + of("onnxruntime", 0.008, 0.011)).backend == "onnxruntime"
    assert choose(of("openvino", 0.010, 0.004) + of("onnxruntime", 0.008, 0.011)).backend == "openvino"


def test_what_export_measured_on_such_a_cpu_decides_and_nothing_is_measured_again(
    forged: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threads_per_worker()
    monkeypatch.setattr(selection, "time_backend", lambda *_: pytest.fail("measured again"))
    for fast, slow in itertools.permutations(("openvino", "onnxruntime")):
        uri = forged(timings=to_dicts(_timings({(fast, threads): 5, (slow, threads): 6})), name=fast)
        predictor = Predictor.load(uri)
        assert predictor.backend.name == fast
        assert "export measured it on such a CPU" in predictor.why


def test_on_another_cpu_it_is_measured_once_in_a_process(
    forged: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    real = selection.time_backend
    monkeypatch.setattr(
        selection, "time_backend", lambda backend, shape: measured.append(backend.name) or real(backend, shape)
    )
    # Such figures would be believed if they were of this machine.
    uri = forged(timings=to_dicts(_timings({("onnxruntime", threads_per_worker()): 1e-3}, cpu="Another CPU")))
    first = Predictor.load(uri)
    assert set(measured) == {"openvino", "onnxruntime"}
    measured.clear()
    second = Predictor.load(uri)
    assert measured == []
    assert (second.backend.name, second.backend.num_threads) == (first.backend.name, first.backend.num_threads)
    assert "ms an image" in second.why == first.why


def test_measuring_a_small_model_takes_well_below_a_second(forged: Callable[..., str]) -> None:
    uri = forged(timings=())
    Predictor.load(uri)  # both libraries are loaded now
    selection._chosen.clear()
    started = time.process_time()
    Predictor.load(uri)
    # Processor time, on at most two threads each, because other tests run meanwhile.
    assert time.process_time() - started < 2


def test_the_workers_of_a_job_choose_without_looking_at_their_machine(
    forged: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "time_backend", lambda *_: pytest.fail("measured"))
    elsewhere = to_dicts(_timings({("onnxruntime", 64): 1, ("openvino", 64): 2}, cpu="Another CPU"))
    assert Predictor.load(forged(timings=elsewhere), num_threads=1, measure=False).backend.name == "onnxruntime"
    assert Predictor.load(forged(timings=()), num_threads=1, measure=False).backend.name == "openvino"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert Predictor.load(forged(timings=elsewhere), measure=False).backend.name == "openvino"


def test_a_recorded_backend_that_is_not_installed_gives_way_to_one_that_is(
    forged: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    uri = forged(timings=to_dicts(_timings({("openvino", threads_per_worker()): 1, ("onnxruntime", 1): 2})))
    assert Predictor.load(uri).backend.name == "onnxruntime"
    with pytest.raises(MissingExtraError):
        Predictor.load(uri, "openvino")


def test_timings_do_not_change_the_version_of_a_bundle_and_nonsense_in_them_is_refused(
    forged: Callable[..., str], small_bundle: str
) -> None:
    info = Bundle.load(small_bundle).info
    uri = forged(timings=to_dicts(_timings({("openvino", 1): 3})))
    assert Bundle.load(uri).info.fingerprint == info.fingerprint
    with pytest.raises(BundleError, match="timings can't be read"):
        Predictor.load(forged(timings=({"backend": "openvino"},)))


def test_every_backend_is_measured_alone_and_in_a_batch_on_one_thread_and_on_all(small_bundle: str) -> None:
    bundle = Bundle.load(small_bundle)
    timings = measure_backends(
        bundle.read_file(MODEL_NAME), backend="auto", precision="float32", shape=bundle.info.input_shape
    )
    found = {(timing.backend, timing.num_threads, timing.batch_size) for timing in timings}
    assert found == set(itertools.product(("openvino", "onnxruntime"), {1, threads_per_worker()}, (1, 8)))
    assert all(0 < timing.seconds < 1 and timing.cpu == cpu_name() for timing in timings)


def test_the_latency_curve_rises_by_doubling_and_stops_at_its_budget(small_bundle: str) -> None:
    predictor = Predictor.load(small_bundle)
    curve = predictor.latency_curve(max_batch_size=32)
    assert [batch_size for batch_size, _ in curve] == [1, 2, 4, 8, 16, 32]
    assert all(seconds > 0 for _, seconds in curve)
    assert [batch_size for batch_size, _ in predictor.latency_curve(max_seconds=1e-9)] == [1]


class _Counting:
    """A backend that remembers the batches that it was given."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.sizes: list[int] = []

    def run(self, images: np.ndarray) -> np.ndarray:
        self.sizes.append(len(images))
        return self.backend.run(images)


def test_the_curve_and_the_warm_up_have_run_every_size_that_they_name(small_bundle: str) -> None:
    predictor = Predictor.load(small_bundle)
    counting = predictor.backend = _Counting(predictor.backend)  # type: ignore[assignment]
    predictor.latency_curve(max_batch_size=4)
    assert set(counting.sizes) == {1, 2, 4}
    counting.sizes.clear()
    predictor.warm_up(range(1, 6))
    assert counting.sizes == [1, 2, 3, 4, 5]


def test_the_logits_of_one_call_are_not_changed_by_the_next(small_bundle: str) -> None:
    bundle = Bundle.load(small_bundle)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 1, *bundle.info.input_shape), dtype=np.uint8)
    for name in ("openvino", "onnxruntime"):
        backend = create_backend(bundle.read_file(MODEL_NAME), backend=name)  # type: ignore[arg-type]
        first = backend.run(pixels[0])
        kept = first.copy()
        backend.run(pixels[1])
        np.testing.assert_array_equal(first, kept)
