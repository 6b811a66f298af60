"""Versions come and go under load and under kills: does a request fail, is an answer wrong, is a repository broken?

    python -m benchmarks.publish_soak [--clients 8] [--kills 100] [--live-kills 12] [--seed 0] [--output FILE.json]

First part: a real tritonserver serves version 1 while clients ask without pause; version 2 is published, promoted and
rolled back. Every answer must be that of the version that the server names. Second part: processes publish, promote,
roll back and prune in one repository and are killed with SIGKILL at random moments; after every kill the repository
must pass the checker, and its plan must load and answer as one of the versions; at the end a server loads it too.
Third part: processes promote on a server that clients ask, and are killed likewise; after every kill the next promotion
must succeed, and leave the server serving what the repository names and nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from trtdeploy.building.build import BuildConfig, build
from trtdeploy.engine import Engine
from trtdeploy.errors import TrtDeployError
from trtdeploy.files import atomic_write
from trtdeploy.triton.client import connect
from trtdeploy.triton.config import check_config
from trtdeploy.triton.repository.differences.drift import find_drift
from trtdeploy.triton.repository.layout import active_version, versions
from trtdeploy.triton.repository.live_promotion import promote_live
from trtdeploy.triton.repository.versions import promote, publish
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer

NAME = "scaled"
_EXPLICIT = ("--model-control-mode=explicit", "--load-model=*")
_CHILD = """
import random, sys
from trtdeploy.errors import TrtDeployError
from trtdeploy.triton.repository.versions import promote, prune, publish, rollback
repository, seed, *plans = sys.argv[1:]
rng = random.Random(seed)
print("ready", flush=True)
while True:
    try:
        publish(rng.choice(plans), repository, "scaled")
        promote(repository, "scaled")
        rng.random() < 0.5 and rollback(repository, "scaled")
        prune(repository, "scaled", keep=2)
    except TrtDeployError as error:
        if "roll back" not in str(error):
            raise
"""
_LIVE_CHILD = """
import itertools, sys
from trtdeploy.triton.repository.live_promotion import promote_live
repository, url = sys.argv[1:]
print("ready", flush=True)
for version in itertools.cycle((2, 1)):
    promote_live(repository, "scaled", version, url=url)
