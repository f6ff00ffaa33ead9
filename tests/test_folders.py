"""A folder is the old one or the new one, never a part of either."""

from pathlib import Path

import pytest

from speechllm.folders import replaced


def test_files_of_the_old_folder_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    for name in ("first", "second"):
        with replaced(folder) as new:
            (new / name).write_text(name)
            assert not (folder / name).exists()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "deep", "deep/folder", "deep/folder/second",
    ]  # fmt: skip


def test_a_fault_leaves_what_there_was(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with replaced(folder) as new:
        (new / "whole").write_text("whole")
    with pytest.raises(IsADirectoryError), replaced(folder) as new:
        new.write_text("no folder can be written to")
    assert [path.name for path in folder.iterdir()] == ["whole"]
    with replaced(folder) as new:
        assert not list(new.iterdir()), "the one that failed is gone"
    assert not list(folder.iterdir())
