"""Many processes build on one timing cache while some of them are killed: is an update lost, or a file damaged?

    python -m benchmarks.cache_soak [--processes 8] [--builds 20] [--kill-share 0.3] [--inside-share 0.05] [--seed 0]

Each process builds small models, all of them different, with ONNX Runtime's tactics on one cache file, and notes each
build that has reported success. A random share of the processes is killed with SIGKILL at random moments and replaced;
others kill themselves before or after a random system call that writes the cache, where random moments seldom hit.
All the while a reader without the lock looks whether the file is whole. In the end every noted build must find its
timings in the cache, and no file may be damaged or left over.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from trtdeploy.timing_cache import TimingCache
from trtdeploy.timing_cache.measured import parse_measured

_CHILD = """
import os, random, signal, sys
from pathlib import Path
import onnx
from onnx import TensorProto, helper
from trtdeploy.building.build import BuildConfig, build
folder, process, first, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
inside_share, rng = float(sys.argv[5]), random.Random(sys.argv[6] + process)
def perhaps_die():
    if rng.random() < inside_share / 2:
        print("inside", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
def deadly(real):
    def call(*arguments, **options):
        # a file or a descriptor that belongs to the cache, not to the plan
        name = os.readlink(f"/proc/self/fd/{arguments[0]}") if isinstance(arguments[0], int) else str(arguments[0])
        mine = "soak.timing" in name
        if mine:
            perhaps_die()
        real(*arguments, **options)
        if mine:
            perhaps_die()
    return call
if inside_share:
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
for number in range(first, first + count):
    shape = ["batch", 4]
    nodes = [helper.make_node("Add", ["x", "x"], ["s"]), helper.make_node("Relu", ["s"], ["y"])]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, f"{process}-{number}", [value("x", 1, shape)], [value("y", 1, shape)])
    model = folder / f"{process}-{number}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), model)
    plan = build(
        model, model.with_suffix(".plan"), BuildConfig(timing_cache=folder / "soak.timing", timing_rounds=1, threads=1)
    )
    print(plan.manifest.onnx.sha256, flush=True)
"""


@dataclass
class Outcome:
    """What a soak has shown."""

    noted: int = 0
    kills: int = 0
    kills_inside: int = 0
    looks: int = 0
    lost: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    torn: int = 0
    deadlocked: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether nothing was lost, damaged, left over or stuck."""
        return not (self.lost or self.leftovers or self.torn or self.deadlocked or self.failed)


def soak(
    *,
    processes: int,
    builds: int,
    kill_share: float,
    seed: int,
    inside_share: float = 0.05,
    timeout_s: float = 600.0,
) -> Outcome:
    """Run the processes; bounded in number and time.

    Args:
        processes: How many build at the same time.
        builds: How many builds each slot has to complete, over all its lives.
        kill_share: How many kills there are, as a share of all builds.
        seed: Of the moments.
        inside_share: How probably a writer kills itself at each call that writes the cache; needs Linux if not 0.
        timeout_s: After so long, what still runs counts as stuck and is ended.
    """
    rng = random.Random(seed)
    outcome = Outcome()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cache-soak-") as name:
        folder = Path(name)
        noted: set[str] = set()
        done = [0] * processes
        running: dict[int, subprocess.Popen[str]] = {}
        logs: dict[int, Path] = {}
        kills_left = int(kill_share * processes * builds)
        lives = 0
        while any(count < builds for count in done) or running:
            if time.monotonic() - start > timeout_s:
                outcome.deadlocked = len(running)
                for child in running.values():
                    child.kill()
                    child.wait()
                break
            for slot in range(processes):
                if slot not in running and done[slot] < builds:
                    lives += 1
                    logs[slot] = folder / f"log-{lives}"
                    with logs[slot].open("w") as log:
                        arguments = [name, f"p{slot}-{lives}", "0", str(builds - done[slot])]
                        arguments += [str(inside_share), str(seed)]
                        running[slot] = subprocess.Popen(
                            [sys.executable, "-c", _CHILD, *arguments], stdout=log, stderr=subprocess.PIPE, text=True
                        )
            time.sleep(rng.uniform(0.02, 0.1))
            if kills_left and running and rng.random() < 0.5:
                running[rng.choice(list(running))].send_signal(signal.SIGKILL)
                kills_left -= 1
            outcome.looks += 1
            outcome.torn += not _is_whole(folder / "soak.timing")
            for slot, child in list(running.items()):
                if child.poll() is None:
                    continue
                # a line that the kill has cut is no report
                lines = [line for line in logs[slot].read_text().splitlines(keepends=True) if line.endswith("\n")]
                reports = [line for line in lines if line != "inside\n"]
                outcome.kills_inside += len(lines) - len(reports)
                noted.update(line.strip() for line in reports)
                done[slot] += len(reports)
                if child.returncode == -signal.SIGKILL:
                    outcome.kills += 1
                elif child.returncode != 0:
                    outcome.failed.append(child.stderr.read()[-500:] if child.stderr else "")
                    done[slot] = builds
                if child.stderr:
                    child.stderr.close()
                del running[slot]
        outcome.noted = len(noted)
        keys = TimingCache(folder / "soak.timing").read()
        outcome.lost = sorted(digest for digest in noted if not any(f"|{digest}|" in key for key in keys))
        outcome.leftovers = sorted(
            path.name
            for path in folder.iterdir()
            if ".corrupt-" in path.name
            or ".foreign-" in path.name
            or (path.name.startswith(".soak.timing.") and path.name.endswith(".tmp"))
        )
        outcome.torn += not _is_whole(folder / "soak.timing")
    outcome.seconds = round(time.monotonic() - start, 1)
    return outcome


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return True  # nobody has finished yet
    return parse_measured(path, content) is not None


def main() -> int:
    """Run a soak and print its verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--builds", type=int, default=20)
    parser.add_argument("--kill-share", type=float, default=0.3)
    parser.add_argument("--inside-share", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    outcome = soak(
        processes=arguments.processes,
        builds=arguments.builds,
        kill_share=arguments.kill_share,
        inside_share=arguments.inside_share,
        seed=arguments.seed,
    )
    print(  # noqa: T201
        f"{arguments.processes} processes x {arguments.builds} builds: {outcome.noted} reported success, "
        f"{outcome.kills} killed ({outcome.kills_inside} of them inside a write), {len(outcome.lost)} updates lost, "
        f"{len(outcome.leftovers)} damaged or left-over files, "
        f"{outcome.torn} of {outcome.looks} looks saw a torn file, "
        f"{outcome.deadlocked} stuck, {len(outcome.failed)} failed; {outcome.seconds} s"
    )
    for text in outcome.failed:
        print(text, file=sys.stderr)  # noqa: T201
    return 0 if outcome.good else 1


if __name__ == "__main__":
    sys.exit(main())
