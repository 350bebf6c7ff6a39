"""What operations may load and write: nothing but what lies below the operator's directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_worker import InvalidRequestError
from dynamo_worker.allowed_paths import AllowedPaths


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "poet").mkdir(parents=True)
    (tmp_path / "rooted").mkdir()
    (tmp_path / "secret").mkdir()
    return tmp_path / "root"


def test_nothing_is_allowed_unless_the_operator_says_so(root: Path) -> None:
    with pytest.raises(InvalidRequestError, match="--control-load-root DIR allows a directory"):
        AllowedPaths(write=[str(root)]).to_load(str(root))
    with pytest.raises(InvalidRequestError, match="--control-write-root DIR allows a directory"):
        AllowedPaths(load=[str(root)]).to_write(str(root))
    with pytest.raises(InvalidRequestError, match="--media-allow-path DIR allows a directory"):
        AllowedPaths([str(root)], [str(root)]).to_fetch(str(root))
    assert AllowedPaths(media=[str(root)]).to_fetch(str(root)) == str(root)


@pytest.mark.parametrize("wanted", ["{}", "{}/poet", "file://{}/poet", "{}/poet/../poet/", "{}/%70oet", "{}/not/yet"])
def test_below_a_root(root: Path, wanted: str) -> None:
    paths = AllowedPaths([str(root)], [str(root)])
    assert Path(paths.to_load(wanted.format(root))).is_relative_to(root)
    assert Path(paths.to_write(wanted.format(root))).is_relative_to(root)


@pytest.mark.parametrize(
    "wanted",
    [
        "/",
        "/etc",
        "{}/../secret",
        "{}ed",
        "file://{}/%2e%2e/secret",
        "file:{}/../secret",
        "file://elsewhere/etc",
        "poet",
        "",
        "org/model",
        "s3://bucket/poet",
        "~/x",
    ],
)
def test_outside_of_it(root: Path, wanted: str) -> None:
    paths = AllowedPaths([str(root)], [str(root)])
    for check in (paths.to_load, paths.to_write):
        with pytest.raises(InvalidRequestError, match="is not below"):
            check(wanted.format(root))


@pytest.mark.parametrize("wanted", ["{}/\0x", "http://[", "{}/\udc80\ud800"])
def test_what_is_no_path_at_all(root: Path, wanted: str) -> None:
    paths = AllowedPaths([str(root), "s3://bucket"], [str(root)])
    for check in (paths.to_load, paths.to_write):
        with pytest.raises(InvalidRequestError, match="is not a valid path or URI"):
            check(wanted.format(root))


def test_a_link_is_where_it_leads_to(root: Path) -> None:
    (root / "out").symlink_to(root.parent / "secret")
    (root / "in").symlink_to(root / "poet")
    (root.parent / "alias").symlink_to(root)
    paths = AllowedPaths([str(root)], [str(root)])
    for check in (paths.to_load, paths.to_write):
        for wanted in ("out", "out/deeper", "in/../../secret"):
            with pytest.raises(InvalidRequestError, match="is not below"):
                check(f"{root}/{wanted}")
        # What is used is what was checked, wherever the link leads by then.
        assert check(f"{root}/in") == str(root / "poet")
        assert check(f"{root.parent}/alias/poet") == str(root / "poet")
    assert AllowedPaths([str(root.parent / "alias")]).to_load(str(root / "poet")) == str(root / "poet")


@pytest.mark.parametrize(
    ("wanted", "allowed"),
    [
        ("s3://bucket/adapters", True),
        ("s3://bucket/adapters/poet/v1", True),
        ("s3://bucket/adaptersx", False),
        ("s3://bucket", False),
        ("s3://other/adapters/poet", False),
        ("s3://bucket@other/adapters/poet", False),
        ("gs://bucket/adapters/poet", False),
        ("s3://bucket/adapters/../secret", False),
        ("s3://bucket/adapters/%2e%2e/secret", False),
        ("s3://bucket/adapters/x\\..\\..", False),
        ("/adapters", False),
    ],
)
def test_uris(wanted: str, allowed: bool) -> None:
    paths = AllowedPaths(["s3://bucket/adapters/", "/nowhere"])
    if allowed:
        assert paths.to_load(wanted) == wanted
    else:
        with pytest.raises(InvalidRequestError, match="is not below"):
            paths.to_load(wanted)


@pytest.mark.parametrize("wanted", ["../x", "a/b", "/x", "..", ".", "a\0b", 3, ["x"]])
def test_a_name_is_no_path(wanted: object) -> None:
    with pytest.raises(InvalidRequestError, match="expected a name"):
        AllowedPaths().name(wanted)
    assert AllowedPaths().name("run-1") == "run-1"
