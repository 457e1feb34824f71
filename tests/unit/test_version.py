"""One version everywhere, by Semantic Versioning (`.dev0` before a release), with its section in the changelog."""

import re
import tomllib

import pytest
import yaml

import cli
from tests import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def test_it_is_semantic_and_named_alike() -> None:
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(\.dev\d+)?", VERSION)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == VERSION


def test_the_command_prints_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli.metadata, "version", lambda name: {"twintune": VERSION}[name])
    with pytest.raises(SystemExit) as caught:
        cli.build_parser(None).parse_args(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"twintune {VERSION}\n")


def test_the_changelog_goes_from_the_next_version_down() -> None:
    headings = re.findall(r"^## (\d+)\.(\d+)\.(\d+)(.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    versions = [tuple(map(int, heading[:3])) for heading in headings]
    assert versions == sorted(versions, reverse=True)
    released = VERSION.partition(".dev")[0]
    assert tuple(map(int, released.split("."))) in versions
    assert (released != VERSION) == ("not yet released" in headings[0][3])
    for major, minor, _, note in headings:
        unreleased = "not yet released" in note
        page = ROOT / "docs" / f"release-{major}.{minor}.md"
        assert not unreleased or "Not yet released" in page.read_text(encoding="utf-8")