"""


def make_plans(folder: Path) -> list[Path]:
    """Build two plans that any answer tells apart: the input times 1, and times 2."""
    plans = []
    for factor in (1, 2):
        value = helper.make_tensor_value_info
        constant = helper.make_tensor("factor", TensorProto.FLOAT, [1], [float(factor)])
        graph = helper.make_graph(
            [helper.make_node("Mul", ["x", "factor"], ["y"])],
            "scale",
            [value("x", TensorProto.FLOAT, ["batch", 4])],
            [value("y", TensorProto.FLOAT, ["batch", 4])],
            [constant],
        )
        model = folder / f"{factor}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), model)
        plans.append(build(model, folder / f"{factor}.plan", BuildConfig(timing_rounds=1, threads=1)).path)
    return plans


class Clients:
    """Threads that ask one model without pause. Use it as a context manager.

    Attributes:
        answered: Answers by the version that the server named.
        failed: What went wrong.
        wrong: Answers that are not those of the version that the server named.
    """

    def __init__(self, url: str, count: int) -> None:
        self.answered: Counter[str] = Counter()
        self.failed: list[str] = []
        self.wrong: list[str] = []
        self._url = url.removeprefix("grpc://")
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(60)

    def counted(self) -> dict[str, int]:
        """Return the answers so far by version."""
        with self._lock:
            return dict(self.answered)

    def _ask(self, seed: int) -> None:
        import tritonclient.grpc
        from tritonclient.utils import InferenceServerException

        rng = np.random.default_rng(seed)
        client = tritonclient.grpc.InferenceServerClient(self._url, channel_args=[("grpc.enable_http_proxy", 0)])
        while not self._ending.is_set():
            batch = rng.standard_normal((1 + seed % 3, 4)).astype(np.float32)
            tensor = tritonclient.grpc.InferInput("x", list(batch.shape), "FP32")
            tensor.set_data_from_numpy(batch)
            try:
                answer = client.infer(NAME, [tensor], client_timeout=30)
            except InferenceServerException as error:
                with self._lock:
                    self.failed.append(str(error))
                continue
            version = answer.get_response().model_version
            with self._lock:
                self.answered[version] += 1
                if not np.allclose(answer.as_numpy("y"), batch * int(version), rtol=1e-5):
                    self.wrong.append(f"version {version}: {batch[0]} -> {answer.as_numpy('y')[0]}")
        client.close()


def under_load(plans: list[Path], *, clients: int, pause_s: float = 1.0) -> dict[str, Any]:
    """Publish, promote and roll back while clients ask; versions 1 and 2 multiply by 1 and 2."""
    phases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="publish-soak-") as name:
        repository = Path(name) / "models"
        publish(plans[0], repository, NAME)
        server = TritonServer(
            repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0, options=_EXPLICIT
        )
        with server, Clients(server.grpc_url, clients) as asking:

            def phase(what: str, step: Any) -> None:
                before, began = asking.counted(), time.monotonic()
                step()
                seconds = time.monotonic() - began
                time.sleep(pause_s)
                after = asking.counted()
                answered = {key: after[key] - before.get(key, 0) for key in sorted(after)}
                phases.append({"phase": what, "seconds": round(seconds, 2), "answers_by_version": answered})

            phase("version 1 alone", lambda: None)
            phase("publish version 2", lambda: publish(plans[1], repository, NAME))
            phase("promote version 2", lambda: promote_live(repository, NAME, url=server.http_url))
            phase("version 2 alone", lambda: None)
            phase("roll back", lambda: promote_live(repository, NAME, url=server.http_url, step="rollback"))
            phase("version 1 again", lambda: None)
        ledger = json.loads((repository / NAME / "versions.json").read_text())["events"]
    return {
        "clients": clients,
        "answers": sum(asking.answered.values()),
        "answers_by_version": dict(asking.answered),
        "failed": asking.failed,
        "wrong": asking.wrong,
        "phases": phases,
        "ledger": ledger,
    }


def under_kills(plans: list[Path], *, kills: int, seed: int, serve: bool = True) -> dict[str, Any]:
    """Kill publishers at random moments; after each kill look whether the repository is whole.

    Args:
        plans: The two plans.
        kills: How many.
        seed: Of the moments and of what the publishers do.
        serve: Whether a server loads the repository at the end.
    """
    rng = random.Random(seed)
    broken: list[str] = []
    died: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="publish-soak-") as name:
        repository = Path(name) / "models"
        publish(plans[0], repository, NAME)
        done = 0
        while done < kills:
            command = [sys.executable, "-c", _CHILD, str(repository), str(seed + done), *map(str, plans)]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert child.stdout is not None and child.stderr is not None  # noqa: PT018 - asked for above
            child.stdout.readline()
            time.sleep(rng.uniform(0, 0.6))
            child.send_signal(signal.SIGKILL)
            _, errors = child.communicate()
            if child.returncode != -signal.SIGKILL:
                broken.append(f"a publisher failed: {errors[-500:]}")
            done += 1
            try:
                died[_look(repository)] += 1
            except TrtDeployError as error:
                broken.append(f"after kill {done}: {error}")
        promote(repository, NAME)  # the next publisher finds its way
        served = None
        if serve:
            with (
                TritonServer(
                    repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0, options=_EXPLICIT
                ) as server,
                connect(server.grpc_url) as client,
            ):
                served = client.describe(NAME).version
        count = len(versions(repository / NAME))
    return {"kills": done, "broken": broken, "answered_as": dict(died), "versions_left": count, "served": served}


def under_live_kills(plans: list[Path], *, kills: int, seed: int, clients: int) -> dict[str, Any]:
    """Kill promotions on a live server at random moments; after each kill promote again and look what is served.

    Args:
        plans: The two plans.
        kills: How many.
        seed: Of the moments.
        clients: How many clients ask meanwhile.
    """
    rng = random.Random(seed)
    broken: list[str] = []
    left: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="publish-soak-") as name:
        repository = Path(name) / "models"
        for plan in plans:
            publish(plan, repository, NAME)
        server = TritonServer(
            repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0, options=_EXPLICIT
        )
        with server, Clients(server.grpc_url, clients) as asking:
            for number in range(kills):
                command = [sys.executable, "-c", _LIVE_CHILD, str(repository), server.http_url]
                child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                assert child.stdout is not None  # asked for above
                child.stdout.readline()
                time.sleep(rng.uniform(0, 5))
                child.send_signal(signal.SIGKILL)
                _, errors = child.communicate()
                time.sleep(1)  # the server goes on loading what was asked for
                if child.returncode != -signal.SIGKILL:
                    broken.append(f"a promotion failed: {errors[-500:]}")
                left.update("a candidate" if "candidate" in found.message else "the other version"
                            for _, found in find_drift(repository, server.http_url))  # fmt: skip
                try:
                    promote_live(repository, NAME, rng.choice((1, 2)), url=server.http_url)
                except TrtDeployError as error:
                    broken.append(f"after kill {number + 1}: {error}")
                broken += [f"after kill {number + 1}: {found}" for _, found in find_drift(repository, server.http_url)]
    return {
        "kills": kills,
        "broken": broken,
        "left_by_kills": dict(left),
        "answers": sum(asking.answered.values()),
        "failed": asking.failed,
        "wrong": asking.wrong,
    }


def _look(repository: Path) -> str:
    """Load what would be served, and say which plan it is.

    Raises:
        TrtDeployError: It does not load, or answers as neither.
    """
    folder = repository / NAME
    findings = [f for f in check_config((folder / "config.pbtxt").read_text(), folder) if f.severity == "error"]
    if findings:
        raise TrtDeployError(str(findings[0]))
    strangers = [p.name for p in repository.iterdir() if p.name not in (NAME, f".{NAME}.lock")]
    if strangers:
        raise TrtDeployError(f"Triton would take {strangers} for models")
    with Engine.load(folder / str(active_version(folder)) / "engine.plan") as engine:
        factor = float(engine.infer({"x": np.ones((1, 4), np.float32)})["y"][0, 0])
    if factor not in (1.0, 2.0):
        raise TrtDeployError(f"the plan multiplies by {factor}")
    return f"times {factor:g}"


def main() -> int:
    """Run all parts, write what came out and print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--live-kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/publish_soak.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="publish-soak-plans-") as name:
        plans = make_plans(Path(name))
        load = under_load(plans, clients=arguments.clients)
        kills = under_kills(plans, kills=arguments.kills, seed=arguments.seed)
        live = under_live_kills(
            plans, kills=arguments.live_kills, seed=arguments.seed, clients=min(arguments.clients, 2)
        )
    facts = {"under_load": load, "under_kills": kills, "under_live_kills": live}
    atomic_write(arguments.output, json.dumps(facts, indent=2) + "\n")
    print(  # noqa: T201
        f"{load['clients']} clients: {load['answers']} answers {load['answers_by_version']}, "
        f"{len(load['failed'])} failed, {len(load['wrong'])} wrong; "
        f"{kills['kills']} kills: {len(kills['broken'])} times broken, {kills['answered_as']}, "
        f"served at the end: version {kills['served']}; {live['kills']} kills of live promotions: "
        f"{len(live['broken'])} times broken, left behind: {live['left_by_kills']}, {live['answers']} answers, "
        f"{len(live['failed'])} failed, {len(live['wrong'])} wrong"
    )
    bad = [*load["failed"], *load["wrong"], *kills["broken"], *live["broken"], *live["failed"], *live["wrong"]]
    for text in bad[:20]:
        print(text, file=sys.stderr)  # noqa: T201
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
