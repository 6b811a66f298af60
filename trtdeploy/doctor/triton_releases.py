"""Which release of the Triton container carries which TensorRT.

A plan loads only into exactly the TensorRT that built it, unless it is version-compatible. Only pairs that somebody has
seen are listed: 25.12 from a maintainer (github.com/triton-inference-server/server/issues/8462), the others from
published dumps of the images' environments. Inside of a container, TRT_VERSION is authoritative.
"""

from __future__ import annotations

from trtdeploy.plan import Manifest

TENSORRT_OF_RELEASE = {
    "25.12": "10.14.1.48",
    "26.05": "10.16.1.11",
    "26.06": "11.0.0.114",
    "26.07": "11.1.0.106",
}


_PARTLY_KNOWN = {"26.01": "10.14", "26.02": "", "26.03": "10.16.0", "26.04": "10.16.1", "26.08": "11.2.1"}
"""What is known of other releases: the first numbers of their TensorRT, from images of the same month, or nothing."""


def preflight(manifest: Manifest) -> dict[str, list[str]]:
    """Say which releases of the Triton container load a plan.

    Returns:
        Releases by verdict, "load it", "refuse it" and "not known"; all empty for a plan that the Python backend
        serves, which needs its runtime in the container and nothing of the release.
    """
    verdicts: dict[str, list[str]] = {"load it": [], "refuse it": [], "not known": []}
    if manifest.runtime.name != "tensorrt":
        return verdicts
    ours = manifest.runtime.version
    compatible = bool(manifest.build_config.get("version_compatible"))
    loading = releases_for(ours, version_compatible=compatible)
    for release in sorted({**TENSORRT_OF_RELEASE, **_PARTLY_KNOWN}):
        if release in loading:
            verdict = "load it"
        elif release in TENSORRT_OF_RELEASE:
            verdict = "refuse it"
        else:
            start = numbers(_PARTLY_KNOWN[release])
            matches = numbers(ours)[: len(start)] == start
            verdict = "not known" if matches or (compatible and numbers(ours) < start) else "refuse it"
        verdicts[verdict].append(release)
    return verdicts


def releases_for(version: str, *, version_compatible: bool = False) -> list[str]:
    """Return the releases that load plans of a TensorRT version; of those known, and perhaps none."""
    if not version_compatible:
        return [release for release, carried in TENSORRT_OF_RELEASE.items() if carried == version]
    return [release for release, carried in TENSORRT_OF_RELEASE.items() if numbers(carried) >= numbers(version)]


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, to compare; what follows something that is no number is left out."""
    found: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)
