"""Files that other versions of trtdeploy read: what an older or newer one may find in them."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from trtdeploy.errors import TrtDeployError
from trtdeploy.frozen_model import FrozenModel
from trtdeploy.version import __version__

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

_WRITERS = ("written_by", "trtdeploy_version", "version")
"""The keys under which files name the version of trtdeploy that wrote them."""


class FileFormat(FrozenModel):
    """A file's content, with the version of its format: ``format``, the major one, and ``minor``.

    A minor version adds optional keys; anything else is a new major version. So a file with unknown keys is read
    without them (code, and files that users write, are still refused a key that they mistype), a newer major one is
    refused by name, and older ones are read by the defaults and the "before" validators of the model.

    A format declares ``format: Literal[MAJOR]``, ``minor: int`` and, unless another key says it, ``written_by``.
    """

    TITLE: ClassVar[str]
    """The file in words: "a manifest"."""
    ERROR: ClassVar[type[TrtDeployError]]
    """The error that a file of a newer major version raises."""
    EXACT: ClassVar[tuple[str, ...]] = ()
    """Keys whose parts say what is computed: nothing in them is ignored, so a new key there is a new major version."""
    OTHERWISE: ClassVar[str] = ""
    """A further hint for a file of a newer major version."""

    @classmethod
    def current(cls) -> tuple[int, int]:
        """Return the major and the minor version that this version of trtdeploy writes."""
        return cls.model_fields["format"].default, cls.model_fields["minor"].default

    @classmethod
    def read(cls, content: bytes | str, path: str | Path) -> Self:
        """Return what a file says, as the version of the format that is written today.

        Args:
            content: The file's, JSON.
            path: For messages.

        Raises:
            TrtDeployError: Of type ``ERROR``: the file is of a newer major version.
            ValidationError: It is damaged, or something else.
        """
        try:
            found = cls.model_validate_json(content)
        except ValidationError as error:
            found = cls._read_newer(content, path, error)
        # written again, it is of this version
        ours = {key: each.default for key, each in cls.model_fields.items() if key in ("minor", "written_by")}
        return found.model_copy(update=ours)

    @classmethod
    def _read_newer(cls, content: bytes | str, path: str | Path, error: ValidationError) -> Self:
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            raise error from None
        given = document.get("format") if isinstance(document, dict) else None
        if type(given) is not int:
            raise error
        major, _ = cls.current()
        if given > major:
            raise cls.ERROR(
                f"{path} is {cls.TITLE} of format {given}; trtdeploy {__version__} reads format {major}.",
                hint=_what_reads(document) + cls.OTHERWISE,
            )
        unknown = [item["loc"] for item in error.errors(include_url=False) if item["type"] == "extra_forbidden"]
        if given != major or len(unknown) < error.error_count() or any(place[0] in cls.EXACT for place in unknown):
            raise error
        for *parents, key in unknown:
            place = document
            for parent in parents:
                place = place[parent]
            del place[key]
        _say_once(cls.TITLE, tuple(".".join(map(str, place)) for place in unknown))
        return cls.model_validate_json(json.dumps(document))


def _what_reads(document: dict[str, Any]) -> str:
    writer = next((document[key] for key in _WRITERS if isinstance(document.get(key), str)), __version__)
    if writer == __version__:  # or none is named
        return "Install a newer version of trtdeploy; the file does not say which one wrote it."
    return f"Install trtdeploy {writer}, which wrote it, or a newer version."


@lru_cache(maxsize=256)
def _say_once(title: str, keys: tuple[str, ...]) -> None:
    logger.debug("%s has keys that trtdeploy %s does not know and ignores: %s", title, __version__, ", ".join(keys))
