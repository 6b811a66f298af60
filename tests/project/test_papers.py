"""What a public project shows beside its code: forms that hosts accept, pages that are true."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCHEMAS = {
    ".github/workflows/test.yml": "vendor.github-workflows",
    ".github/dependabot.yml": "vendor.dependabot",
    ".github/ISSUE_TEMPLATE/config.yml": "vendor.github-issue-config",
    ".github/ISSUE_TEMPLATE/bug.yml": "vendor.github-issue-forms",
    ".github/ISSUE_TEMPLATE/accuracy.yml": "vendor.github-issue-forms",
    ".github/ISSUE_TEMPLATE/feature.yml": "vendor.github-issue-forms",
    "CITATION.cff": "vendor.citation-file-format",
}


def test_every_form_has_its_schema_here() -> None:
    written = {str(path.relative_to(ROOT)) for path in (ROOT / ".github").rglob("*.yml")} | {"CITATION.cff"}
    assert written == set(SCHEMAS)


@pytest.mark.parametrize(("file", "schema"), SCHEMAS.items(), ids=list(SCHEMAS))
def test_hosts_accept_it(file: str, schema: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(ROOT / file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_runs_what_developers_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert "make test" in [step.get("run") for step in workflow["jobs"]["test"]["steps"]]


def test_hooks_are_commands_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"].replace(".venv/bin", "$(BIN)").replace(" --force-exclude", "") for hook in hooks]
    assert [entry for entry in entries if entry not in makefile] == []


def test_the_package_says_its_licence() -> None:
    facts = metadata("trtdeploy")
    assert facts["License-Expression"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md"])
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(
        r"`((?:trtdeploy|training|tests|docs|docker)/[\w/.-]*|[A-Z]+\.md|constraints\.txt|pyproject\.toml)`", text
    )
    named += re.findall(r"\]\(([^)#:]+)\)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_command_is_in_the_changelog() -> None:
    """What is to be released is told; a command is the least that users notice."""
    done = subprocess.run([sys.executable, "-m", "trtdeploy", "--help"], capture_output=True, text=True, timeout=120)
    commands = re.findall(r"^[│ ]+([a-z]+) {2,}", done.stdout, re.MULTILINE)
    assert {"build", "serve"} <= set(commands)
    text = (ROOT / "CHANGELOG.md").read_text()
    assert [command for command in commands if not re.search(rf"`[^`]*\b{command}\b[^`]*`", text)] == []
