"""Which release of the Triton container carries which TensorRT.

A plan loads only into exactly the TensorRT that built it, unless it is version-compatible. Only pairs that somebody has
seen are listed: 25.12 from a maintainer (github.com/triton-inference-server/server/issues/8462), the others from
published dumps of the images' environments. Inside of a container, TRT_VERSION is authoritative.
"""

from __future__ import annotations

TENSORRT_OF_RELEASE = {
    "25.12": "10.14.1.48",
    "26.05": "10.16.1.11",
    "26.06": "11.0.0.114",
    "26.07": "11.1.0.106",
}


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
