import json
from pathlib import Path

import pytest

from dougong.core.bundle import MANIFEST, Manifest, read_bundle, write_bundle
from dougong.core.errors import BundleError
from dougong.core.signature import Signature, Target, TextInput

SIGNATURE = Signature(
    inputs={"question": TextInput(vocabulary_size=10, max_tokens=5)},
    target=Target(name="answer", task="single_label", labels=("no", "yes")),
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    with write_bundle(tmp_path / "bundle", Manifest(name="test", signature=SIGNATURE, model={})) as folder:
        (folder / "weights.bin").write_bytes(b"1234")
    return tmp_path / "bundle"


def alter(bundle: Path, **values: object) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_bundle_is_read_as_it_was_written(bundle: Path) -> None:
    manifest = read_bundle(bundle)
    assert manifest.signature == SIGNATURE
    assert list(manifest.files) == ["weights.bin"]


def test_an_altered_file_is_refused(bundle: Path) -> None:
    (bundle / "weights.bin").write_bytes(b"1235")
    with pytest.raises(BundleError, match=r"'weights.bin' is not the file that was saved"):
        read_bundle(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    with pytest.raises(BundleError, match=r"lacks its file 'weights.bin'"):
        read_bundle(bundle)


def test_a_manifest_cannot_reach_outside(bundle: Path) -> None:
    alter(bundle, files={"../secret": {"sha256": "0", "num_bytes": 0}})
    with pytest.raises(BundleError, match="lies outside of it"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 1}, "has bundle format 1"),
        ({"format": "pickle"}, "not a manifest"),
        ({"signature": 3}, "signature"),
        ({"extra": 3}, "no setting 'extra'"),
    ],
)
def test_another_format_is_refused(bundle: Path, values: dict[str, object], message: str) -> None:
    alter(bundle, **values)
    with pytest.raises(BundleError, match=message):
        read_bundle(bundle)


def test_a_folder_with_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    with (
        pytest.raises(BundleError, match="holds other things"),
        write_bundle(tmp_path, Manifest(name="test", signature=SIGNATURE, model={})),
    ):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years"
