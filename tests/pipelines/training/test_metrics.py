"""The metrics file (each step once, also across kills); time split, memory, and the peak that MFU is taken against."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.training.metrics import MetricsLog, Tail, TimeSplit, memory_bytes, peak, read_records


def write(path: Path, steps: range, resume_at: int = 0, mark: str = "first") -> None:
    log = MetricsLog(path, resume_at=resume_at)
    for step in steps:
        log.append({"step": step, "mark": mark})
    log.close()


def steps(records: list[dict[str, Any]]) -> list[int]:
    return [record["step"] for record in records]


def test_after_a_resume_each_step_is_there_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(6, 11), resume_at=5, mark="second")
    records = read_records(path)
    assert steps(records) == list(range(1, 11))
    assert [r["mark"] for r in records] == ["first"] * 5 + ["second"] * 5


def test_half_a_line_of_a_killed_writer_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert steps(read_records(path)) == [1, 2, 3]
    write(path, range(4, 5), resume_at=3)
    assert steps(read_records(path)) == [1, 2, 3, 4]


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 2.0**-1074, 6.234858989715576]
    log = MetricsLog(tmp_path / "m.jsonl", resume_at=0)
    for step, value in enumerate(values):
        log.append({"step": step, "loss": value})
    log.close()
    assert [r["loss"].hex() for r in read_records(tmp_path / "m.jsonl")] == [v.hex() for v in values]


def test_a_number_that_json_has_not_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", resume_at=0)
    with pytest.raises(ValueError, match="Out of range float"):
        log.append({"step": 1, "loss": float("nan")})
    log.close()


def test_a_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none.jsonl") == []
    assert Tail(tmp_path / "none.jsonl").new_records() == []


def test_a_follower_sees_each_record_as_it_appears(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "m.jsonl")
    log = MetricsLog(tmp_path / "m.jsonl", resume_at=0)
    log.append({"step": 1})
    assert steps(tail.new_records()) == [1]
    assert tail.new_records() == []
    log.append({"step": 2})
    log.append({"step": 3})
    assert steps(tail.new_records()) == [2, 3]
    log.close()


def test_a_follower_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st')
    tail = Tail(path)
    assert steps(tail.new_records()) == [1]
    with path.open("a") as stream:
        stream.write('ep": 2}\n')
    assert steps(tail.new_records()) == [2]


def test_a_follower_reports_no_step_twice_when_training_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 8))
    tail = Tail(path)
    assert steps(tail.new_records()) == list(range(1, 8))
    write(path, range(6, 10), resume_at=5, mark="second")
    assert steps(tail.new_records()) == [8, 9]


def test_a_follower_begins_anew_in_a_file_that_got_the_place_of_the_old_one(tmp_path: Path) -> None:
    """A file that is replaced twice between two looks may have the first one's inode, and be longer than that."""
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
    tail = Tail(path)
    assert steps(tail.new_records()) == list(range(1, 8))
    path.write_text("".join(f'{{"step": {step}, "mark": "second"}}\n' for step in range(1, 10)))
    assert steps(tail.new_records()) == [8, 9]
    with path.open("a") as stream:
        stream.write('{"step": 10}\n')
    assert steps(tail.new_records()) == [10]


# ---- speed -----------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def test_time_is_added_up_by_part_and_taken_once() -> None:
    split = TimeSplit(CPU)
    for part, seconds in (("data", 0.01), ("forward", 0.02), ("data", 0.01)):
        with split(part):
            spin(seconds)
    taken = split.take()
    assert set(taken) == {"data", "forward"}
    assert taken["data"] >= 0.02
    assert taken["forward"] >= 0.02
    assert split.take() == {}


def test_memory_counts_what_was_held_at_most() -> None:
    before = memory_bytes(CPU)
    block = torch.ones(max(before, 1 << 28) // 4 + (1 << 24))
    del block
    assert memory_bytes(CPU) >= before
    assert 1 << 20 < before < 1 << 42


def test_the_peak_of_a_cpu_is_measured_and_says_so() -> None:
    found = peak(CPU, "fp32")
    assert found.source.startswith("measured")
    assert 1e8 < found.flops < 1e14


def test_a_plain_product_reaches_no_more_than_about_the_peak() -> None:
    found = peak(CPU, "fp32")
    left = torch.ones(256, 256)
    started = time.perf_counter()
    for _ in range(20):
        left @ left
    assert 20 * 2 * 256**3 / (time.perf_counter() - started) < 3 * found.flops


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_known_gpu_has_a_stated_peak() -> None:
    assert peak(torch.device("cuda", 0), "bf16").flops > 1e13
