"""Packed bundles: the same folder comes out, and nothing but what the manifest proves."""

import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import arriero
from arriero.engine import build_bundle
from arriero.errors import ArrieroError, FolderError
from arriero.export import export_checkpoint
from arriero.files.folders import SPEC, read_spec
from arriero.files.manifest import MANIFEST, differences, write_manifest
from arriero.files.packing import pack_bundle, unpack_bundle


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose weights lie in the checkpoint."""
    return build_bundle(tiny_model, tmp_path_factory.mktemp("packing") / "bundle")


@pytest.fixture(scope="module")
def packed(bundle: Path) -> Path:
    return pack_bundle(bundle, bundle.parent / "bundle.arriero")


def greedy(folder: Path) -> list[int]:
    return arriero.load(folder, max_seq=64, threads=1).generate([1, 5, 7, 300], max_new_tokens=12, do_sample=False).ids


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_weights_are_in_the_file_and_the_tokens_are_the_same(bundle: Path, packed: Path, tmp_path: Path) -> None:
    assert all(file.path for file in read_spec(bundle).weight_files)
    folder = unpack_bundle(packed, tmp_path / "moved" / "here")
    spec = read_spec(folder)
    assert spec.weight_files
    assert not any(file.path for file in spec.weight_files)
    assert {file.name for file in spec.weight_files} <= set(contents(folder))
    assert greedy(folder) == greedy(bundle)
    assert differences(folder) == []


def test_the_same_bundle_makes_the_same_bytes(bundle: Path, packed: Path, tmp_path: Path) -> None:
    assert pack_bundle(bundle, tmp_path / "again").read_bytes() == packed.read_bytes()
    folder = unpack_bundle(packed, tmp_path / "folder")
    assert pack_bundle(folder, tmp_path / "of folder").read_bytes() == packed.read_bytes()


def test_copied_weights_need_nothing_else_and_share_nothing(bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = build_bundle(tiny_model, tmp_path / "bundle", copy_weights=True)
    assert differences(out) == []
    files = read_spec(out).weight_files
    assert files
    assert not any(file.path for file in files)
    for file in read_spec(bundle).weight_files:
        assert not (out / file.name).samefile(file.path)
        assert not (out / file.name).is_symlink()
    assert greedy(out) == greedy(bundle)


def test_a_group_is_packed_and_runs(tiny: Path, tmp_path: Path) -> None:
    group = build_bundle(export_checkpoint(tiny, tmp_path / "group", tp=2), tmp_path / "bundles")
    folder = unpack_bundle(pack_bundle(group, tmp_path / "packed"), tmp_path / "moved")
    shutil.rmtree(tmp_path / "group")
    assert (folder / "rank-1" / SPEC).is_file()
    assert len(arriero.load(folder, max_seq=64, threads=2).generate([1, 5, 7], max_new_tokens=2).ids) == 2


def test_what_a_killed_writer_left_goes_with_the_next(bundle: Path, tmp_path: Path) -> None:
    left, others = tmp_path / f".b.arriero.{2**22 + 7}.ab_1.partial", tmp_path / f".c.arriero.{2**22 + 7}.ab_1.partial"
    for folder in (left, others):
        folder.mkdir()
        (folder / "b.arriero").write_bytes(bytes(100))
    pack_bundle(bundle, tmp_path / "b.arriero")
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, "b.arriero"]


def test_what_is_no_bundle_is_not_packed(tiny_model: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="built for no machine yet: pack what `arriero build` makes"):
        pack_bundle(tiny_model, tmp_path / "x")
    with pytest.raises(FolderError, match="beside it"):
        pack_bundle(bundle, bundle / "x")
    (tmp_path / "other").write_text("mine")
    with pytest.raises(FolderError, match="none of Arriero's"):
        pack_bundle(bundle, tmp_path / "other", force=True)
    with pytest.raises(FolderError, match="no packed bundle: give a file"):
        unpack_bundle(tmp_path / "other", tmp_path / "y")
    with pytest.raises(FolderError, match="is a packed bundle: unpack it"):
        arriero.load(pack_bundle(bundle, tmp_path / "packed"))


def test_a_changed_bundle_with_a_manifest_is_not_packed(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "folder"))
    write_manifest(folder)
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(FolderError, match=r"generation_config\.json is not what manifest\.json says"):
        pack_bundle(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewritten(
    packed: Path, out: Path, change: Callable[[tarfile.TarInfo, bytes], list[tuple[tarfile.TarInfo, bytes]]]
) -> Path:
    """An archive whose members were changed, its manifest as it was."""
    with tarfile.open(packed) as source, tarfile.open(out, "w:") as target:
        for member in source:
            file = source.extractfile(member)
            for changed, content in change(member, file.read() if file else b""):
                changed.size = len(content) if changed.isreg() else 0
                target.addfile(changed, io.BytesIO(content))
    return out


def added(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> Callable[..., list[tuple[tarfile.TarInfo, bytes]]]:
    """Adds a member behind the spec."""

    def change(member: tarfile.TarInfo, content: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
        more = tarfile.TarInfo(name)
        more.type, more.linkname = kind, link
        return [(member, content), *([(more, b"x" if kind == tarfile.REGTYPE else b"")] if member.name == SPEC else [])]

    return change


HOSTILE = {
    "upwards": (added("../x"), "plain file name"),
    "absolute": (added("/tmp/x"), "plain file name"),
    "a drive": (added("C:\\x"), "plain file name"),
    "deep": (added("a/b/c/d"), "nested more than 3 deep"),
    "a link": (added("x", tarfile.SYMTYPE, "/etc/passwd"), "no regular file"),
    "a hard link": (added("x", tarfile.LNKTYPE, SPEC), "no regular file"),
    "a pipe": (added("x", tarfile.FIFOTYPE), "no regular file"),
    "a folder": (added("x", tarfile.DIRTYPE), "no regular file"),
    "twice": (added(SPEC), "is there twice"),
    "twice in capitals": (added("SPEC.JSON"), "is there twice"),
    "not listed": (added("x.py"), "is not what manifest.json says"),
    "changed": (
        lambda member, content: [(member, content[:-1] + b"x" if member.name == "decoder.onnx" else content)],
        "decoder.onnx is not what manifest.json says",
    ),
    "missing": (
        lambda member, content: [(member, content)] if member.name != "tokenizer.json" else [],
        "tokenizer.json is not what",
    ),
    "no manifest": (
        lambda member, content: [(member, content)] if member.name != MANIFEST else [],
        "manifest.json is missing",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(packed: Path, tmp_path: Path, name: str) -> None:
    change, said = HOSTILE[name]
    file = rewritten(packed, tmp_path / "hostile", change)
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(FolderError, match=said) as refused:
        unpack_bundle(file, place / "out")
    assert len(str(refused.value)) < 700
    assert list(place.iterdir()) == []
    assert not (tmp_path / "x").exists()


def test_weights_elsewhere_are_refused(packed: Path, tmp_path: Path) -> None:
    folder = unpack_bundle(packed, tmp_path / "folder")
    fields = json.loads((folder / SPEC).read_text())
    fields["weight_files"][0]["path"] = "/etc/passwd"
    (folder / SPEC).write_text(json.dumps(fields))
    write_manifest(folder)
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name != SPEC, name))
    with tarfile.open(tmp_path / "file", "w:", format=tarfile.USTAR_FORMAT) as archive:
        for each in names:
            archive.add(folder / each, each)
    with pytest.raises(FolderError, match="lies outside of it"):
        unpack_bundle(tmp_path / "file", tmp_path / "out")


def test_damaged_archives_are_refused_in_one_line(packed: Path, tmp_path: Path) -> None:
    rng, whole = random.Random(7), packed.read_bytes()
    with tarfile.open(packed) as archive:
        headers = [member.offset for member in archive]
    for number in range(60):
        content = bytearray(whole)
        if number % 3 == 0:
            del content[rng.randrange(len(content)) :]
        else:
            start = rng.choice(headers) + rng.randrange(512)
            content[start : start + 4] = rng.randbytes(4)
        file, out = tmp_path / "damaged", tmp_path / f"out{number}"
        file.write_bytes(content)
        said = ""
        try:
            unpack_bundle(file, out)
        except ArrieroError as error:
            said = str(error)
        if said:
            assert "\n" not in said
            assert not out.exists()
        else:
            assert contents(out) == contents(unpack_bundle(packed, tmp_path / f"whole{number}"))


def test_a_header_that_asks_for_gigabytes_is_refused(packed: Path, tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 3 << 30
    first = packed.read_bytes()[:512]
    file = tmp_path / "huge"
    with file.open("wb") as out:
        out.write(first[:124] + b"00000000000\0" + first[136:512])
        out.write(header.tobuf(tarfile.GNU_FORMAT))
        out.truncate(4 << 30)
    with file.open("r+b") as out:
        fixed = tarfile.TarInfo(SPEC)
        out.write(fixed.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(FolderError, match="a header of"):
        unpack_bundle(file, tmp_path / "out")
    os.unlink(file)
