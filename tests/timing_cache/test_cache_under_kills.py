"""Processes that build on one timing cache while some are killed lose nothing; in small, the benchmark is larger."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.cache_soak import soak
from trtdeploy.timing_cache import BlobCache, Fingerprint

MERGE_FOR_EVER = """
import sys
from trtdeploy.timing_cache import BlobCache, Fingerprint
fingerprint = Fingerprint.model_validate_json(sys.argv[2])
cache = BlobCache(sys.argv[1], fingerprint)
def combine(first, second):
    return bytes(sorted(set(first) | set(second))) * 1
number = int(sys.argv[3])
while True:
    cache.merge(bytes([number % 200 + 1]), combine, len)
    print(number % 200 + 1, flush=True)
    number += 1
"""


def test_builds_with_random_kills_lose_no_update() -> None:
    outcome = soak(processes=4, builds=5, kill_share=0.3, inside_share=0.15, seed=1, timeout_s=120)
    assert outcome.good, outcome
    assert outcome.noted >= 20
    assert outcome.kills > outcome.kills_inside > 0


def test_a_blob_and_its_sidecar_survive_kills_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "t.timing"
    fingerprint = Fingerprint(kind="timing", runtime="r", version="1", device="d", capability="1.0", cuda="1")
    told: set[int] = set()
    for turn in range(6):
        arguments = [str(path), fingerprint.model_dump_json(), str(20 * turn)]
        with subprocess.Popen([sys.executable, "-c", MERGE_FOR_EVER, *arguments], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(4 + turn):
                told.add(int(child.stdout.readline()))
            child.kill()
            child.wait()
    kept = set(BlobCache(path, fingerprint).load(len))
    assert told <= kept
    assert [name for name in os.listdir(tmp_path) if ".corrupt" in name or ".foreign" in name] == []
    BlobCache(path, fingerprint).merge(b"\xff", lambda first, second: first + second, len)
    assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")] == []
