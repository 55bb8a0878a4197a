"""Files that appear late."""

import threading
import time
from pathlib import Path

from fairseq_sffn.checkpoints.shared_folder import largest, sizes_of, wait_for


def test_a_file_counts_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "part.pt"

    def write() -> None:
        time.sleep(0.3)
        path.parent.mkdir()
        path.write_bytes(b"half")
        time.sleep(0.3)
        path.write_bytes(b"half and half")

    thread = threading.Thread(target=write)
    thread.start()
    since = time.monotonic()
    assert wait_for({str(path): 13}, 30) is None
    assert time.monotonic() - since > 0.5
    thread.join()
    assert wait_for({str(path): 14}, 0.1) == str(path)


def test_ranks_that_see_parts_of_a_copy() -> None:
    assert largest([{"a": 1, "b": 5}, {}, {"a": 3}]) == {"a": 3, "b": 5}


def test_sizes_of_files_that_exist(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"123")
    assert sizes_of([tmp_path / "there", tmp_path / "gone"]) == {str(tmp_path / "there"): 3}
